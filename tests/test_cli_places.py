"""What commands take for a place: files, folders, runs, masks, names on the Hub; where they write; what fits a narrow screen."""

from __future__ import annotations

import argparse
import json
import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import sprand
from checkpoints import content_of, plain, trained
from sprand.checkpoint.merge import merge
from sprand.cli import main

ROOT = Path(__file__).resolve().parents[1]
SCREEN = 80
PATH = "model.layers.0.self_attn.queries"


def run(*arguments: object) -> int:
    return main.run([*map(str, arguments)])


def model():
    torch.manual_seed(0)
    net = torch.nn.Module()
    place = net
    for part in PATH.split("."):
        place.add_module(part, torch.nn.Module())
        place = place.get_submodule(part)
    place.add_module("inner", torch.nn.Linear(64, 2048))
    return net


@pytest.fixture
def base(tmp_path):
    return plain(tmp_path / "base", dict(model().state_dict()))


@pytest.fixture
def finished(tmp_path):
    """The folder of a run, and its adapter."""
    return tmp_path / "run", sprand.save(trained(model(), density=0.1), tmp_path / "run" / "adapter")


ABSENT = """
import sys
from sprand.cli.main import run
for command in sys.argv[1:]:
    print(run(command.split()))
"""


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_a_name_that_is_neither_a_path_nor_fetched_is_a_sentence(base, finished, tmp_path, terminal):
    """In a process of its own: the Hub's client has some of its parts only after they were imported."""
    pytest.importorskip("huggingface_hub")
    _, adapter = finished
    ways = [
        "inspect {}", "plan {}", "merge {} %s OUT", "merge %s {}:0.5 OUT", "diff {} %s -o OUT",
        "export {} --to dense-delta -o OUT", "combine {} --base %s -o OUT", "predict {} %s",
    ]  # fmt: skip
    places = {"inspect {}": base, "merge {} %s OUT": adapter, "predict {} %s": ROOT / "README.md"}
    commands = [
        way.replace("%s", str(places.get(way, base))).format(name).replace("OUT", str(tmp_path / "out"))
        for name in ("nobody/nothing", "runs/none/here", "nowhere")
        for way in ways
    ]
    reader, writer = pty.openpty() if terminal else os.pipe()
    command = [sys.executable, "-c", ABSENT, *commands]
    done = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=writer, text=True)
    os.close(writer)
    said = ""
    while True:
        try:
            part = os.read(reader, 1 << 16).decode()
        except OSError:  # how a terminal ends
            part = ""
        if not part:
            break
        said += part
    os.close(reader)
    assert done.communicate()[0].split() == ["2"] * len(commands), said
    lines = [line for line in said.splitlines() if line.startswith("sprand: ")]
    assert len(lines) == len(commands) and "Traceback" not in said
    about_hub = [line for line in lines if "nobody/nothing, and it could not be fetched from the Hub: " in line]
    assert len(about_hub) == len(ways) - 1 and not (tmp_path / "out").exists()


def test_a_run_and_its_adapter_are_taken_alike(base, finished, tmp_path, capsys, monkeypatch):
    folder, adapter = finished
    monkeypatch.chdir(tmp_path)
    for number, place in enumerate((folder, "run", adapter, adapter / "adapter_model.safetensors")):
        out = tmp_path / f"out{number}"
        assert run("merge", base, place, out / "merged", "--no-base-values") == 0
        assert run("export", place, "--to", "dense-delta", "-o", out / "dense") == 0
        assert run("combine", place, "--base", base, "-o", out / "whole") == 0
        capsys.readouterr()
        assert run("inspect", place, "--json") == 0
        assert json.loads(capsys.readouterr().out)["nnz"] == 13107
    merge(base, [(adapter, 1.0)], tmp_path / "expected", revertible=False)
    assert all(content_of(tmp_path / f"out{number}" / "merged") == content_of(tmp_path / "expected") for number in range(4))
    assert run("combine", folder, "--base", base, "-o", adapter) == 2
    assert "is one of the adapters that are read" in capsys.readouterr().err
    loaded = sprand.load(model(), folder)
    sprand.apply(model(), density=0.1, seed=1, disjoint=folder)
    assert sum(p.numel() for p in sprand.parameters(loaded)) == 13107


