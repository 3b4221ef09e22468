"""`sprand merge` at the command line: what it prints, exit codes, and nothing half-written."""

from __future__ import annotations

import json
import re

import pytest
import torch

import sprand
from checkpoints import content_of, plain, trained
from sprand.cli import main


def run(*arguments: object) -> int:
    return main.run([*map(str, arguments)])


def model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"up": torch.nn.Linear(32, 48), "down": torch.nn.Linear(48, 32)})


@pytest.fixture
def base(tmp_path):
    folder = plain(tmp_path / "base", dict(model().state_dict()), {"model_type": "tiny"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(tmp_path):
    return sprand.save(trained(model(), density=0.1), tmp_path / "adapter")


def test_merge_verify_and_revert(base, adapter, tmp_path, capsys):
    assert run("merge", base, adapter, tmp_path / "out", "--verify") == 0
    said = capsys.readouterr()
    assert "307 entries of 2 tensors set" in said.out and "verified: every byte" in said.out and said.err == ""
    assert run("merge", "--revert", tmp_path / "out", adapter, tmp_path / "back", "--verify") == 0
    assert "307 entries of 2 tensors put back" in capsys.readouterr().out
    assert content_of(tmp_path / "back") == content_of(base)


def test_weights(base, adapter, tmp_path, capsys):
    with pytest.warns(UserWarning, match="are one adapter"):
        assert run("merge", base, f"{adapter}:0.5", f"{adapter}:0.5", tmp_path / "halves", "--verify") == 0
    assert run("merge", base, adapter, tmp_path / "whole", "--no-base-values") == 0
    halves, whole = content_of(tmp_path / "halves"), content_of(tmp_path / "whole")
    assert halves.pop("sprand_revert.dat")
    assert halves == whole
    assert run("merge", "--revert", tmp_path / "whole", adapter, tmp_path / "back") == 2
    assert "do not determine the base value" in capsys.readouterr().err


BAD = {
    "no base": (("nowhere", "ADAPTER", "OUT"), "No file or folder nowhere."),
    "no adapter": (("BASE", "nowhere", "OUT"), "No file or folder nowhere."),
    "no checkpoint": (("ADAPTER", "ADAPTER", "OUT"), "expected model.safetensors or model.safetensors.index.json there"),
    "base as adapter": (("BASE", "BASE", "OUT"), "expected adapter_model.safetensors there"),
    "existing": (("BASE", "ADAPTER", "BASE"), "give a new folder, or an empty one."),
    "nothing to revert": (("--revert", "BASE", "ADAPTER", "OUT"), "no sprand_revert.dat in"),
    "both": (("--revert", "--no-base-values", "BASE", "ADAPTER", "OUT"), "leave it out with --revert"),
    "infinite weight": (("BASE", "ADAPTER:inf", "OUT"), "weights: expected finite numbers"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_what_is_wrong_is_a_sentence_and_nothing_is_written(base, adapter, tmp_path, capsys, arguments, message):
    places = {"BASE": base, "ADAPTER": adapter, "OUT": tmp_path / "out", "ADAPTER:inf": f"{adapter}:inf"}
    before = content_of(tmp_path)
    assert run("merge", *(places.get(argument, argument) for argument in arguments)) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("sprand: ") and said.count("\n") == 1
    assert content_of(tmp_path) == before


def test_another_shape_of_the_same_name(adapter, tmp_path, capsys):
    other = plain(tmp_path / "other", {"up.weight": torch.zeros(8, 8), "down.weight": torch.zeros(32, 48)})
    assert run("merge", other, adapter, tmp_path / "out") == 2
    assert "up.weight is [8, 8] in" in capsys.readouterr().err


@pytest.fixture
def tuned(tmp_path):
    changed = model()
    changed["up"].weight.data[::3] += 0.01
    changed["down"].bias.data[0] = -0.0
    return plain(tmp_path / "tuned", dict(changed.state_dict()))


def test_diff_gives_an_adapter_that_merges_to_the_tuned_checkpoint(base, tuned, tmp_path, capsys):
    assert run("diff", base, tuned, "-o", tmp_path / "made") == 0
    said = capsys.readouterr().out
    assert "513 of 3,152 entries differ (16.2754%), in 2 tensors" in said and "1 of them as frozen values" in said
    assert run("merge", base, tmp_path / "made", tmp_path / "out", "--no-base-values") == 0
    assert content_of(tmp_path / "out")["model.safetensors"] == content_of(tuned)["model.safetensors"]
    assert run("diff", base, base, "-o", tmp_path / "none") == 2
    assert "there is no difference to keep" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_inspect_prints_a_table_json_and_a_picture(base, adapter, tmp_path, capsys):
    assert run("inspect", adapter) == 0
    said = capsys.readouterr().out
    assert "307 trained entries of 2 parameters, density 9.9935%" in said
    assert "chosen: random, density 0.1, seed 0" in said and "give --base BASE" in said
    assert run("inspect", adapter, "--base", base, "--json", "--top", 3) == 0
    found = json.loads(capsys.readouterr().out)
    deltas = {name: p.detach() for name, p in sprand.named_parameters(sprand.load(model(), adapter))}
    total = torch.cat([*deltas.values()]).double()
    assert found["nnz"] == 307 and found["rms"] == pytest.approx(total.square().mean().sqrt().item())
    assert [abs(change["delta"]) for change in found["largest_changes"]] == total.abs().sort(descending=True).values[:3].tolist()
    change = found["largest_changes"][0]
    before, after = model(), sprand.merge(sprand.load(model(), adapter))
    row, column = change["position"]
    moved = after.get_parameter(change["name"])[row, column] - before.get_parameter(change["name"])[row, column]
    assert moved.item() == pytest.approx(change["delta"], rel=1e-4)
    bare, narrow = model().bfloat16(), sprand.load(model().bfloat16(), adapter)
    for target in found["targets"]:
        weight, start = narrow.get_parameter(target["name"]), bare.get_parameter(target["name"])
        assert round(target["visible"] * target["nnz"]) == int((weight != start).sum())
    pytest.importorskip("matplotlib")
    assert run("inspect", adapter, "--plot", tmp_path / "picture.png") == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_refuses_another_base(tuned, adapter, capsys):
    assert run("inspect", adapter, "--base", tuned) == 2
    assert "was trained on another base" in capsys.readouterr().err


def test_a_classifier_around_a_base_is_not_exported_under_names_that_peft_would_not_find(bert, rows, tmp_path, capsys):
    out = tmp_path / "run"
    assert main.run(["finetune", *map(str, ["--model", bert, "--train", rows, "--out", out, "--max-steps", 1])]) == 0
    options = [out / "adapter", "--to", "shira", "--base", bert, "-o", tmp_path / "exported"]
    assert main.run(["export", *map(str, options)]) == 2
    said = capsys.readouterr().err
    assert re.search(r"bert\.encoder\.layer\.0\.\S*weight: the model of this base calls that weight encoder\.layer\.0", said)
    assert "(sprand merge)" in said and not (tmp_path / "exported").exists()
