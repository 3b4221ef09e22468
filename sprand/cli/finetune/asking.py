"""Rows without their answers: what of them a model is asked, put as the rows that it was trained on."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from .. import CliError
from .encoding import Encoder
from .generation import last_prompt_of
from .models import NO_LIMIT
from .rows import Example, Message
from .settings import Settings
from .shapes import CONVERSATIONS, Cells, Shape, recognised
from .sources import sources
from .tables import Row, Table, check_columns, read_text

PLACEHOLDER = "x"  # stands for the answer
ANSWER: Message = {"role": "assistant", "content": PLACEHOLDER}


@dataclasses.dataclass(frozen=True)
class Questions:
    """Rows of a table, or the lines of a text.

    Attributes:
        name: of the file, for what is said about it.
        rows: as they are read; a line has the column `text`.
        is_plain: whether these are lines of a text.
    """

    name: str
    rows: list[Row]
    is_plain: bool = False

    @property
    def columns(self) -> list[str]:
        """Of all rows, in their order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def read(file: str) -> Questions:
    """The rows of a file, of any kind that `finetune` reads, or the lines of standard input, which is "-".

    Raises:
        CliError: It cannot be read, or holds no row.
    """
    if file == "-":
        content = sys.stdin.read()
    else:
        source, *more = sources(file, "eval")
        if more:
            raise CliError(f"{file}: expected one file, got {1 + len(more)}.")
        if isinstance(source, Table):
            return Questions(source.name, list(source.rows))
        content = read_text(source)
    rows: list[Row] = [{"text": line} for line in content.splitlines() if line.strip()]
    if not rows:
        raise CliError("There is no text; give a file, or a text a line on standard input.")
    return Questions(file, rows, is_plain=True)


def texts(questions: Questions, settings: Settings, kind: str) -> list[Example]:
    """What a classifier is asked: a text of each row, or a pair.

    Raises:
        CliError: A column or a text is missing.
    """
    if questions.is_plain and kind == "pairs":
        raise CliError(f"{questions.name}: the model was trained on pairs of texts; expected a table with text and text2.")
    first, columns = settings.text_column or "text", questions.columns
    if questions.is_plain:
        return [Example(row["text"]) for row in questions.rows]
    second = settings.text2_column or ("text2" if kind == "pairs" else None)
    check_columns(questions.name, columns, {"--text-column": first, "--text2-column": second})
    cells = [Cells(row, f"{questions.name}, row {number}") for number, row in enumerate(questions.rows, 1)]
    return [Example(row.text(first, may_be_blank=False), row.text(second) if second else None) for row in cells]


def examples(questions: Questions, settings: Settings, kind: str) -> list[Example]:
    """What a language model is asked: examples with a placeholder for the answer.

    Args:
        questions: a conversation is answered at its end; a last turn of the assistant is what it would be compared with.
        settings: name the columns.
        kind: what lines of a text, and texts, are put as.

    Raises:
        CliError: A column is missing, or a row cannot be used.
    """
    if questions.is_plain:
        return [as_row(row["text"], kind) for row in questions.rows]
    columns, answer = questions.columns, _answer_column(questions.columns, settings)
    rows = questions.rows if answer is None else [_with_answer(row, answer, settings) for row in questions.rows]
    table = Table(questions.name, list(dict.fromkeys([*columns, *([answer] if answer else [])])), rows)
    shape = recognised(table, dataclasses.replace(settings, task="causal-lm"))
    return [_to_answer(example, kind, shape) for example in shape.examples()]


def as_row(text: str, kind: str) -> Example:
    """A question as a row of a kind."""
    messages = [{"role": "user", "content": text}, ANSWER] if kind in ("conversations", "instructions") else None
    return Example("" if kind == "conversations" else text, None if kind == "conversations" else PLACEHOLDER, messages=messages)


def prompts(questions: Sequence[Example], tokenizer: Any, chat: bool) -> list[list[int]]:
    """The tokens that a model is asked with.

    Raises:
        CliError: A conversation does not fit the chat template, or there is none.
    """
    return [last_prompt_of(row) for row in Encoder(tokenizer, NO_LIMIT, chat)(questions)]


def _answer_column(columns: Sequence[str], settings: Settings) -> str | None:
    """The column of the answers, whether it is there or not; None where rows have none."""
    if settings.messages_column or any(name in columns for name in CONVERSATIONS):
        return None
    if settings.prompt_column or settings.completion_column or "prompt" in columns:
        return settings.completion_column or "completion"
    return "output" if "instruction" in columns else None


def _with_answer(row: Row, column: str, settings: Settings) -> Row:
    turns = Cells(row, "").turns(settings.prompt_column or "prompt")
    return row | {column: PLACEHOLDER if turns is None else [ANSWER]}


def _to_answer(example: Example, kind: str, shape: Shape) -> Example:
    """An example that ends with the placeholder."""
    if example.messages is None:
        return example if example.text2 is not None else as_row(example.text, kind)
    if example.text2 is not None:
        return example
    messages = list(example.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise CliError(f"{shape.table.name}: a conversation holds nothing but answers; expected a turn of the user.")
    return dataclasses.replace(example, messages=[*messages, ANSWER])
