"""One targeted parameter of a module: the names of its tensors there, and what is kept beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .entries import Candidates, Schedules, Sealed, Written
from .sites import Owner
from .units import Pattern, Units

DELTA, INDICES, BASE = "sprand_delta", "sprand_indices", "sprand_base"


@dataclass
class Target:
    """One targeted parameter of one module.

    Attributes:
        parameter: its name in the module, for example `"weight"`.
        scale: factor between delta and weight.
        columns: as in `Pattern`, whose `chosen` is the buffer named `indices`.
        redraw: makes the indices on a device, for a module that leaves the meta device.
        kept: the pattern of a module on the meta device that nothing can redraw.
        written: whether the weight holds its delta already.
        sealed: tells whether what is chosen is what it was.
        schedules: how a GPU samples the gradient of a linear layer.
        candidates: sees the gradient of the whole weight while a mask looks for entries to grow.
        scores: as in `Entries`, while columns are chosen by gradients, or look for others to grow.
        frozen: whether an earlier mask left trained values in the weight, which a new base would lose.
        name: its name in the model, for messages.
        leader: the first owner of a weight that several modules share, in whose state its entries are; None for that one itself.
        delta, indices, base: names of the module's tensors for this parameter.
    """

    parameter: str
    scale: float = 1.0
    columns: Units | None = None
    redraw: Callable[[torch.device], Tensor] | None = None
    kept: Pattern | None = None
    written: Written = field(default_factory=Written)
    sealed: Sealed = field(default_factory=Sealed)
    schedules: Schedules | None = None
    candidates: Candidates | None = None
    scores: Tensor | None = None
    frozen: bool = False
    name: str = ""
    leader: Owner | None = None

    def __post_init__(self) -> None:
        suffix = "" if self.parameter == "weight" else f"_{self.parameter}"
        self.delta, self.indices, self.base = DELTA + suffix, INDICES + suffix, BASE + suffix

    @property
    def tensors(self) -> tuple[str, str, str]:
        """The names of delta, indices and base."""
        return self.delta, self.indices, self.base

    def enter_meta(self, pattern: Pattern) -> None:
        """Keep the pattern of a module that goes to the meta device, unless it can be made anew."""
        if self.redraw is None and not pattern.chosen.is_meta:
            self.kept = pattern

    def leave_meta(self, device: torch.device, columns: Units) -> Pattern:
        """The pattern of a module that has left the meta device, whose weight has these columns."""
        pattern = Pattern.of(self.redraw(device), columns) if self.kept is None else self.kept.to(device)
        self.kept = None
        return pattern
