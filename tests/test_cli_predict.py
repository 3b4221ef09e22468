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
from sprand.cli.finetune import asking
from tiny_models import WORDS, save_llama

OF_A, OF_B = " ".join(WORDS[-6:]), " ".join(WORDS[:6])


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
    texts = [OF_B, OF_A]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(texts) + "\n"))
    lines = [line.split("\t") for line in said(capsys, classifier).splitlines()]
    assert [line[0] for line in lines] == ["b", "a"] and [line[2] for line in lines] == texts
    tuned = predict.load_run(classifier)
    before = tuned.probabilities(texts)
    sprand.merge(tuned.model)
    assert torch.equal(tuned.probabilities(texts), before) and tuned.labels == ("a", "b")


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


def test_a_table_keeps_its_rows_and_columns(classifier: Path, tmp_path, capsys):
    rows = [["id", "text", "note"], ["007", OF_B, 'say "hi",\nshe'], ["1e5", OF_A, ""], ["x", OF_B, "NA"]]
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert (
        said(capsys, classifier, tmp_path / "in.csv", "-o", tmp_path / "out.csv") == f"written: {tmp_path / 'out.csv'}, 3 rows\n"
    )
    with (tmp_path / "out.csv").open(newline="") as file:
        written = list(csv.reader(file))
    assert [row[:3] for row in written] == rows and written[0][3:] == ["label", "probability_a", "probability_b"]
    assert [row[3] for row in written[1:]] == ["b", "a", "b"] and written[1][3:] == written[3][3:]
    assert all(float(row[4]) + float(row[5]) == pytest.approx(1, abs=1e-5) for row in written[1:])
    said(capsys, classifier, tmp_path / "in.csv", "-o", tmp_path / "out.jsonl")
    objects = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [[row["id"], row["text"], row["note"], row["label"]] for row in objects] == [row[:4] for row in written[1:]]
    assert list(objects[0]["probabilities"]) == ["a", "b"]


def test_rows_of_json_keep_their_types_and_a_label_of_theirs(classifier: Path, tmp_path, capsys):
    rows = [{"text": OF_B, "label": "a", "deep": {"n": [1, 2.5, None]}, "id": 7}, {"text": f"{OF_A} é", "extra": True}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said(capsys, classifier, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in old} for row, old in zip(written, rows, strict=True)] == rows
    assert [row["predicted_label"] for row in written] == ["b", "a"]
    said(capsys, classifier, tmp_path / "in.jsonl", "-o", tmp_path / "out.tsv")
    lines = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert lines[0][:5] == ["text", "label", "deep", "id", "extra"] and lines[1][:5] == [
        OF_B,
        "a",
        json.dumps(rows[0]["deep"]),
        "7",
        "",
    ]


def test_prompts_of_a_table_get_completions(language_model: Path, tmp_path, capsys):
    rows = [{"prompt": "w3 w4 w5", "completion": "w9", "id": 1}, {"prompt": "w20 w21", "id": 2}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said(capsys, language_model, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--max-new-tokens", 3, "--batch-size", 1)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["predicted_completion"] for row in written] == ["w6 w7 w8", "w22 w23 w24"] and written[0]["completion"] == "w9"


def test_conversations_are_answered_at_their_end_through_the_template(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    base = save_llama(tmp_path / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ {'user': 'w30', 'assistant': 'w31'}[turn.role] }} {{ turn.content }} [SEP] {% endfor %}"
        "{% if add_generation_prompt %}w31 {% endif %}"
    )
    tokenizer.save_pretrained(base)
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(12)))
    run = tmp_path / "run"
    asked = ["--model", base, "--train", tmp_path / "chats.jsonl", "--out", run, "--density", 0.3, "--max-steps", 8, "--lr", 0.02]
    assert main.run(["finetune", *map(str, asked)]) == 0
    longer = [*turns, {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w9"}]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in (turns[:1], longer)))
    said(capsys, run, tmp_path / "new.jsonl", "-o", tmp_path / "out.jsonl", "--max-new-tokens", 5)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    tuned = predict.load_run(run)
    model = sprand.merge(tuned.model)
    for row, asked in zip(written, (turns[:1], longer[:3]), strict=True):
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        expected = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        assert row["completion"] == tokenizer.decode(expected[0, prompt.shape[1] :], skip_special_tokens=True)
    assert tuned.continuation("w1", 5) == written[0]["completion"]


def test_a_run_on_pairs_asks_for_pairs(bert: Path, tmp_path, capsys, monkeypatch):
    lines = ["text\ttext2\tlabel", *(f"w{i}\tw{i + 1 - i % 2}\t{i % 2}" for i in range(30))]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    asked = ["--model", bert, "--train", tmp_path / "pairs.tsv", "--out", tmp_path / "run", "--max-steps", 1]
    assert main.run(["finetune", *map(str, asked)]) == 0
    assert len(said(capsys, tmp_path / "run", tmp_path / "pairs.tsv").splitlines()) == 30
    monkeypatch.setattr("sys.stdin", io.StringIO("w1\n"))
    assert main.run(["predict", str(tmp_path / "run")]) == 2
    assert "the model was trained on pairs of texts" in capsys.readouterr().err
    (tmp_path / "single.tsv").write_text("text\nw1\n")
    assert main.run(["predict", str(tmp_path / "run"), str(tmp_path / "single.tsv")]) == 2
    assert "no column 'text2', only 'text'. Name it with --text2-column" in capsys.readouterr().err


def test_what_cannot_be_written_leaves_nothing(classifier: Path, language_model: Path, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"text": "w1", "note": "two\tparts"}) + "\n" + json.dumps({"text": None}) + "\n"
    )
    (tmp_path / "tab.jsonl").write_text(json.dumps({"text": "w1", "note": "two\tparts"}) + "\n")
    cases = [
        ((classifier, "in.jsonl", "-o", "out.csv"), "row 2: the column 'text' is empty"),
        ((classifier, "tab.jsonl", "-o", "out.tsv"), "row 1 holds a tab or a line break, which TSV cannot"),
        ((classifier, "tab.jsonl", "-o", "out.xlsx"), "out.xlsx: expected a file .csv, .tsv, .jsonl"),
        ((language_model, "tab.jsonl", "-o", "out.tsv"), "completions have line breaks, which TSV cannot hold"),
        ((classifier, "tab.jsonl", "-o", "none/out.csv"), "No such file or directory"),
    ]
    for (run, file, flag, out), expected in cases:
        assert main.run(["predict", str(run), str(tmp_path / file), flag, str(tmp_path / out)]) == 2
        assert expected in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "tab.jsonl"]


def test_no_text_is_no_silent_success(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n  \n"))
    with pytest.raises(CliError, match="There is no text; give a file, or a text a line on standard input"):
        asking.read("-")
