"""Conversations through a model's chat template: their tokens, and which of them are the assistant's."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import TemplateError

from .. import CliError, require
from ..files import reason_of
from .rows import Example, Message

MARKED = re.compile(r"\{%-?\s*generation\b")
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
Span = tuple[int, int]


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        ends: tokens of their own, one of which ends a turn.
        replaced: how many conversations went through TRL's training template instead, since the tokenizer's own renders a turn
            otherwise once others follow.

    Raises:
        CliError: It has none, or does not tell where in a text its tokens are.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.replaced = tokenizer, 0
        if not tokenizer.chat_template:
            raise CliError(
                f"{tokenizer.name_or_path}: its tokenizer has no chat template, which conversations need. Take a model that was "
                "tuned to chat, or give texts in columns prompt and completion."
            )
        if not tokenizer.is_fast:
            raise CliError(f"{tokenizer.name_or_path}: conversations need a tokenizer with a file tokenizer.json.")
        self.ends = tuple(map(str, tokenizer.added_tokens_decoder.values()))

    def encoded(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], list[bool]]]:
        """Of each conversation, its tokens, and whether each of them is learned: those of the assistant, to the end of its turn.

        Raises:
            CliError: The template refuses a conversation, or renders a turn otherwise once others follow.
        """
        rendered = [self._rendered(example) for example in examples]
        texts = [conversation.text for conversation in rendered]
        found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for conversation, tokens, places in zip(rendered, found["input_ids"], found["offset_mapping"], strict=True):
            yield tokens, conversation.learned(places)

    def _rendered(self, example: Example) -> Rendered:
        """A conversation by the tokenizer's own template, or where that does not do by TRL's."""
        try:
            return Rendered(self, example, self.tokenizer.chat_template)
        except CliError:
            if self._known is None:
                raise
        conversation = Rendered(self, example, self._known)
        self.replaced += 1
        return conversation

    @functools.cached_property
    def _known(self) -> str | None:
        """TRL's training template, where it knows the tokenizer's: the same, but a turn stays as it is once others follow."""
        try:
            return require("trl.chat_template_utils").get_training_chat_template(self.tokenizer)
        except (CliError, ValueError, TypeError, TemplateError):
            return None


class Rendered:
    """A conversation as the text that a chat template makes of it.

    Args:
        owner: whose tokenizer it is for.
        example: the conversation.
        template: that of the tokenizer, or another.

    Attributes:
        text: with an end token, where the assistant speaks last and the template has none.

    Raises:
        CliError: The template refuses the conversation, or renders a turn otherwise once others follow.
    """

    def __init__(self, owner: ChatTemplate, example: Example, template: Any) -> None:
        self.tokenizer = tokenizer = owner.tokenizer
        self.example = example
        self._options = {"tools": example.tools, "chat_template": None if template == tokenizer.chat_template else template}
        self._is_marked = bool(MARKED.search(str(template)))
        self.text = self._render(example.messages)
        if not all(word in self.text for turn in example.messages for word in turn["content"].split()[-1:]):
            raise self._refusal("it leaves out what is said there")
        if example.messages[-1]["role"] == "assistant" and not self.text.rstrip().endswith(owner.ends):
            self.text += tokenizer.eos_token or ""
        self._answers, self._left_out = ([] if self._is_marked else self._spans(weight=1)), self._spans(weight=0)

    def learned(self, places: Sequence[Span]) -> list[bool]:
        """Whether each token of the text is learned, by its place: what the template marks, or what is an answer."""
        if not self._is_marked:
            return _within(places, self._answers)
        options = {"return_dict": True, "return_assistant_tokens_mask": True, **self._options}
        marks = self.tokenizer.apply_chat_template(_plain(self.example.messages), **options)["assistant_masks"]
        marks += [True] * (len(places) - len(marks))
        return [bool(mark) and not inside for mark, inside in zip(marks, _within(places, self._left_out), strict=True)]

    def _spans(self, weight: int) -> list[Span]:
        """Where the assistant's turns of this weight are: from the end of the prompt for them to the end of the turn."""
        messages, spans = self.example.messages, []
        for i, turn in enumerate(messages):
            if turn["role"] != "assistant" or bool(turn.get("weight", 1)) != bool(weight):
                continue
            start = self._begin(messages[:i])
            end = len(self.text) if i + 1 == len(messages) else self._end(messages[: i + 1])
            spans.append((start, end))
        return spans

    def _begin(self, before: Sequence[Message]) -> int:
        """Where the answer to these turns begins: what a model that is asked for it is given ends there."""
        asked = self._render(before, add_generation_prompt=True)
        if self.text.startswith(asked):
            return len(asked)
        end = self._end(before) if before else len(asked)
        alike = zip(asked, self.text[: len(asked)], strict=False)
        return max(end, next((i for i, (a, b) in enumerate(alike) if a != b), len(self.text)))

    def _end(self, turns: Sequence[Message]) -> int:
        """Where the last of these turns ends."""
        begun = self._render(turns)
        for shown in (begun, begun.removesuffix(self.tokenizer.eos_token or "")):
            if self.text.startswith(shown):
                return len(shown)
        raise self._refusal("it renders a turn otherwise once others follow")

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(_plain(messages), tokenize=False, **self._options, **options)
        except Exception as error:  # a template raises what it likes
            raise self._refusal(reason_of(error)) from None

    def _refusal(self, reason: str) -> CliError:
        begin = self.example.messages[0]["content"][:60]
        return CliError(f"The chat template does not fit the conversation that begins {begin!r}: {reason}.")


def _plain(messages: Sequence[Message]) -> list[Message]:
    return [{name: value for name, value in turn.items() if name != "weight"} for turn in messages]


def _within(places: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token, by its place in the text, overlaps one of the spans."""
    begins, ends = ([place[side] for place in places] for side in (0, 1))
    inside = [False] * len(places)
    for start, stop in spans:
        first, last = bisect.bisect_right(ends, start), bisect.bisect_left(begins, stop)
        inside[first:last] = [True] * (last - first)
    return inside
