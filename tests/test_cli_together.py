"""`sprand finetune` in several processes, from a file of options or an adapter, with the best checkpoint, packed, to the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_models import WORDS, save_bert, save_llama

pytest.importorskip("trl")
pytest.importorskip("rich")

from sprand.adapters.file import AdapterFile
from sprand.cli import main

ROOT = Path(__file__).resolve().parents[1]


def finetune(*arguments: object) -> int:
    return main.run(["finetune", *map(str, arguments)])


def losses(out: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if name in line]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A language model, 32 training rows and 4 held-out ones."""
    folder = tmp_path_factory.mktemp("prompts")
    model = save_llama(folder / "llama")
    lines = [json.dumps({"prompt": f"w{i % 9} w1", "completion": f" w{i % 9} w{i % 9 + 1}"}) for i in range(36)]
    (folder / "train.jsonl").write_text("\n".join(lines[:32]))
    (folder / "dev.jsonl").write_text("\n".join(lines[32:]))
    return model, folder / "train.jsonl", folder / "dev.jsonl"


TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sprand", "finetune"]


def together(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOGETHER, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=os.environ)


def test_two_processes_do_what_one_does(prompts, tmp_path):
    model, train, dev = prompts
    asked = ["--model", model, "--train", train, "--eval", dev, "--max-steps", 6, "--checkpoint-every", 3, "--max-length", 16]
    asked = [*asked, "--density", 0.1, "--lr", 0.01, "--verify"]
    assert finetune(*asked, "--batch-size", 8, "--out", tmp_path / "one") == 0
    asked = [*asked, "--batch-size", 4, "--out", tmp_path / "two"]
    done = together(*asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("32 training rows") == done.stdout.count("written to") == 1
    assert len(losses(tmp_path / "two")) == 6
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(tmp_path / "one")))
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    again = together(*asked)
    assert again.returncode != 0 and again.stderr.count("holds a run that has ended") == 1


