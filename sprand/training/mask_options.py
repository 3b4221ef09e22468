"""The options of a `DynamicMask`: when a mask changes, how much of it, and how entries are dropped and grown."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

CHOICES = {
    "drop": ("delta_change", "delta"),
    "grow": ("gradient", "random"),
    "decay": (None, "linear", "cosine"),
    "mode": ("regrow", "recompute"),
}
DEFAULT_FRACTION = 0.2
DEFAULT_STEPS = 5

Strategy = Mapping[str, Tensor] | Callable[[nn.Module], Mapping[str, Tensor]]


@dataclass
class Options:
    """What a `DynamicMask` was asked for, with its defaults filled in; the attributes are its arguments.

    Raises:
        ValueError: An option is out of range, or two exclude each other.
    """

    every: int
    fraction: float | None
    drop: str
    grow: str
    steps: int | None
    decay: str | None
    until: int | None
    mode: str
    strategy: Strategy | None
    seed: int

    def __post_init__(self) -> None:
        for option, choices in CHOICES.items():
            value = getattr(self, option)
            if value not in choices:
                raise ValueError(f"{option}: expected one of {', '.join(map(str, choices))}, got {value!r}")
        self._check_steps()
        if self.mode == "recompute":
            self._check_recompute()
        elif self.strategy is not None:
            raise ValueError("strategy: only for mode='recompute'")
        self.fraction = _fraction(DEFAULT_FRACTION if self.fraction is None else self.fraction)

    def changes_at(self, count: int) -> bool:
        """Whether the mask changes at a step."""
        return count % self.every == 0 and (self.until is None or count <= self.until)

    def searches_before(self, change: int, count: int) -> bool:
        """Whether gradients after the step `count` decide what grows at the step `change`."""
        by_gradient = self.mode == "regrow" and self.grow == "gradient"
        return by_gradient and self.changes_at(change) and change - self.steps <= count < change

    def next_change(self, count: int) -> int:
        """The first step after `count` at which the mask may change."""
        return (count // self.every + 1) * self.every

    def fraction_at(self, count: int) -> float:
        """The fraction of each weight's entries that is exchanged at a step."""
        if self.decay is None:
            return self.fraction
        progress = count / self.until
        left = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.fraction * left

    def _check_steps(self) -> None:
        self.every = _positive("every", self.every)
        if self.until is not None:
            self.until = _positive("until", self.until)
        elif self.decay is not None:
            raise ValueError(f"decay={self.decay!r} lowers the fraction to zero at a step: give until")
        if self.steps is None:
            self.steps = min(DEFAULT_STEPS, self.every)
        self.steps = _positive("steps", self.steps)
        if self.steps > self.every:
            raise ValueError(f"steps: expected at most every={self.every}, got {self.steps}")

    def _check_recompute(self) -> None:
        if not callable(self.strategy) and not isinstance(self.strategy, Mapping):
            raise ValueError(
                "strategy: mode='recompute' needs {parameter name: mask or indices} or a function that makes it of the model, "
                f"got {self.strategy!r}"
            )
        if self.fraction is not None or self.decay is not None:
            raise ValueError("fraction, decay: mode='recompute' draws the whole mask anew; leave them out")


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")
    return int(value)


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < 1:
        raise ValueError(f"fraction: expected a number in (0, 1), got {value!r}")
    return float(value)