def test_a_mask_is_inspected(tmp_path, capsys):
    mask = sprand.select(model(), density=0.1, strategy="magnitude")
    file = mask.save(tmp_path / "mask.safetensors")
    assert run("inspect", file) == 0
    said = capsys.readouterr().out
    assert "a mask of 13,107 entries of 1 parameters, density 9.9998%" in said
    assert "chosen: magnitude, local, density 0.1" in said and f"{PATH}.inner.weight" in said and "2048x64" in said
    assert run("inspect", file, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["nnz"] == mask.nnz and content["selection"]["strategy"] == "magnitude"
    assert [(target["name"], target["nnz"]) for target in content["targets"]] == [(f"{PATH}.inner.weight", mask.nnz)]
    for option in (("--base", tmp_path), ("--top", 3)):
        assert run("inspect", file, *option) == 2
        assert f"{option[0]}: {file} is a mask, which has entries and no values" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert run("inspect", file, "--plot", tmp_path / "mask.png") == 0
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_given_twice_is_said(base, finished, tmp_path, capsys):
    folder, adapter = finished
    copied = sprand.save(trained(model(), density=0.1), tmp_path / "copy")
    for number, second in enumerate((folder, copied)):
        with pytest.warns(UserWarning, match=rf"{adapter} and .* are one adapter, whose changes count 2 times"):
            assert run("merge", base, adapter, second, tmp_path / f"merged{number}") == 0
        with pytest.warns(UserWarning, match=rf"{adapter} and .* are one adapter"):
            assert run("combine", adapter, second, "--base", base, "-o", tmp_path / f"both{number}") == 0
    other = sprand.save(trained(model(), density=0.1, seed=1), tmp_path / "other")  # the same values elsewhere
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("merge", base, adapter, other, tmp_path / "two") == 0


def test_merge_takes_its_folder_last_or_by_name(base, finished, tmp_path, capsys):
    _, adapter = finished
    for number, way in enumerate((["{}"], ["-o", "{}"], ["--out", "{}"])):
        assert run("merge", base, adapter, *(word.format(tmp_path / str(number)) for word in way)) == 0
    assert content_of(tmp_path / "0") == content_of(tmp_path / "1") == content_of(tmp_path / "2")
    assert run("merge", "-o", tmp_path / "3", base, adapter) == 0
    capsys.readouterr()
    assert run("merge", base, adapter) == 2
    assert f"Expected BASE ADAPTER OUT, got no OUT after {adapter}" in capsys.readouterr().err


def test_every_command_that_writes_takes_both_names_of_the_place():
    (sub,) = (action for action in main.build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    writes = {name for name, command in sub.choices.items() if "--out" in command._option_string_actions}
    assert writes == {"finetune", "select", "predict", "merge", "combine", "diff", "export"}
    assert all("-o" in sub.choices[name]._option_string_actions for name in writes)


def test_tables_fit_a_screen_of_80_columns(base, finished, capsys, monkeypatch):
    monkeypatch.chdir(base.parent)
    monkeypatch.setenv("COLUMNS", str(SCREEN))
    large = {f"model.layers.{i}.q_proj.weight": torch.empty(1 << 16, 1 << 16, device="meta") for i in range(16)}
    monkeypatch.setattr("sprand.cli.plan._weights", lambda name: [_weight(*item) for item in large.items()])
    assert run("plan", "large") == 0
    said = capsys.readouterr().out
    assert "68,719,476,736" in said and max(map(len, said.splitlines())) <= SCREEN
    assert [line.split()[-1] for line in said.splitlines() if "full fine-tuning" in line] == ["GB"]
    for arguments in (["inspect", "run"], ["inspect", "run", "--base", "base"]):
        assert run(*arguments) == 0
        said = capsys.readouterr().out
        assert max(map(len, said.splitlines())) <= SCREEN
        assert f"\n{PATH}.inner.weight\n  2048x64   13,107  9.9998%" in said
    monkeypatch.delenv("COLUMNS")
    assert run("inspect", "run") == 0
    assert f"{PATH}.inner.weight  2048x64   13,107" in capsys.readouterr().out


def _weight(name: str, tensor: torch.Tensor):
    from sprand.checkpoint.plan import Weight

    return Weight(name, tuple(tensor.shape), "BF16")