def test_two_processes_classify_as_one_does(tmp_path):
    """Its loss is sprand's own: a share of each process, that their mean makes whole; of a model without dropout."""
    model, rows = save_bert(tmp_path / "bert"), tmp_path / "rows.tsv"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    rows.write_text("text\tlabel\n" + "".join(f"w{i % 9} w{i % 7} w{3 + i % 2}\t{'ab'[i % 2]}\n" for i in range(32)))
    asked = ["--model", model, "--train", rows, "--eval", rows, "--max-steps", 4, "--density", 0.1, "--lr", 0.01]
    assert finetune(*asked, "--batch-size", 8, "--out", tmp_path / "one") == 0
    done = together(*asked, "--batch-size", 4, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(torch.tensor(losses(tmp_path / "two", name)), torch.tensor(losses(tmp_path / "one", name)))


def test_options_of_a_file_are_those_of_the_shell(prompts, tmp_path, capsys):
    model, train, dev = prompts
    file = tmp_path / "options.yaml"
    options = {"model": str(model), "train": [str(train)], "eval": [str(dev)], "max_steps": 3, "max-length": 16, "lr": 0.5}
    file.write_text(json.dumps(options | {"compare": ["lora"], "packing": False, "trainer": {"logging_steps": 2}}))
    assert finetune("--config", file, "--out", tmp_path / "out", "--lr", 0.01) == 0
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["settings"]["lr"] == 0.01 and [row["method"] for row in written["results"]] == ["sprand", "lora"]
    assert len(losses(tmp_path / "out")) == 2 * 3  # the first step, the second, and the last, of either method
    capsys.readouterr()
    wrong = {"batchsize: 4": "no option --batchsize; did you mean --batch-size?", "- a": "expected options", "a: [": "be read"}
    for content, said in wrong.items():
        file.write_text(content)
        assert finetune("--config", file, "--out", tmp_path / "other") == 2
        assert said in capsys.readouterr().err


def test_the_first_step_of_a_short_run_trains(prompts, tmp_path):
    """A warm-up of one step would be a step at a rate of 0."""
    model, train, dev = prompts
    asked = ["--model", model, "--train", train, "--eval", dev, "--max-length", 16, "--warmup", 1, "--lr", 0.01]
    assert finetune(*asked, "--max-steps", 1, "--out", tmp_path) == 0
    before, after = losses(tmp_path, "eval_loss")
    assert after < before


def test_the_best_checkpoint_is_kept_and_patience_ends_a_run(prompts, tmp_path):
    model, train, dev = prompts
    asked = ["--model", model, "--train", train, "--eval", dev, "--max-length", 16, "--density", 0.3, "--lr", 1.0]
    asked = [*asked, "--schedule", "constant", "--eval-every", 1, "--max-steps", 30, "--patience", 3, "--warmup", 0]
    assert finetune(*asked, "--out", tmp_path) == 0
    measured = losses(tmp_path, "eval_perplexity")
    assert len(measured) < 31 and measured.index(min(measured[1:])) == len(measured) - 4
    row = json.loads((tmp_path / "results.json").read_text())["results"][0]
    assert row["after"]["perplexity"] == pytest.approx(min(measured[1:]))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    best = tmp_path / "checkpoints" / f"checkpoint-{len(measured) - 4}"
    kept = load_file(best / "adapter_model.safetensors")
    assert adapter.keys() == kept.keys() and all(torch.equal(adapter[name], value) for name, value in kept.items())


def test_packed_rows_are_learned_as_rows_of_their_own(tmp_path):
    """As many steps as packed rows fill; what is learned of a row does not depend on what stands before it in a packed one."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"prompt": f"w{i} w1", "completion": f" w{i + 1}"}) for i in range(len(WORDS) - 1)))
    asked = ["--model", save_llama(tmp_path / "llama"), "--train", texts, "--eval", texts, "--max-length", 32, "--epochs", 1]
    assert finetune(*asked, "--batch-size", 2, "--packing", "--out", tmp_path / "out") == 0
    steps = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]["steps"]
    assert steps < len(WORDS) // 4


def test_an_adapter_is_trained_further(prompts, tmp_path, capsys):
    model, train, dev = prompts
    asked = ["--model", model, "--train", train, "--eval", dev, "--max-length", 16, "--lr", 0.01, "--max-steps", 4]
    assert finetune(*asked, "--density", 0.1, "--out", tmp_path / "first") == 0
    assert finetune(*asked, "--start", tmp_path / "first", "--out", tmp_path / "second", "--verify") == 0
    first, second = losses(tmp_path / "first", "eval_perplexity"), losses(tmp_path / "second", "eval_perplexity")
    assert second[0] == pytest.approx(first[-1]) and second[-1] < second[0]
    entries = [AdapterFile.read(tmp_path / name).entries("model.layers.0.mlp.up_proj.weight")[0] for name in ("first", "second")]
    assert torch.equal(*entries)
    capsys.readouterr()
    assert finetune(*asked, "--start", tmp_path / "first", "--density", 0.1, "--out", tmp_path / "third") == 2
    assert "--start: it fixes which entries train; leave out --density" in capsys.readouterr().err
    assert finetune(*asked, "--start", tmp_path / "none", "--out", tmp_path / "third") == 2
    assert "none is not there; expected the folder of an adapter" in capsys.readouterr().err


def test_further_weights_train_by_name(prompts, tmp_path):
    model, train, dev = prompts
    asked = [
        "--model",
        model,
        "--train",
        train,
        "--eval",
        dev,
        "--max-length",
        16,
        "--lr",
        0.01,
        "--max-steps",
        2,
        "--density",
        0.1,
    ]
    assert finetune(*asked, "--target-parameters", "input_layernorm.weight", "--out", tmp_path) == 0
    assert "model.layers.0.input_layernorm.weight" in AdapterFile.read(tmp_path).targets


def test_the_hub_is_given_the_adapter_or_what_hinders_is_said(prompts, tmp_path, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    model, train, dev = prompts
    asked = ["--model", model, "--train", train, "--eval", dev, "--max-length", 16, "--max-steps", 2, "--push-to-hub", "me/mine"]
    sent = {}
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, name, exist_ok: hub.RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(hub.HfApi, "upload_folder", lambda self, repo_id, folder_path: sent.update({repo_id: folder_path}))
    assert finetune(*asked, "--out", tmp_path / "out") == 0
    assert sent == {"me/mine": tmp_path / "out" / "adapter"} and "on the Hub: https" in capsys.readouterr().out

    def refused(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(hub.HfApi, "create_repo", refused)
    assert finetune(*asked, "--out", tmp_path / "again") == 1
    assert "--push-to-hub me/mine: no network. The run is complete in" in capsys.readouterr().err
    assert (tmp_path / "again" / "results.json").is_file()
