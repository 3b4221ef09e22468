"""`sprand finetune` on rows with several labels, and with numbers: it learns them, by the losses that transformers takes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from tiny_models import WORDS

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")


from sprand.cli import main
from sprand.cli.finetune import data, models, tasks
from sprand.cli.finetune.settings import Settings


def rows(folder: Path, make) -> Path:
    """Texts of three words, and what `make` says of the words."""
    source, path = random.Random(0), folder / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(120):
            words = source.sample(WORDS[:12], 3)
            file.write(json.dumps({"text": " ".join(words), **make(words)}) + "\n")
    return path


SEVERAL = {"make": lambda words: {"labels": [word for word in ("w0", "w1", "w2") if word in words]}, "metric": "accuracy"}
NUMBERS = {"make": lambda words: {"label": sum(word in words for word in WORDS[:4]) - 0.5}, "metric": "rmse"}
KINDS = {"multi-label": SEVERAL, "regression": NUMBERS}


@pytest.mark.parametrize("task", KINDS)
def test_it_learns_by_the_loss_that_transformers_takes(bert, tmp_path, capsys, task):
    path, out = rows(tmp_path, KINDS[task]["make"]), tmp_path / "out"
    settings = Settings(model=str(bert), train=path, out=out, task=task, pooling="model")
    dataset = data.load(settings)
    model, tokenizer = models.load(str(bert), dataset.task, len(dataset.labels), "float32", "model", 0)
    models.say_labels(model, dataset.labels, dataset.task)
    made = tasks.make(dataset, tokenizer, settings)
    batch = made.collate(made.train[:8])
    total, terms, _ = made.loss(model.eval(), batch)
    torch.testing.assert_close(total / terms, model(**batch).loss)
    asked = ("--task", task, "--epochs", 40, "--density", 0.3, "--lr", 0.02)
    assert main.run([*map(str, ("finetune", "--model", bert, "--train", path, "--out", out, *asked))]) == 0
    result = json.loads((out / "results.json").read_text())["results"][0]
    before, after = (result[when][KINDS[task]["metric"]] for when in ("before", "after"))
    assert after > before + 0.2 if task == "multi-label" else after < 0.7 * before
    assert ("3 classes, with their training rows: w0" if task == "multi-label" else "-0.5 to 2.5") in capsys.readouterr().out


def test_class_weights_are_for_one_class_a_row(bert, tmp_path, capsys):
    path = rows(tmp_path, SEVERAL["make"])
    asked = ("finetune", "--model", bert, "--train", path, "--out", tmp_path / "out", "--class-weights", "balanced")
    assert main.run([*map(str, asked)]) == 2
    assert "--class-weights is not for multi-label" in capsys.readouterr().err


@pytest.mark.parametrize("task", KINDS)
def test_predict_and_evaluate_go_on_from_it(bert, tmp_path, capsys, task):
    path, out = rows(tmp_path, KINDS[task]["make"]), tmp_path / "out"
    asked = ("finetune", "--model", bert, "--train", path, "--eval", path, "--out", out, "--task", task, "--max-steps", 20)
    assert main.run([*map(str, asked)]) == 0
    measured = json.loads((out / "results.json").read_text())["results"][0]["after"]
    capsys.readouterr()
    assert main.run(["evaluate", str(out), str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"]["numbers"] == pytest.approx(measured)
    assert main.run(["predict", str(out), str(path), "--json"]) == 0
    said = [row["label"] for row in json.loads(capsys.readouterr().out)["rows"]]
    true = [list(json.loads(line).values())[1] for line in path.read_text().splitlines()]
    if task == "multi-label":
        assert sum(map(list.__eq__, said, true)) / len(true) == pytest.approx(measured["accuracy"])
    else:
        error = sum((a - b) ** 2 for a, b in zip(said, true, strict=True)) / len(true)
        assert error**0.5 == pytest.approx(measured["rmse"], rel=1e-4)
