"""The `sprand` command as its user meets it: help that fits, examples that parse, JSON, exit codes, completion, Ctrl-C."""

from __future__ import annotations

import argparse
import errno
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sprand
from checkpoints import content_of, tensors_of, trained
from sprand.cli import main, table

ROOT = Path(__file__).resolve().parents[1]
LINES, COLUMNS = 40, 100
STARTED = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def commands(brief: bool) -> dict[str, argparse.ArgumentParser]:
    parser = main.build_parser(brief)
    (sub,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {"": parser, **sub.choices}


NAMES = list(commands(False))


def run(*arguments: object) -> int:
    return main.run([*map(str, arguments)])


def helped(monkeypatch, capsys, *arguments: str) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    with pytest.raises(SystemExit) as stop:
        main.run(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_a_screen_and_its_examples_parse(monkeypatch, capsys, name):
    lines = helped(monkeypatch, capsys, *filter(None, [name]), "--help")
    assert len(lines) <= LINES and max(map(len, lines)) <= COLUMNS
    start = lines.index("examples:")
    examples = [line.partition("#")[0].partition(">")[0] for line in lines[start + 1 :] if line.strip()]
    assert examples
    for example in examples:
        program, *arguments = shlex.split(example)
        assert program == "sprand"
        if "COMMAND" not in arguments:
            assert callable(main.build_parser().parse_args(arguments).command)


@pytest.mark.parametrize("name", [name for name in NAMES if name])
def test_every_option_is_explained_in_one_of_the_helps(monkeypatch, capsys, name):
    parser = commands(False)[name]
    said = "\n".join(
        helped(monkeypatch, capsys, name, "--help-all" if "--help-all" in parser._option_string_actions else "--help")
    )
    assert [option for option in parser._option_string_actions if option not in said] == []
    assert all(action.help for action in parser._actions)


def test_exit_codes_stand_in_help_and_docs(monkeypatch, capsys):
    said, page = "\n".join(helped(monkeypatch, capsys, "--help")), (ROOT / "docs" / "command_line.md").read_text()
    for code in (0, 1, 2, 130):
        assert re.search(rf"^  {code} +\w", said, re.M) and f"\n| {code} | " in page
    assert "143" in said and "\n| 143 | " in page and "\n| 141 | " in page


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "base"
    folder.mkdir()
    weight_map = {f"part{i}.weight": f"model-{1 + i // 2:05}-of-00002.safetensors" for i in range(4)}
    for file in sorted(set(weight_map.values())):
        save_file({name: torch.randn(24, 32) for name in weight_map if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def adapter_of(base: Path, folder: Path, density: float, seed: int = 0) -> Path:
    model = torch.nn.ModuleDict({f"part{i}": torch.nn.Linear(32, 24, bias=False) for i in range(4)})
    model.load_state_dict(tensors_of(base))
    return sprand.save(trained(model, density=density, seed=seed), folder)


def test_json_of_the_commands_on_files(base, tmp_path, capsys):
    def said(*arguments: object) -> dict:
        assert run(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    first, second = (adapter_of(base, tmp_path / f"adapter{seed}", 0.1, seed) for seed in (0, 1))
    merged = said("merge", base, first, tmp_path / "merged", "--verify")
    assert (merged["out"], merged["entries"], merged["verified"]) == (str(tmp_path / "merged"), 307, True)
    changed = said("diff", base, tmp_path / "merged", "-o", tmp_path / "diff")
    differs = sum(int((value != tensors_of(tmp_path / "merged")[name]).sum()) for name, value in tensors_of(base).items())
    assert (changed["changed"], changed["entries"], changed["out"]) == (differs, 3072, str(tmp_path / "diff"))
    assert changed["bytes"] == (tmp_path / "diff" / "adapter_model.safetensors").stat().st_size
    both = said("combine", first, second, "--base", base, "-o", tmp_path / "both")
    assert len(both["sources"]) == 2 and both["entries"] == 614 - both["sources"][0]["shared"]
    files = said("export", first, "--to", "dense-delta", "-o", tmp_path / "dense")["files"]
    assert files and all(Path(file["path"]).stat().st_size == file["bytes"] for file in files)


def test_finetune_prints_only_json_on_standard_output(bert, rows, tmp_path, capsys):
    assert run("finetune", "--model", bert, "--train", rows, "--out", tmp_path, "--max-steps", 2, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "results.json").read_text())
    assert "step 2/2" in said.err


def test_work_that_fails_exits_with_1(base, tmp_path, capsys, monkeypatch):
    adapter = adapter_of(base, tmp_path / "adapter", 0.1)
    from sprand.checkpoint import merge
    from sprand.cli import diff

    def wrong(*arguments, **more):
        raise ValueError("part0.weight is different")

    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merge, "verify", wrong)
    assert run("merge", base, adapter, tmp_path / "merged", "--verify") == 1
    assert "part0.weight is different" in capsys.readouterr().err
    monkeypatch.setattr(merge, "merge", full)
    assert run("merge", base, adapter, tmp_path / "again") == 1
    assert "run the same again" in capsys.readouterr().err
    monkeypatch.setattr(diff, "diff", full)
    assert run("diff", base, tmp_path / "merged", "-o", tmp_path / "diff") == 1
    assert "No space left on device" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_traceback(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter", 0.1)
    command = f"{sys.executable} -m sprand inspect {adapter} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "141" and done.stderr == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rich_on_a_terminal_and_plain_elsewhere(monkeypatch):
    pytest.importorskip("rich")
    rows = [("name", "verdict"), ("[bold]kernel", "FAILED")]
    terminal, pipe = Terminal(), io.StringIO()
    table.print_table(rows, title="title", file=terminal)
    table.print_table(rows, title="title", file=pipe)
    assert "│" in terminal.getvalue() and "[bold]kernel" in terminal.getvalue()
    assert pipe.getvalue() == "title\nname          verdict\n[bold]kernel   FAILED\n"


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = f"source {script}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
    line += '$(complete -p sprand | sed "s/.*-F \\([^ ]*\\).*/\\1/"); printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_completion(tmp_path, capsys, monkeypatch):
    pytest.importorskip("shtab")
    for shell in ("zsh", "fish", "bash"):
        assert run("completion", shell) == 0
        script = capsys.readouterr().out
        assert all(name in script for name in NAMES) and "calibration-memory" in script
    (tmp_path / "sprand.bash").write_text(script)
    assert completed(tmp_path / "sprand.bash", "sprand", "me") == ["merge"]
    assert {"--strategy", "--strategy-option"} <= {*completed(tmp_path / "sprand.bash", "sprand", "finetune", "--str")}
    assert completed(tmp_path / "sprand.bash", "sprand", "combine", "--method", "t") == ["ties"]
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run("completion", "bash") == 2
    assert "pip install 'shtab>=1.7'" in capsys.readouterr().err


def told(stderr: str) -> list[str]:
    """The command that a stopped one says, as arguments of `main.run`."""
    program, *arguments = shlex.split(stderr.splitlines()[-1])
    assert program == "sprand" and "with:" in stderr.splitlines()[-2]
    return arguments


def wait_for(happened, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)


def test_ctrl_c_while_training_says_the_command_that_goes_on(bert, rows, tmp_path):
    steps, metrics = 120, tmp_path / "metrics.jsonl"
    asked = ["--model", bert, "--train", rows, "--out", tmp_path, "--max-steps", steps, "--batch-size", 4, "--eval-every", 1000]
    process = subprocess.Popen([sys.executable, "-m", "sprand", "finetune", *map(str, asked)], **STARTED)
    wait_for(lambda: metrics.exists() and metrics.read_text().count('"loss"') > 2, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in said and "Stopped by Ctrl-C after step" in said
    again = told(said)
    assert again == ["finetune", *map(str, asked), "--resume"]
    stopped_at = metrics.read_text().count('"loss"')
    assert stopped_at < steps and (tmp_path / "checkpoints" / f"checkpoint-{stopped_at}").is_dir()
    assert main.run(again) == 0
    done = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert done == list(range(1, steps + 1))


SLOW_MERGE = """
import sys, time
from sprand.checkpoint import merge
from sprand.cli.main import run
write = merge._Job.write
def slowly(self, folder, shard, progress):
    write(self, folder, shard, progress)
    print(shard.name, flush=True)
    time.sleep(60)
merge._Job.write = slowly
sys.exit(run(sys.argv[1:]))
"""


def test_ctrl_c_while_merging_keeps_what_is_done(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter", 0.1)
    out, hidden = tmp_path / "out", tmp_path / ".out.sprand-unfinished"
    asked = ["merge", *map(str, (base, adapter, out))]
    process = subprocess.Popen([sys.executable, "-c", SLOW_MERGE, *asked], **STARTED)
    shard = process.stdout.readline().strip()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in said and not out.exists()
    kept = (hidden / shard).stat().st_ino
    assert "Stopped" in said and "kept beside it. Go on with:" in said
    assert told(said) == asked and main.run(told(said)) == 0
    assert (out / shard).stat().st_ino == kept
    assert run("merge", base, adapter, tmp_path / "whole") == 0
    assert content_of(out) == content_of(tmp_path / "whole")


def test_ctrl_c_elsewhere_says_to_begin_again(base, tmp_path, capsys, monkeypatch):
    from sprand.cli import inspect

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "inspect", interrupted)
    assert run("inspect", "an adapter") == 2
    capsys.readouterr()
    (tmp_path / "an adapter").mkdir()
    assert run("inspect", tmp_path / "an adapter") == 130
    said = capsys.readouterr().err
    assert "Begin again with:" in said and told(said) == ["inspect", str(tmp_path / "an adapter")]


def test_a_mistyped_option_gets_the_usage_of_its_command_and_a_hint(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("finetune", "--densty", "0.1", "--out", "x")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("usage: sprand finetune")
    assert "unrecognized arguments: --densty 0.1; did you mean --density?" in said
    with pytest.raises(SystemExit):
        run("finetune", "--density", "1%", "--out", "x")
    assert "expected a fraction, got '1%'; write 0.01 for 1 %" in capsys.readouterr().err


HINTS = {
    "finetune": {
        "--learning-rate": "--lr", "--lr_scheduler_type": "--schedule", "--output": "--out", "--output_dir": "--out",
        "--outt": "--out", "-out": "--out", "--num-train-epochs": "--epochs", "--batch_size": "--batch-size",
        "--per-device-train-batch-size": "--batch-size", "--sparsity": "--density", "--data": "--train", "--max-seq-len":
        "--max-length", "--strateg": "--strategy", "--save-steps": "--checkpoint-every", "--cpu": "--device", "--label":
        "--label-column", "--model_name_or_path": "--model", "--overwrit": "--overwrite",
        "--quiet": None, "--rank": None, "--dropout": None, "--lora-r": None, "--alpha": None, "-v": None,
    },
    "merge": {"--verif": "--verify", "--weights": None, "--density": None},
    "combine": {"--basee": "--base", "--weight": "--weights", "--output": "--out"},
    "export": {"--form": "--to", "--too": "--to"},
    "inspect": {"--tpo": "--top", "--plots": "--plot"},
    "predict": {"--max-tokens": "--max-new-tokens"},
    "plan": {"--mem": "--memory"},
}  # fmt: skip


@pytest.mark.parametrize("command", HINTS)
def test_a_near_miss_gets_its_option_whatever_else_is_missing(command, capsys):
    for option, meant in HINTS[command].items():
        with pytest.raises(SystemExit) as stopped:
            run(command, option, "3")
        said = capsys.readouterr().err.splitlines()[-1]
        hint = f"; did you mean {meant}?" if meant else ""
        assert stopped.value.code == 2 and said == f"sprand {command}: error: unrecognized arguments: {option} 3{hint}"


def test_what_only_looks_like_an_option_is_taken(base, tmp_path, capsys):
    assert run("inspect", "--", "-x") == 2
    assert "No file or folder -x." in capsys.readouterr().err
    assert run("inspect", "x", "--top", "-1") == 2
    assert "--top: expected a count, got -1." in capsys.readouterr().err
    adapter = adapter_of(base, tmp_path / "adapter", 0.1)
    assert run("merge", base, adapter, f"-o{tmp_path / 'merged'}") == 0 and (tmp_path / "merged").is_dir()


def test_the_way_on_names_a_program_that_the_shell_finds(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "sprand"
    program.parent.mkdir()
    program.write_text("#!/bin/sh")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main._again(["finetune"], ("--resume",)) == f"{program} finetune --resume"
    monkeypatch.setenv("PATH", str(program.parent))
    assert main._again(["finetune"], ("--resume",)) == "sprand finetune --resume"
