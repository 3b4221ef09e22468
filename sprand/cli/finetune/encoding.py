"""Rows of a language model as tokens and labels: what is learned, what is cut or left out, and a sentence on that."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from .conversations import ALPACA, ChatTemplate
from .generation import IGNORED
from .rows import Example

ANSWERED = (
    ("conversations", "the assistant's", ""), ("prompts", "the completions'", " with completions"),
    ("instructions", "the outputs'", " in Alpaca's words"),
)  # fmt: skip
Encoded = dict[str, Any]


class Encoder:
    """Turns examples into rows of `input_ids` and `labels`.

    Args:
        tokenizer: of the model.
        max_length: tokens of a row.
        chat: put prompts and completions that are texts through the chat template.
        drop_long: leave out rows that are longer, rather than cut the end of their answer.

    Attributes:
        counts: of what was encoded: examples of each kind, "rows", "tokens", "learned", and rows that are "long", of
            these "cut", "late" (their answer begins later) or "dropped", and "unanswered".
    """

    def __init__(self, tokenizer: Any, max_length: int, chat: bool = False, drop_long: bool = False) -> None:
        self.tokenizer, self.max_length, self.chat, self.drop_long = tokenizer, max_length, chat, drop_long
        self.counts: collections.Counter[str] = collections.Counter()

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer)

    def __call__(self, examples: Sequence[Example]) -> Iterator[Encoded]:
        """The rows of examples.

        Raises:
            CliError: A conversation does not fit the chat template, or there is none.
        """
        for kind, group in itertools.groupby(examples, self.kind):
            of_kind = list(group)
            self.counts[kind] += len(of_kind)
            for row in getattr(self, f"_{kind}")(of_kind):
                self.counts["rows"] += 1
                self.counts["tokens"] += len(row["input_ids"])
                self.counts["learned"] += sum(label != IGNORED for label in row["labels"][1:])
                yield row

    def kind(self, example: Example) -> str:
        """How an example is encoded: "conversations", "instructions" (in Alpaca's words), "prompts" or "texts"."""
        if example.messages:
            is_framed = example.text2 is not None and not self.tokenizer.chat_template
            return "instructions" if is_framed else "conversations"
        if example.text2 is None:
            return "texts"
        return "conversations" if self.chat else "prompts"

    def _texts(self, examples: Sequence[Example]) -> Iterator[Encoded]:
        """Texts in blocks."""
        found = self.tokenizer([example.text for example in examples], verbose=False)["input_ids"]
        for example, tokens in zip(examples, found, strict=True):
            tokens = self._ended(tokens) if example.ends else tokens
            self.counts["long"] += len(tokens) > self.max_length
            for start in range(0, len(tokens), self.max_length):
                block = tokens[start : start + self.max_length]
                if len(block) > 1:
                    yield {"input_ids": block, "labels": block}

    def _prompts(self, examples: Sequence[Example], frame: str = "{}") -> Iterator[Encoded]:
        """Prompts and completions, each tokenised for itself, as a model meets them that is asked."""
        prompts = [frame.format(example.text) for example in examples]
        completions = [example.text2 for example in examples]
        asked, answers = (self.tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in (prompts, completions))
        for prompt, answer in zip(asked, answers, strict=True):
            prompt, answer = self._opening + prompt, self._ended(answer)
            yield from self._fitted(prompt + answer, [IGNORED] * len(prompt) + answer)

    def _instructions(self, examples: Sequence[Example]) -> Iterator[Encoded]:
        return self._prompts(examples, ALPACA)

    def _conversations(self, examples: Sequence[Example]) -> Iterator[Encoded]:
        examples = [example if example.messages else _as_turns(example) for example in examples]
        for tokens, learned in self.template.encoded(examples):
            labels = [token if is_learned else IGNORED for token, is_learned in zip(tokens, learned, strict=True)]
            yield from self._fitted(tokens, labels)
        self.counts["replaced"] = self.template.replaced

    def _fitted(self, tokens: list[int], labels: list[int]) -> Iterator[Encoded]:
        """The row, its end cut where it is too long; none where that leaves no answer."""
        first = next((i for i, label in enumerate(labels) if label != IGNORED and i), None)
        is_long = len(tokens) > self.max_length
        self.counts["long"] += is_long
        if first is None:
            self.counts["unanswered"] += 1
        elif is_long and (self.drop_long or first >= self.max_length):
            self.counts["dropped" if self.drop_long else "late"] += 1
        else:
            self.counts["cut"] += is_long
            yield {"input_ids": tokens[: self.max_length], "labels": labels[: self.max_length]}

    @functools.cached_property
    def _opening(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        whole, bare = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        return whole[: whole.index(bare[0])] if bare else []

    def _ended(self, tokens: list[int]) -> list[int]:
        """Tokens with the end token, once."""
        end = self.tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def about(counts: collections.Counter[str], has_template: bool) -> str:
    """What the training rows are, in one line."""
    mean, share = round(counts["tokens"] / max(1, counts["rows"])), counts["learned"] / max(1, counts["tokens"])
    if counts["texts"]:
        return f"{number(counts['texts'], 'texts')} in {number(counts['rows'], 'rows')}, {mean:,} tokens on average, loss on all"
    kind, learned, hint = next((kind, words, hint) for kind, words, hint in ANSWERED if counts[kind])
    said = f"{number(counts[kind], kind)}{hint}, {mean:,} tokens on average, loss on {learned} {100 * share:.0f} %"
    return said + (", as plain text (--chat puts them through the chat template)" if has_template and kind == "prompts" else "")


def about_lengths(counts: collections.Counter[str], max_length: int, part: str) -> Iterator[str]:
    """What was cut, left out and rendered otherwise of a part of the data, a sentence each."""
    total = f"{counts['texts'] + sum(counts[kind] for kind, *_ in ANSWERED):,} {part}"
    if counts["long"] and counts["texts"]:
        yield f"{counts['long']:,} of {total} texts are longer than {max_length:,} tokens, and are cut into rows of that"
    elif counts["long"]:
        parts = {"cut": "lose the end of their answer", "late": "are left out, as their answer begins later"}
        parts["dropped"] = "are left out"
        said = " and ".join(f"{counts[name]:,} {what}" for name, what in parts.items() if counts[name])
        yield f"{counts['long']:,} of {total} rows are longer than {max_length:,} tokens (--max-length): {said}"
    if counts["unanswered"]:
        yield f"{counts['unanswered']:,} of {total} rows hold no answer to learn, and are left out"
    if counts["replaced"]:
        yield (
            f"{counts['replaced']:,} of {total} rows go through the chat template that TRL has for training: the model's own "
            "renders a turn otherwise once others follow"
        )


def number(count: int, noun: str) -> str:
    """A count and its noun, which is given in the plural."""
    return f"{count:,} {noun[:-1] if count == 1 else noun}"


def _as_turns(example: Example) -> Example:
    return Example(messages=[{"role": "user", "content": example.text}, {"role": "assistant", "content": example.text2}])
