"""Questions with a number for an answer: reads MetaMathQA and GSM8K, finds the number in a text, and counts right ones."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

VALID_ROWS = 50
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")  # the first that occurs


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its worked answer."""

    query: str
    response: str


def load(train: Path | None, valid: Path | None, test: Path | None) -> tuple[list[Question], list[Question], list[Question]]:
    """Training, validation and test questions: of JSONL files, or of the data sets of the comparison by the datasets package.

    Raises:
        ValueError: a row has neither `query` and `response` nor `question` and `answer`.
    """
    parts = [_questions(_lines(path)) if path else [] for path in (train, valid, test)]
    if not train:
        parts[0] = _questions(_hub("meta-math/MetaMathQA")["train"])
    if not valid or not test:
        gsm8k = _hub("openai/gsm8k", "main")
        parts[1] = parts[1] or [_questions(gsm8k["train"])[i] for i in _valid_rows(len(gsm8k["train"]))]
        parts[2] = parts[2] or _questions(gsm8k["test"])
    return parts[0], parts[1][:VALID_ROWS], parts[2]


def accuracy(texts: Sequence[str], questions: Sequence[Question]) -> float:
    """The share of texts that end in the number of the worked answer.

    Raises:
        ValueError: a worked answer has no number that can be found.
    """
    right = 0
    for text, question in zip(texts, questions, strict=True):
        wanted, said = answer_of(question.response), answer_of(text)
        if wanted is None:
            raise ValueError(f"expected a worked answer with one of {', '.join(map(repr, MARKS))}, got {question.response!r}")
        right += said is not None and _value(said) == _value(wanted)
    return right / max(1, len(questions))


def answer_of(text: str) -> str | None:
    """What follows the last mark on its line, without dollar and percent signs and full stops; None where there is no mark."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    return None if mark is None else text.rpartition(mark)[2].strip().split("\n")[0].strip(" .!?$%")


def _value(answer: str) -> float | str:
    """The number an answer stands for, fractions worked out; the text itself where it is none."""
    above, slash, below = answer.partition("/")
    try:
        return float(Fraction(above.strip()) / Fraction(below.strip()) if slash else Fraction(answer))
    except (ValueError, ZeroDivisionError):
        return answer


def _questions(rows: Iterable[Mapping[str, str]]) -> list[Question]:
    found = []
    for row in rows:
        names = next((pair for pair in (("query", "response"), ("question", "answer")) if set(pair) <= set(row)), None)
        if names is None:
            raise ValueError(f"expected query and response, or question and answer, got {', '.join(row)}")
        found.append(Question(row[names[0]], row[names[1]]))
    return found


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _hub(*name: str) -> Mapping[str, Sequence[Mapping[str, str]]]:
    return importlib.import_module("datasets").load_dataset(*name)


def _valid_rows(count: int) -> list[int]:
    """The rows that the comparison takes."""
    numpy = importlib.import_module("numpy")
    numpy.random.seed(0)
    order = numpy.arange(count)
    numpy.random.shuffle(order)
    return order[:VALID_ROWS].tolist()
