"""`sprand predict`: the classes of new texts are those that the trained model gives them, from a file, a pipe and in Python."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import sprand
from sprand.cli import CliError, main, predict
from tiny_models import WORDS, save_llama


@pytest.fixture(scope="module")
def classifier(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "classifier"
    options = ["--model", bert, "--train", rows, "--out", out, "--density", 0.3, "--epochs", 20, "--lr", 0.02]
    assert main.run(["finetune", *map(str, options)]) == 0
    return out


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    (folder / "text.txt").write_text((" ".join(WORDS) + "\n") * 30)
    options = ["--model", save_llama(folder / "llama"), "--train", folder / "text.txt", "--out", folder / "out"]
    options += ["--density", 0.3, "--max-steps", 150, "--max-length", 32, "--lr", 0.05]
    assert main.run(["finetune", *map(str, options)]) == 0
    return folder / "out"


def said(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    assert main.run(["predict", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_classes_are_those_that_were_learned(classifier: Path, rows: Path, capsys):
    with rows.open() as file:
        labels = [row["label"] for row in csv.DictReader(file, delimiter="\t")]
    lines = [line.split("\t") for line in said(capsys, classifier, rows).splitlines()]
    right = sum(line[0] == label for line, label in zip(lines, labels, strict=True)) / len(labels)
    assert right > 0.9  # of 96 rows, 86 of them trained on
    assert all(0.5 <= float(line[1]) <= 1 for line in lines)
    assert said(capsys, classifier / "adapter", rows).splitlines() == ["\t".join(line) for line in lines]
    report = json.loads(said(capsys, classifier, rows, "--json", "--batch-size", 5))
    assert [row["label"] for row in report["rows"]] == [line[0] for line in lines]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in report["rows"])


def test_texts_come_through_a_pipe_and_in_python(classifier: Path, capsys, monkeypatch):
    texts = [" ".join(WORDS[:6]), " ".join(WORDS[-6:])]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(texts) + "\n"))
    lines = [line.split("\t") for line in said(capsys, classifier).splitlines()]
    assert [line[0] for line in lines] == ["b", "a"] and [line[2] for line in lines] == texts
    tuned = predict.load_run(classifier)
    examples = [predict.data.Example(text) for text in texts]
    before = tuned.probabilities(examples)
    sprand.merge(tuned.model)
    assert torch.equal(tuned.probabilities(examples), before) and tuned.labels == ("a", "b")


def test_a_language_model_goes_on(language_model: Path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 w4 w5\n"))
    assert said(capsys, language_model, "--max-new-tokens", 4) == "w3 w4 w5w6 w7 w8 w9\n"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (
            ["nowhere", "ROWS"],
            "no task.json and no config.json; expected the folder --out of a run of sprand finetune that has ended",
        ),
        (["RUN", "ROWS", "--text-column", "body"], "no column 'body', only 'text', 'label'. Name it with --text-column"),
        (["RUN", "ROWS", "--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["RUN", "missing.tsv"], "cannot be read: No such file"),
    ],
)
def test_what_is_wrong_is_said(classifier: Path, rows: Path, capsys, arguments: list[str], what: str):
    places = {"RUN": str(classifier), "ROWS": str(rows)}
    assert main.run(["predict", *(places.get(word, word) for word in arguments)]) == 2
    assert what in capsys.readouterr().err


def test_no_text_is_no_silent_success(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n  \n"))
    with pytest.raises(CliError, match="There is no text; give a file, or a text a line on standard input"):
        predict.texts_of("-")
