"""What `sprand merge` writes of a run of `sprand finetune` says what the run says, also by pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints import content_of
from sprand.checkpoint.revert import revert
from sprand.cli import main
from sprand.cli.finetune import models
from sprand.cli.tuned import load_run
from tiny_models import WORDS

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

TEXTS = [" ".join(WORDS[start : start + 5]) for start in (0, 9, 18, 30)]


def merged(folder: Path, bert: Path, rows: Path, *more: object) -> tuple[Path, Path]:
    """A run and the checkpoint that it was merged into."""
    run, out = folder / "run", folder / "merged"
    asked = ("--model", bert, "--train", rows, "--out", run, "--max-steps", 12, "--lr", 0.02, "--density", 0.1)
    assert main.run(["finetune", *map(str, (*asked, *more))]) == 0
    assert main.run(["merge", str(bert), str(run), str(out), "--verify"]) == 0
    return run, out


def predicted(capsys, place: Path, file: Path) -> list[dict]:
    capsys.readouterr()
    assert main.run(["predict", str(place), str(file), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def write_texts(folder: Path) -> Path:
    file = folder / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


def test_a_merged_classifier_says_by_pipeline_what_the_run_says(bert, rows, tmp_path, capsys):
    run, out = merged(tmp_path, bert, rows)
    said = predicted(capsys, run, write_texts(tmp_path))
    pipeline = transformers.pipeline("text-classification", str(out), top_k=None)
    for row, classes in zip(said, pipeline(TEXTS), strict=True):
        assert {item["label"]: item["score"] for item in classes} == pytest.approx(row["probabilities"], abs=1e-5)
        assert row["label"] in ("a", "b")
    assert predicted(capsys, out, tmp_path / "texts.txt") == said


LABELS = {"multi-label": ["w1", "w20"], "regression": 0.5}


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_merged_model_of_several_labels_and_of_numbers_says_what_the_run_says(task, pooling, bert, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": text, "label": LABELS[task] if number % 2 else LABELS[task][:1] if task == "multi-label" else -1.0}
            for number, text in enumerate(TEXTS * 6)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, out = merged(tmp_path, bert, file, "--task", task, "--pooling", pooling)
    said = predicted(capsys, run, write_texts(tmp_path))
    assert predicted(capsys, out, tmp_path / "texts.txt") == said
    assert main.run(["evaluate", str(out), str(file)]) == 0
    if pooling == "mean":
        return
    pipeline = transformers.pipeline("text-classification", str(out), top_k=None)
    for row, classes in zip(said, pipeline(TEXTS), strict=True):
        expected = row["probabilities"] if task == "multi-label" else {"LABEL_0": row["label"]}
        assert {item["label"]: item["score"] for item in classes} == pytest.approx(expected, abs=1e-5)


def test_a_merged_head_over_the_mean_is_loaded_whole_and_taken_for_no_other(bert, rows, tmp_path, capsys):
    run, out = merged(tmp_path, bert, rows, "--pooling", "mean")
    assert "sprand predict loads all of it" in capsys.readouterr().out
    said = predicted(capsys, run, write_texts(tmp_path))
    assert predicted(capsys, out, tmp_path / "texts.txt") == said
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MeanPoolClassifier"] and config["id2label"] == {"0": "a", "1": "b"}
    _, found = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert {"classifier.weight", "classifier.bias"} <= set(found["missing_keys"])
    assert (
        main.run(["finetune", "--model", str(out), "--train", str(rows), "--out", str(tmp_path / "on"), "--max-steps", "1"]) == 0
    )
    before, again = (json.loads((place / "results.json").read_text())["results"][0] for place in (run, tmp_path / "on"))
    assert again["before"]["loss"] == pytest.approx(before["after"]["loss"], rel=1e-4)
    revert(out, [(run, 1.0)], tmp_path / "back")
    assert content_of(tmp_path / "back") == content_of(bert)


def test_a_head_of_another_number_of_classes_starts_anew(bert, rows, tmp_path):
    _, out = merged(tmp_path, bert, rows, "--pooling", "mean")
    three, _ = models.load(str(out), "classification", 3, "float32", "auto", 0)
    assert three.pooled_classifier.out_features == 3 and not torch.any(three.pooled_classifier.bias)
    tuned = load_run(out)
    assert tuned.labels == ("a", "b") and torch.any(tuned.model.pooled_classifier.bias)
