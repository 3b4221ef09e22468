"""Conversations through a model's chat template: their tokens, and which of them are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .. import CliError
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

    Raises:
        CliError: It has none, or does not tell where in a text its tokens are.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise CliError(
                f"{tokenizer.name_or_path}: its tokenizer has no chat template, which conversations need. Take a model that was "
                "tuned to chat, or give texts in columns prompt and completion."
            )
        if not tokenizer.is_fast:
            raise CliError(f"{tokenizer.name_or_path}: conversations need a tokenizer with a file tokenizer.json.")
        self._marks_answers = bool(MARKED.search(str(tokenizer.chat_template)))
        self._ends = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)

    def encoded(self, examples: Sequence[Example]) -> Iterable[tuple[list[int], list[bool]]]:
        """Of each conversation, its tokens, and whether each of them is learned: those of the assistant, to the end of its turn.

        Raises:
            CliError: The template refuses a conversation, or renders a turn otherwise once others follow.
        """
        texts = [self._rendered(example, example.messages) for example in examples]
        found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for example, text, tokens, places in zip(examples, texts, found["input_ids"], found["offset_mapping"], strict=True):
            if self._marks_answers:
                learned, left_out = self._marked(example), self._spans(example, text, weight=0)
                learned = [mark and not inside for mark, inside in zip(learned, _within(places, left_out), strict=True)]
            else:
                learned = _within(places, self._spans(example, text, weight=1))
            yield tokens, learned

    def _spans(self, example: Example, text: str, weight: int) -> list[Span]:
        """Where the assistant's turns of this weight are: from the end of the prompt for them to the end of the turn."""
        messages, spans = example.messages, []
        for i, turn in enumerate(messages):
            if turn["role"] != "assistant" or bool(turn.get("weight", 1)) != bool(weight):
                continue
            asked = self._rendered(example, messages[:i], add_generation_prompt=True)
            start = _shared(asked, text)
            end = self._end(example, text, i)
            if start < (self._end(example, text, i - 1) if i else len(asked)):
                raise self._refusal(example, "it renders what is before an answer otherwise once the answer follows")
            spans.append((start, end))
        return spans

    def _end(self, example: Example, text: str, turn: int) -> int:
        """Where a turn ends, without the white space after an end token, which no model has to write."""
        begun = self._rendered(example, example.messages[: turn + 1])
        if not text.startswith(begun):
            raise self._refusal(example, "it renders a turn otherwise once others follow")
        stripped = begun.rstrip()
        return len(stripped if self._ends and stripped.endswith(self._ends) else begun)

    def _marked(self, example: Example) -> list[bool]:
        """The tokens that a template with `{% generation %}` marks."""
        messages = [_plain(turn) for turn in example.messages]
        options = {"tools": example.tools, "return_dict": True, "return_assistant_tokens_mask": True}
        return list(map(bool, self.tokenizer.apply_chat_template(messages, **options)["assistant_masks"]))

    def _rendered(self, example: Example, messages: Sequence[Message], **options: Any) -> str:
        plain = [_plain(turn) for turn in messages]
        try:
            return self.tokenizer.apply_chat_template(plain, tools=example.tools, tokenize=False, **options)
        except Exception as error:  # a template raises what it likes
            raise self._refusal(example, reason_of(error)) from None

    def _refusal(self, example: Example, reason: str) -> CliError:
        begin = example.messages[0]["content"][:60]
        return CliError(f"The chat template does not fit the conversation that begins {begin!r}: {reason}.")


def _plain(turn: Message) -> Message:
    return {name: value for name, value in turn.items() if name != "weight"}


def _shared(begun: str, text: str) -> int:
    """How many characters two texts begin with alike."""
    if text.startswith(begun):
        return len(begun)
    return next((i for i, (a, b) in enumerate(zip(begun, text, strict=False)) if a != b), min(len(begun), len(text)))


def _within(places: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token, by its place in the text, overlaps one of the spans."""
    return [any(begin < stop and start < end for start, stop in spans) for begin, end in places]
