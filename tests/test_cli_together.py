"""`sprand finetune` in several processes, from a file of options, with the best checkpoint, and packed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_models import WORDS, save_llama

pytest.importorskip("trl")
pytest.importorskip("rich")

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


def test_two_processes_do_what_one_does(prompts, tmp_path):
    model, train, dev = prompts
    asked = ["--model", model, "--train", train, "--eval", dev, "--max-steps", 6, "--checkpoint-every", 3, "--max-length", 16]
    asked = [*asked, "--density", 0.1, "--lr", 0.01, "--verify"]
    assert finetune(*asked, "--batch-size", 8, "--out", tmp_path / "one") == 0
    asked = [*asked, "--batch-size", 4, "--out", tmp_path / "two"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sprand", "finetune"]
    done = subprocess.run([*command, *map(str, asked)], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("32 training rows") == done.stdout.count("written to") == 1
    assert len(losses(tmp_path / "two")) == 6
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(tmp_path / "one")))
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    again = subprocess.run([*command, *map(str, asked)], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert again.returncode != 0 and again.stderr.count("holds a run that has ended") == 1


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
