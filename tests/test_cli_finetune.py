"""`sprand finetune` from files to an adapter: it learns, resumes exactly, compares, and what it leaves can be used."""

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

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import sprand
from sprand.cli import main
from sprand.cli.finetune import models, tasks

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def finetune(*arguments: object) -> int:
    return main.run(["finetune", *map(str, arguments)])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_learns_compares_and_leaves_everything(bert, rows, tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    asked = ("--epochs", 8, "--batch-size", 8, "--density", 0.1, "--lr", 0.01, "--compare", "lora,full,head", "--verify")
    assert finetune("--model", bert, "--train", rows, "--eval-share", 0.2, "--out", out, *asked) == 0
    table = {row["method"]: row for row in results(out)["results"]}
    assert list(table) == ["sprand", "lora", "full", "head"]
    assert table["sprand"]["after"]["accuracy"] > table["sprand"]["before"]["accuracy"] + 0.2
    assert {row["steps"] for row in table.values()} == {80}
    assert len({json.dumps(row["before"]) for row in table.values()}) == 1
    assert abs(table["lora"]["trained_weights"] / table["sprand"]["trained_weights"] - 1) < 0.3
    assert table["head"]["trained_weights"] < table["sprand"]["trained_weights"] < table["full"]["trained_weights"]
    on_disk = sum(path.stat().st_size for path in (out / "adapter").iterdir())
    assert table["sprand"]["adapter_bytes"] == on_disk
    assert (out / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(results(out)["checked"]) == 4
    assert {line["method"] for line in metrics(out)} == set(table)
    printed = capsys.readouterr().out
    assert "lora (rank" in printed and "checked: unmerged, every weight equals the base's" in printed
    assert "\x1b[" not in printed


def test_the_adapter_loads_into_the_model_it_describes(bert, rows, tmp_path):
    out = tmp_path / "out"
    asked = ("--max-steps", 6, "--checkpoint-every", 1, "--keep", 3)
    assert finetune("--model", bert, "--train", rows, "--out", out, *asked) == 0
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "checkpoint-4",
        "checkpoint-5",
        "checkpoint-6",
        "run.json",
    ]
    said = json.loads((out / "task.json").read_text())
    model, tokenizer = models.load(said["model"], said["task"], len(said["labels"]), said["dtype"], said["pooling"], said["seed"])
    base = {name: value.clone() for name, value in model.state_dict().items()}
    sprand.load(model, out / "adapter")
    assert model.eval()(**tokenizer("w1 w2", return_tensors="pt")).logits.shape == (1, 2)
    sprand.unmerge(model)
    assert all(torch.equal(base[name], value) for name, value in model.state_dict().items())


RESUMES = """
import json, sys
from sprand.cli import main
sys.exit(any([main.run(arguments) for arguments in json.loads(sys.argv[1])]))
"""
ACCUMULATIONS = (1, 2)


@pytest.fixture(scope="module")
def resumed_in_a_new_process(bert, rows, tmp_path_factory):
    """By accumulated batches: the folder of a whole run, and that of one resumed from its half; one process resumes all."""
    folder, runs, resumes = tmp_path_factory.mktemp("resumed"), {}, []
    for accumulation in ACCUMULATIONS:
        whole, resumed = runs[accumulation] = folder / f"whole {accumulation}", folder / f"resumed {accumulation}"
        asked = ["finetune", "--model", bert, "--train", rows, "--density", 0.05, "--batch-size", 8, "--max-steps", 14]
        asked = [*map(str, [*asked, "--grad-accumulation", accumulation, "--checkpoint-every", 7])]
        assert main.run([*asked, "--out", str(whole)]) == 0
        resumes.append([*asked, "--out", str(resumed), "--resume", str(whole / "checkpoints" / "checkpoint-7")])
    done = subprocess.run([sys.executable, "-c", RESUMES, json.dumps(resumes)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 steps done") == len(ACCUMULATIONS)
    return runs


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_resume_in_a_new_process_is_exact(resumed_in_a_new_process, accumulation):
    whole, resumed = resumed_in_a_new_process[accumulation]
    a, b = (torch.load(out / "checkpoints" / "checkpoint-14" / "optimizer.pt") for out in (whole, resumed))
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert all(torch.equal(state[name], b["state"][key][name]) for name in ("exp_avg", "exp_avg_sq", "step"))
    losses = [[(line["step"], line["loss"]) for line in metrics(out) if "loss" in line] for out in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 14
    adapters = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (whole, resumed)]
    assert all(torch.equal(adapters[0][name], value) for name, value in adapters[1].items())


def test_resuming_on_another_number_of_threads_says_what_makes_it_exact(bert, rows, tmp_path, threads, capsys):
    run = ("--model", bert, "--train", rows, "--max-steps", 4, "--checkpoint-every", 2, "--out", tmp_path)
    half = tmp_path / "checkpoints" / "checkpoint-2"
    threads(1)
    assert finetune(*run) == 0
    warned = []
    for count in (1, 2):
        threads(count)
        assert finetune(*run, "--resume", half) == 0
        warned.append("used 1 thread(s) and goes on with 2" in (said := capsys.readouterr().out) and "OMP_NUM_THREADS=1" in said)
    assert warned == [False, True]


def test_language_model_on_text_and_on_prompts(tmp_path):
    model = save_llama(tmp_path / "llama")
    text, prompts = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("\n".join(" ".join(WORDS[i % 7 : i % 7 + 12]) for i in range(60)))
    prompts.write_text(
        "\n".join(json.dumps({"prompt": f"w{i % 9} w1", "completion": f"w{i % 9} w{i % 9 + 1}"}) for i in range(40))
    )
    for name, path in (("text", text), ("prompts", prompts)):
        out = tmp_path / name
        asked = ("--density", 0.1, "--lr", 0.01, "--max-steps", 30, "--batch-size", 8, "--max-length", 16)
        assert finetune("--model", model, "--train", path, "--out", out, *asked, "--verify") == 0
        row = results(out)["results"][0]
        assert row["after"]["perplexity"] < 0.8 * row["before"]["perplexity"]


def test_loss_is_taken_of_completions_only(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = save_llama(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    from sprand.cli.finetune.data import Dataset, Example

    example = [Example("w1 w2 w3", "w4 w5")]
    task = tasks.CausalLM(Dataset("causal-lm", example, example), tokenizer, 16)
    words = [tokenizer.convert_ids_to_tokens(i) if i != tasks.IGNORED else None for i in task.train[0]["labels"]]
    assert words == [None, None, None, "w4", "w5", "[SEP]"]


@pytest.mark.parametrize("layout, nnz", [("unstructured", 500)])
def test_bfloat16_and_other_schedules(bert, rows, tmp_path, layout, nnz):
    asked = ("--dtype", "bfloat16", "--schedule", "cosine", "--warmup", 2, "--max-steps", 4, "--pooling", "mean")
    asked = (*asked, "--budget", 500, "--layout", layout)
    assert finetune("--model", bert, "--train", rows, "--out", tmp_path, *asked, "--verify") == 0
    rates = [line["lr"] for line in metrics(tmp_path) if "lr" in line]
    assert rates[0] < rates[1] < rates[2] > rates[3] > 0
    row = results(tmp_path)["results"][0]
    assert row["trained_weights"] == nnz + 2 * 32 + 2


def test_real_data_beside_the_repository(tmp_path):
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared/data beside the repository")
    model, text = SHARED / "models" / "stories260k-hf", SHARED / "data" / "tinyshakespeare"
    asked = ("--density", 0.05, "--max-steps", 20, "--batch-size", 4, "--limit-eval", 16)
    assert (
        finetune(
            "--model", model, "--train", text / "train.txt", "--eval", text / "dev.txt", "--out", tmp_path, *asked, "--verify"
        )
        == 0
    )
    row = results(tmp_path)["results"][0]
    assert row["after"]["perplexity"] < 0.6 * row["before"]["perplexity"]


def test_the_library_needs_none_of_the_command_line():
    code = "import sys, sprand; print([m for m in ('transformers', 'rich', 'matplotlib', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "[]"
