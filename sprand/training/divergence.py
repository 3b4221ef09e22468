"""Tells by the losses of a training that its rate is too high, and which one to try."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .rates import two_digits

LEAST_LOSSES = 20  # fewer say nothing


def stays_above_start(losses: Sequence[float]) -> str | None:
    """Whether each of the last quarter of the losses lies above the first one, by more than that quarter is wide.

    Normal noise about one value looks so in 1 of 70 trainings of 20 losses, and in 1 of 2,000 of 40.

    Args:
        losses: of training, as they were logged, the first one from before the rate has taken effect.

    Returns:
        What they say, in words; None where it holds not, or of less than 20 losses.
    """
    if len(losses) < LEAST_LOSSES:
        return None
    late = losses[-(len(losses) // 4) :]
    low, high = min(late), max(late)
    if low - (high - low) <= losses[0]:
        return None
    return f"the training loss stays above its start: {losses[0]:.3g} at first, {low:.3g} to {high:.3g} lately"


def is_worth_a_look(step: int, before: int, steps: int) -> bool:
    """Whether half of the steps, or all, were done in between.

    Args:
        step: steps that are done.
        before: steps that were done when the losses were last looked at.
        steps: of the whole training.
    """
    return any(before < mark <= step for mark in (math.ceil(steps / 2), steps))


def rate_to_try(rate: float) -> float:
    """A third of a rate that is too high."""
    return two_digits(rate / 3)
