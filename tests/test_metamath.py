"""The MetaMathQA protocol: answers found in texts, rows that are learned, and runs that are not done twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tiny_models import WORDS, save_llama


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Two and two. The answer is: 4.", "4"),
        ("He pays $5.\n#### 1200", "1200"),
        ("The answer is: 3\nThe answer is: $\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("The final answer is: 50%\nNext question", "50"),
        ("no number", None),
    ],
)
def test_the_answer_in_a_text(quality: None, text: str, answer: str | None) -> None:
    from quality.math_answers import answer_of

    assert answer_of(text) == answer


def test_numbers_are_compared_as_numbers(quality: None) -> None:
    from quality.math_answers import Question, accuracy

    asked = [Question("", f"#### {n}") for n in ("0.5", "7", "x + 1", "8", "9")]
    said = ["The answer is: 20/40", "The answer is: 7.0", "The answer is: x + 1", "The answer is: 1/0", "nine"]
    assert accuracy(said, asked) == 3 / 5
    with pytest.raises(ValueError, match="worked answer"):
        accuracy(["#### 1"], [Question("", "one")])


@pytest.fixture
def math_files(tmp_path: Path) -> list[str]:
    rows = [
        {"query": " ".join(WORDS[i : i + 3]), "response": " ".join(WORDS[i : i + 5]) + " The answer is: 7"} for i in range(20)
    ]
    rows.append({"query": "w0 " * 600, "response": "w1 The answer is: 1"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tests = [{"question": "w1 w2", "answer": "w3\n#### 7"}, {"question": "w4", "answer": "#### 8"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, tests)))
    (tmp_path / "old.txt").write_text(" ".join(WORDS))
    save_llama(tmp_path / "tiny")
    files = {"--train": "train.jsonl", "--valid": "test.jsonl", "--test": "test.jsonl", "--old": "old.txt", "--model": "tiny"}
    sizes = ["--max-length", "32", "--rank", "2", "--steps", "12", "--eval-every", "6", "--calibration", "2"]
    places = [part for option, name in files.items() for part in (option, str(tmp_path / name))]
    return [*places, *sizes, "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path / "out")]


def test_metamath_trains_each_method_and_does_nothing_twice(
    quality: None, math_files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quality import metamath

    methods = ["random", "gradient", "lora", "shira", "full", "untrained"]
    assert metamath.main([*math_files, "--lr", "0.01", "--methods", *methods]) == 0
    with (tmp_path / "out" / "metamath.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == methods
    assert len({rows[name]["trained"] for name in ("random", "gradient", "lora", "shira")}) == 1
    for name in methods[:-1]:
        assert float(rows[name]["old_after"]) != float(rows[name]["old_before"])
        assert 0 <= float(rows[name]["test"]) <= 1 and 0 <= float(rows[name]["valid"]) <= 1
    assert rows["untrained"]["old_after"] == rows["untrained"]["old_before"]
    monkeypatch.setattr(metamath, "run", lambda *_: pytest.fail("it ran again"))
    assert metamath.main([*math_files, "--lr", "0.01", "--methods", *methods]) == 0


def test_metamath_learns_the_text_and_one_end_token(quality: None) -> None:
    from quality.metamath import batch_of

    batch = batch_of([[5, 6, 7, 8, 9], [5, 6]], pad=3)
    assert batch["labels"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 3, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]


def test_metamath_leaves_out_long_rows(
    quality: None, math_files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quality import metamath

    seen = []
    batches = metamath.batches
    monkeypatch.setattr(metamath, "batches", lambda rows, *rest: seen.append(len(rows)) or batches(rows, *rest))
    metamath.main([*math_files, "--methods", "random"])
    assert set(seen) == {20}
