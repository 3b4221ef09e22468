"""Which shape the rows of a table have, by the names of its columns, and what an example is in each shape."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from .. import CliError
from .rows import Example, Message
from .settings import CLASSIFIERS, Settings
from .tables import Row, Table, check_columns, listed, text_of

CONVERSATIONS = ("messages", "conversations", "conversation")
LABELS = ("label", "labels")
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool",
    "function": "tool", **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}  # fmt: skip


class Shape:
    """How a table's rows become examples.

    Args:
        table: where the rows are.
        columns: the option that names each column that is used, and its name; None for one that is not used.
    """

    task = "causal-lm"

    def __init__(self, table: Table, columns: Mapping[str, str | None]) -> None:
        self.table, self.columns = table, list(columns.values())
        check_columns(table.name, table.columns, columns)

    def examples(self) -> Iterator[Example]:
        """The rows, one after the other.

        Raises:
            CliError: A row cannot be used; its number and the column are said.
        """
        for number, row in enumerate(self.table.rows, 1):
            yield self.example(Cells(row, f"{self.table.name}, row {number}"))

    def example(self, cells: Cells) -> Example:
        """What a row holds."""
        raise NotImplementedError


class Cells:
    """One row: its values by column, or a sentence on what is wrong with them."""

    def __init__(self, row: Row, place: str) -> None:
        self.row, self.place = row, place

    def text(self, column: str, may_be_blank: bool = True) -> str:
        """The text of a column, that of a number included.

        Raises:
            CliError: It is missing, or no text.
        """
        value = self.row.get(column)
        if isinstance(value, (list, dict)):
            raise CliError(f"{self.place}: the column {column!r} holds a {type(value).__name__}; expected text.")
        text = text_of(value)
        if text is None or not (may_be_blank or text.strip()):
            raise CliError(f"{self.place}: the column {column!r} is empty.")
        return text

    def turns(self, column: str) -> list[Message] | None:
        """The turns that a column holds, also as JSON; None where it holds something else.

        Raises:
            CliError: A turn is of nobody that is known, or holds no text.
        """
        value = self.row.get(column)
        value = value if isinstance(value, dict) else _list_of(value)
        if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
            value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
        turns = [value] if isinstance(value, dict) else value
        if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
            return None
        return [self._turn(_without_none(turn)) for turn in turns]

    def _turn(self, turn: Row) -> Message:
        """A turn with its role and text as chat templates take them; what else it has stays."""
        others = {name: value for name, value in turn.items() if name not in ("role", "from", "content", "value")}
        said_by = turn.get("role", turn.get("from"))
        role = ROLES.get(str(said_by).lower())
        if role is None:
            raise CliError(f"{self.place}: a turn of {said_by!r}; expected one of {', '.join(ROLES)}.")
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(part["text"] for part in content)
        if content is None and role == "assistant" and others:
            content = ""
        if not isinstance(content, str):
            raise CliError(f"{self.place}: a turn of {said_by!r} holds no text.")
        return {"role": role, "content": content, **others}


class Labelled(Shape):
    """A text, or a pair, and its class."""

    task = "classification"

    def example(self, cells: Cells) -> Example:
        text, second, label = self.columns
        first = cells.text(text, may_be_blank=False)
        return Example(first, cells.text(second) if second else None, **self.label(cells, label))

    def label(self, cells: Cells, column: str) -> dict[str, Any]:
        """The fields of an example that a label fills."""
        return {"label": cells.text(column, may_be_blank=False)}


class SeveralLabels(Labelled):
    """A text, or a pair, and the list of its classes, which may be empty."""

    task = "multi-label"

    def label(self, cells: Cells, column: str) -> dict[str, Any]:
        labels = _list_of(cells.row.get(column))
        if labels is None or not all(text_of(label) for label in labels):
            raise CliError(f"{cells.place}: the column {column!r} holds no list of labels.")
        return {"labels": [str(text_of(label)) for label in labels]}


class Numbers(Labelled):
    """A text, or a pair, and a number."""

    task = "regression"

    def label(self, cells: Cells, column: str) -> dict[str, Any]:
        text = cells.text(column, may_be_blank=False)
        try:
            is_number = math.isfinite(float(text))
        except ValueError:
            is_number = False
        if not is_number:
            raise CliError(f"{cells.place}: the column {column!r} holds {text!r}; expected a number.")
        return {"label": text}


class Conversations(Shape):
    """Turns of `role` and `content`, or of `from` and `value`."""

    def example(self, cells: Cells) -> Example:
        (column,) = self.columns
        messages = cells.turns(column)
        if messages is None:
            raise CliError(f"{cells.place}: the column {column!r} holds no list of turns.")
        system = cells.row.get("system")
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return Example(messages=messages, tools=_tools(cells.row))


class Prompts(Shape):
    """A prompt and its completion: two texts, or turns of a conversation, of which the completion's are learned."""

    def example(self, cells: Cells) -> Example:
        prompt, completion = self.columns
        before, after = cells.turns(prompt), cells.turns(completion)
        if before is None and after is None:
            return Example(cells.text(prompt, may_be_blank=False), cells.text(completion))
        if before is None or after is None:
            raise CliError(f"{cells.place}: expected two texts or two lists of turns in {prompt!r} and {completion!r}, got one.")
        given = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in before]
        return Example(messages=[*given, *after], tools=_tools(cells.row))


