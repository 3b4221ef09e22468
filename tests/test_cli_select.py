"""`sprand select`, and training what it chose: from a mask, from a strategy by name, resumed with the same entries."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tiny_models import save_bert, save_llama

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import sprand
from sprand.adapters.file import AdapterFile
from sprand.cli import main
from sprand.cli.finetune import models
from sprand.selection.strategies import STRATEGIES


def run(*arguments: object) -> int:
    return main.run([*map(str, arguments)])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_chooses_and_its_mask_trains(bert, rows, tmp_path, strategy, capsys):
    mask = tmp_path / "mask.safetensors"
    amount = ("--density", 0.1, "--layout", "columns") if STRATEGIES[strategy].columns else ("--density", 0.02)
    asked = ("--strategy", strategy, *amount, "--data", rows, "--out", mask, "--json")
    assert run("select", bert, *asked, "--plot", tmp_path / "mask.png") == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert ("calibration: " in printed.err and "peak" in printed.err) == (STRATEGIES[strategy].needs is not None)
    chosen = sprand.Mask.load(mask)
    assert said["nnz"] == chosen.nnz and said["selection"]["strategy"] == strategy
    assert {name: target["nnz"] for name, target in said["targets"].items()} == {n: len(i) for n, i in chosen.items()}
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    if strategy in ("snip", "grasp", "lift"):
        assert run("finetune", "--model", bert, "--mask", mask, "--train", rows, "--max-steps", 2, "--out", tmp_path / "out") == 0
        model, _ = models.load(str(bert), "classification", 2, "float32", "auto", 0)
        sprand.load(model, tmp_path / "out" / "adapter")
        trained = sprand.adapters.state.mask_of(model)
        assert all(torch.equal(trained[name], chosen[name]) for name in chosen)
        assert trained.selection == chosen.selection


def test_select_and_finetune_choose_alike(bert, rows, tmp_path):
    fields = ("--strategy", "snip", "--density", 0.02, "--scope", "global", "--calibration-examples", 40)
    assert run("select", bert, "--data", rows, "--out", tmp_path / "mask.safetensors", *fields) == 0
    out = tmp_path / "out"
    assert run("finetune", "--model", bert, "--train", rows, "--eval", rows, "--max-steps", 2, "--out", out, *fields) == 0
    a, b = sprand.Mask.load(tmp_path / "mask.safetensors"), sprand.Mask.load(out / "mask.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len({len(indices) for indices in a.values()}) > 1


@pytest.mark.parametrize("strategy", ["random", "magnitude"])
def test_columns_are_selected_and_trained(bert, rows, tmp_path, strategy, capsys):
    fields = ("--strategy", strategy, "--density", 0.1, "--layout", "columns")
    assert run("select", bert, "--out", tmp_path / "mask.safetensors", *fields) == 0
    for name, how in {"given": ("--mask", tmp_path / "mask.safetensors"), "own": fields}.items():
        out = ("--out", tmp_path / name)
        assert run("finetune", "--model", bert, "--train", rows, "--eval", rows, "--max-steps", 2, *out, *how) == 0
    mask = sprand.Mask.load(tmp_path / "mask.safetensors")
    for name in ("given", "own"):
        adapter = AdapterFile.read(tmp_path / name / "adapter")
        for target, indices in mask.items():
            assert torch.equal(adapter.entries(target)[0], indices) and adapter.columns(target)[0] == 1
    assert run("select", bert, "--out", tmp_path / "mask.safetensors", "--density", 0.001, "--layout", "columns") == 2
    assert "leave no whole column" in capsys.readouterr().err


def test_a_scored_run_resumes_with_its_entries(bert, rows, tmp_path, capsys):
    base = ["finetune", "--model", bert, "--train", rows, "--max-steps", 6, "--checkpoint-every", 3, "--out", tmp_path]
    assert run(*base, "--strategy", "fisher") == 0
    (tmp_path / "results.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-6")
    kept = (tmp_path / "mask.safetensors").read_bytes()
    assert run(*base, "--strategy", "fisher", "--resume") == 0
    assert (tmp_path / "mask.safetensors").read_bytes() == kept
    assert "3 steps done" in capsys.readouterr().out
    assert run(*base, "--strategy", "snip", "--resume") == 2
    assert "'fisher'" in capsys.readouterr().err


def test_a_language_model_without_data(tmp_path, capsys):
    llama = save_llama(tmp_path / "llama")
    out = tmp_path / "mask.safetensors"
    assert run("select", llama, "--strategy", "lift", "--strategy-option", "rank=4", "--budget", 200, "--out", out) == 0
    chosen = sprand.Mask.load(out)
    assert chosen.nnz == 200 and "model.layers.0.self_attn.q_proj.weight" in chosen
    assert chosen.selection["strategy_options"] == {"rank": 4}
    assert "chose 200 of" in capsys.readouterr().out


def test_a_pruned_model_keeps_its_zeros(rows, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = save_bert(tmp_path / "bert")
    model = transformers.BertModel.from_pretrained(folder)
    for name, p in model.named_parameters():
        if name.endswith("query.weight"):
            p.data[::2] = 0
    model.save_pretrained(folder)
    out = tmp_path / "mask.safetensors"
    assert run("select", folder, "--strategy", "snip", "--data", rows, "--preserve-zeros", "--density", 0.9, "--out", out) == 0
    chosen = sprand.Mask.load(out)
    zeros = model.encoder.layer[0].attention.self.query.weight.flatten() == 0
    name = next(name for name in chosen if name.endswith("layer.0.attention.self.query.weight"))
    assert not zeros[chosen[name].long()].any()


BAD = {
    "no data": (
        ("--strategy", "snip"),
        "--strategy snip needs rows to compute scores on: give --data FILE (random, uniform, magni",
    ),
    "option": (("--strategy", "lift", "--strategy-option", "heat=1"), "strategy_options: expected rank"),
    "compare alone": (("--compare", "x"), "give --plot FILE.png"),
    "no other mask": (("--compare", "nowhere", "--plot", "x.png"), "--compare: no mask at nowhere"),
    "global random": (("--scope", "global"), "random draws have no scores"),
    "no rows": (("--strategy", "snip", "--data", "nowhere.tsv"), "nowhere.tsv: cannot be read"),
    "memory": (("--calibration-memory", "much"), "expected auto or a number of bytes, got 'much'"),
    "too little memory": (
        ("--calibration-memory", "10", "--strategy", "snip", "--data", "ROWS"),
        "calibration_memory: the accumul",
    ),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_options_are_named_and_nothing_is_written(bert, rows, tmp_path, capsys, arguments, message):
    arguments = [rows if argument == "ROWS" else argument for argument in arguments]
    out = tmp_path / "mask.safetensors"
    assert run("select", bert, "--out", out, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--mask", "MASK", "--density", 0.1), "--mask: it fixes which entries train; leave out --density."),
        (("--mask", "MASK", "--strategy", "snip"), "leave out --strategy."),
        (("--mask", "nowhere"), "--mask: nowhere is not there; sprand select writes one."),
        (("--sparta", "--budget", 5), "leave out --budget"),
    ],
)
def test_a_mask_and_other_choices_do_not_go_together(bert, rows, tmp_path, capsys, arguments, message):
    mask = tmp_path / "mask.safetensors"
    sprand.Mask({"a": torch.tensor([1])}, {"a": (3,)}).save(mask)
    arguments = [mask if argument == "MASK" else argument for argument in arguments]
    assert run("finetune", "--model", bert, "--train", rows, "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_mask_of_another_model_is_named(bert, rows, tmp_path, capsys):
    mask = tmp_path / "mask.safetensors"
    sprand.Mask({"there.weight": torch.tensor([1])}, {"there.weight": (3,)}).save(mask)
    assert run("finetune", "--model", bert, "--train", rows, "--out", tmp_path / "out", "--mask", mask) == 2
    assert "the model has no parameter 'there.weight'" in capsys.readouterr().err
