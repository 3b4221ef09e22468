"""What a language model says to held-out prompts, by the likeliest token each time, and the score that the options ask for."""

from __future__ import annotations

import math
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import CliError
from .models import positions_of

EXACT = "exact"
IGNORED = -100  # the label of a token that no loss is taken of
Score = Callable[[str, str, str], float]  # of a prompt, what was generated, and the reference


@dataclass(frozen=True)
class Sample:
    """What was generated for one held-out row; `score` is None where none is asked for."""

    prompt: str
    reference: str
    generated: str
    score: float | None = None


def prompt_of(row: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
    """The tokens before the first label of a row, and the labels up to the next token without one; None without prompt."""
    tokens, labels = list(row["input_ids"]), list(row["labels"])
    start = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
    end = next((place for place in range(start, len(labels)) if labels[place] == IGNORED), len(labels))
    return (tokens[:start], labels[start:end]) if start else None


def last_prompt_of(row: Mapping[str, Any]) -> list[int]:
    """The tokens before the last labels of a row."""
    labels = list(row["labels"])
    end = max((place for place, label in enumerate(labels) if label != IGNORED), default=0)
    start = max((place for place in range(end) if labels[place] == IGNORED), default=-1) + 1
    return list(row["input_ids"])[:start]


def scorer(score: str | None, pattern: str | None) -> Score | None:
    """The function that an option `--score` names; None where there is no such option.

    Args:
        score: "exact", or a function by its dotted name or as `package.module:function`.
        pattern: a regular expression; its last match counts, or the first group of that. Without it the whole text counts.

    Raises:
        CliError: There is no such function, or the pattern is none.
    """
    if pattern is not None and score != EXACT:
        raise CliError("--answer-pattern belongs to --score exact; give both.")
    if score is None:
        return None
    if score != EXACT:
        return _named(score)
    try:
        compiled = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise CliError(f"--answer-pattern: expected a regular expression, got {pattern!r}: {error}.") from None
    return lambda prompt, generated, reference: _equal(*(_answer(compiled, text) for text in (generated, reference)))


def proven_score(score: Score, name: str, sample: Sample) -> float:
    """What a function gives for a sample.

    Raises:
        CliError: It raises an error, or gives no finite number.
    """
    try:
        value = float(score(sample.prompt, sample.generated, sample.reference))
    except Exception as error:
        raise CliError(f"--score {name}: expected a number for each row, got {type(error).__name__}: {error}.") from error
    if not math.isfinite(value):
        raise CliError(f"--score {name}: expected a finite number for each row, got {value}.")
    return value


def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int, batch_size: int) -> list[str]:
    """How a model in eval mode goes on after each prompt, without the tokens that end it.

    Args:
        model: of transformers, with `generate`.
        tokenizer: its tokenizer.
        prompts: token ids; of one that leaves no room among the model's positions the begin is cut off.
        most: tokens that are generated at most.
        batch_size: prompts at a time, of similar length, padded on the left.
    """
    device, texts = next(model.parameters()).device, [""] * len(prompts)
    most, most_of_prompt = room(model, most)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    with quiet():
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            rows = [list(prompts[place])[-most_of_prompt:] for place in places]
            width = max(map(len, rows))
            tokens = torch.tensor([[tokenizer.pad_token_id or 0] * (width - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
            made = model.generate(input_ids=tokens, attention_mask=mask, **greedy(model, tokenizer, most))[:, width:]
            for place, text in zip(places, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                texts[place] = text
    return texts


def greedy(model: nn.Module, tokenizer: Any, most: int) -> dict[str, Any]:
    """What `generate` of transformers is told, so that it takes the likeliest token until an end or `most` tokens."""
    pad, ends = tokenizer.pad_token_id or 0, ends_of(model, tokenizer) or None
    options = {"max_new_tokens": most, "do_sample": False, "pad_token_id": pad, "eos_token_id": ends}
    if getattr(model.config.get_text_config(), "output_router_logits", False):  # as TRL sets it, for a loss of the routers
        options["output_router_logits"] = False
    return options


def ends_of(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those of the model and the tokenizer, and the one that ends a turn of the chat template."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if getattr(tokenizer, "chat_template", None):
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!!!"}], tokenize=False
        )
        after = tokenizer(said.rpartition("!!!")[2], add_special_tokens=False)["input_ids"][:1]
        ends |= {*after} & {*tokenizer.all_special_ids}
    return sorted(ends - {None})


def room(model: nn.Module, most: int) -> tuple[int, int]:
    """How many tokens are generated, and how many a prompt may have, so that both fit the model's positions."""
    positions = positions_of(model)
    most = min(most, max(1, positions - 1))
    return most, max(1, positions - most)


def _named(name: str) -> Score:
    sys.path.insert(0, os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CliError(f"--score: expected exact, or a function as package.module:function, got {name!r}: {error}.") from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise CliError(f"--score: expected a function, got {name!r}, which is of type {type(found).__name__}.")
    return found


def _answer(pattern: re.Pattern[str] | None, text: str) -> str | None:
    """The last match of a pattern, or of its first group; None where nothing matches."""
    if pattern is None:
        return text.strip()
    matches = list(pattern.finditer(text))
    return (matches[-1][1 if pattern.groups else 0] or "").strip() if matches else None


def _equal(generated: str | None, reference: str | None) -> float:
    return float(generated is not None and generated == reference)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers warns of, where a model's own settings for sampling meet a call that samples nothing."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