class Instructions(Shape):
    """An instruction with or without an input, and the output, as in Alpaca's data."""

    def example(self, cells: Cells) -> Example:
        instruction, given, output = self.columns
        asked = cells.text(instruction, may_be_blank=False)
        more = text_of(cells.row.get(given)) if given else None
        question, answer = f"{asked}\n\n{more}" if more else asked, cells.text(output)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Example(question, answer, messages=messages)


class Texts(Shape):
    """Texts to learn as they are."""

    def example(self, cells: Cells) -> Example:
        return Example(cells.text(self.columns[0], may_be_blank=False))


def recognised(table: Table, settings: Settings) -> Shape:
    """The shape of a table's rows, by the options, or else by the names of the columns.

    Raises:
        CliError: It has none that is known, or a column is missing.
    """
    columns = table.columns
    label = settings.label_column or next((name for name in LABELS if name in columns), LABELS[0])
    if settings.task in CLASSIFIERS or settings.label_column or settings.text2_column:
        return _labelled(table, settings, label)
    messages = settings.messages_column or next((name for name in CONVERSATIONS if name in columns), None)
    if messages:
        return Conversations(table, {"--messages-column": messages})
    if settings.prompt_column or settings.completion_column or {"prompt", "completion"} <= {*columns}:
        prompt, completion = settings.prompt_column or "prompt", settings.completion_column or "completion"
        return Prompts(table, {"--prompt-column": prompt, "--completion-column": completion})
    if {"instruction", "output"} <= {*columns}:
        given = "input" if "input" in columns else None
        return Instructions(table, {"--prompt-column": "instruction", "": given, "--completion-column": "output"})
    if label in columns and settings.task == "auto":
        return _labelled(table, settings, label)
    text = settings.text_column or "text"
    has_text = settings.text_column or text in columns
    if has_text and (settings.task == "causal-lm" or not table.delimited or len(columns) == 1):
        return Texts(table, {"--text-column": text})
    if has_text:
        return _labelled(table, settings, label)
    raise CliError(
        f"{table.name}: expected messages, conversations, prompt and completion, instruction and output, text, or text and "
        f"label, got the columns {listed(columns)}. Name them with --messages-column, --prompt-column and --completion-column, "
        "--text-column, or --text-column and --label-column."
    )


def _labelled(table: Table, settings: Settings, label: str) -> Labelled:
    second = settings.text2_column or ("text2" if "text2" in table.columns else None)
    text = settings.text_column or "text"
    has_lists = isinstance(table.peek()[0].get(label), list)
    task = settings.task if settings.task in CLASSIFIERS else "multi-label" if has_lists else "classification"
    kind = next(kind for kind in (Labelled, SeveralLabels, Numbers) if kind.task == task)
    return kind(table, {"--text-column": text, "--text2-column": second, "--label-column": label})


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _tools(row: Row) -> list[Any] | None:
    """What a conversation may call, also as JSON."""
    return _without_none(_list_of(row.get("tools"))) or None


def _list_of(value: Any) -> list[Any] | None:
    """A list, also as JSON; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def _without_none(value: Any) -> Any:
    """A value without the fields that are null: Arrow has the fields of all rows in each."""
    if isinstance(value, dict):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value
