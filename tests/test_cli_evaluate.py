"""`sprand evaluate`: on the held-out rows the numbers of the run come again; on others those of what `predict` says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sprand.cli import main
from tiny_models import save_llama, save_rows

transformers = pytest.importorskip("transformers")
pytest.importorskip("sklearn")


def run(*arguments: object) -> int:
    return main.run([*map(str, arguments)])


def evaluated(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert run("evaluate", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return save_rows(tmp_path_factory.mktemp("held-out") / "eval.tsv", 40)


@pytest.fixture(scope="module")
def classifier(bert, rows, held_out, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "classifier"
    asked = ("--model", bert, "--train", rows, "--eval", held_out, "--out", out, "--density", 0.2, "--lr", 0.01, "--epochs", 4)
    assert run("finetune", *asked) == 0
    return out


@pytest.fixture(scope="module")
def asked_for_words(tmp_path_factory) -> tuple[Path, Path]:
    """A run on questions and answers in columns of other names, and its held-out rows."""
    folder = tmp_path_factory.mktemp("words")
    rows = [{"question": f"w{i % 8} w{i % 5}", "answer": f"w30 w{i % 5 + 1}", "id": i} for i in range(40)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--model", save_llama(folder / "llama"), "--train", file, "--eval", file, "--out", folder / "run", "--density", 0.5)
    asked = (*asked, "--prompt-column", "question", "--completion-column", "answer", "--lr", 0.02, "--epochs", 40)
    assert run("finetune", *asked, "--score", "exact", "--answer-pattern", "w30 (.*)", "--max-new-tokens", 4) == 0
    return folder / "run", file


def result_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())["results"][0]


def test_the_numbers_of_a_classifiers_run_come_again(classifier, held_out, bert, tmp_path, capsys):
    said, row = evaluated(capsys, classifier, held_out, "--base"), result_of(classifier)
    for part, before in (("base", "before"), ("tuned", "after")):
        expected = dict(row[before])
        majority = expected.pop("majority_accuracy")
        numbers = dict(said[part]["numbers"])
        assert numbers.pop("majority_accuracy") >= majority  # of the file itself, not of the training rows
        assert numbers == pytest.approx(expected, rel=1e-5)
        assert said[part]["shown"]["confusion"] == row["shown"][before]["confusion"]
    assert run("merge", bert, classifier, tmp_path / "merged") == 0
    assert evaluated(capsys, tmp_path / "merged", held_out)["tuned"] == said["tuned"]


def test_rows_of_one_class_are_scored_as_predict_classifies_them(classifier, held_out, tmp_path, capsys):
    with held_out.open() as file:
        ones = [row for row in csv.DictReader(file, delimiter="\t") if row["label"] == "a"]
    table = tmp_path / "ones.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["label", "text"])
        writer.writeheader()
        writer.writerows(ones)
    said = evaluated(capsys, classifier, table)
    assert run("predict", classifier, table, "-o", tmp_path / "said.csv") == 0
    with (tmp_path / "said.csv").open(newline="") as file:
        predicted = [row["predicted_label"] for row in csv.DictReader(file)]
    assert said["rows"] == len(ones) == len(predicted)
    assert said["tuned"]["numbers"]["accuracy"] == pytest.approx(predicted.count("a") / len(ones))
    assert said["tuned"]["shown"]["confusion"] == [[predicted.count("a"), predicted.count("b")], [0, 0]]


def test_a_language_models_score_comes_again_with_the_columns_of_its_run(asked_for_words, capsys):
    place, file = asked_for_words
    said, row = evaluated(capsys, place, file, "--base"), result_of(place)
    assert said["tuned"]["numbers"] == pytest.approx(row["after"], rel=1e-4) and row["after"]["exact_match"] > 0.8
    assert said["base"]["numbers"] == pytest.approx(row["before"], rel=1e-4)
    assert said["tuned"]["shown"] == row["shown"]["after"]
    assert run("evaluate", place, file, "--score", "operator:ne", "--score-rows", 3) == 2
    assert "--answer-pattern belongs to --score exact" in capsys.readouterr().err


def test_what_is_printed(classifier, asked_for_words, held_out, capsys):
    capsys.readouterr()
    assert run("evaluate", classifier, held_out, "--base") == 0
    printed = capsys.readouterr().out
    assert "40 rows" in printed and "macro_f1" in printed and "the class they are given" in printed
    assert run("evaluate", *asked_for_words) == 0
    printed = capsys.readouterr().out
    assert "40 prompts with completions" in printed and "exact_match" in printed and "sample 3" in printed


def test_what_cannot_be_scored_is_said(classifier, asked_for_words, tmp_path, capsys, bert):
    def table(name: str, content: str) -> Path:
        (tmp_path / name).write_text(content)
        return tmp_path / name

    cases = [
        ((classifier, table("other.tsv", "text\tlabel\nw1\tc\n")), "label 'c' is not among those of the model ('a', 'b')"),
        ((classifier, table("empty.tsv", "text\tlabel\nw1\ta\nw2\t\n")), "row 2: the column 'label' is empty"),
        ((classifier, table("none.tsv", "text\tclass\nw1\ta\n")), "no column 'label'"),
        ((classifier, tmp_path / "nowhere.tsv"), "cannot be read: No such file"),
        ((classifier, table("good.tsv", "text\tlabel\nw1\ta\n"), "--score", "exact"), "--score is not for classification"),
        ((asked_for_words[0], tmp_path / "good.tsv"), "no column 'question'"),
        ((bert, tmp_path / "good.tsv"), "expected a language model or a text classifier"),
    ]
    for arguments, expected in cases:
        assert run("evaluate", *arguments) == 2
        assert expected in capsys.readouterr().err
    assert run("merge", bert, classifier, tmp_path / "merged") == 0
    assert run("evaluate", tmp_path / "merged", tmp_path / "good.tsv", "--base") == 2
    assert "is a model without an adapter" in capsys.readouterr().err
