"""The arithmetic of combining adapters: the union of their entries, as a sum, a mean, by the vote of TIES, or thinned by DARE."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..files import described
from ..kernels import host, ops, topk
from ..selection import pattern
from ..selection.rules import fraction, seed_of

METHODS = ("sum", "mean", "ties", "dare")
THINNED = ("ties", "dare")  # the methods that keep a part of each adapter
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Rule:
    """How several changes of one entry become one. Absent entries count as a change of zero.

    Attributes:
        method: `"sum"`: of weight times change. `"mean"`: the sum, over the number of adapters. `"ties"` (arXiv 2306.01708): of
            each adapter's changes of a weight the largest are kept; at each entry the sign with more on its side wins; the mean
            of weight times change over the adapters of that sign. `"dare"` (arXiv 2311.03099): of each adapter's changes of a
            weight random ones are kept, divided by `density`, and summed.
        density: for ties and dare, which fraction of each adapter's entries is kept, in (0, 1].
        seed: of dare's draw; the entries kept follow from it, the parameter's name and the adapter's place in the order alone.
        signs: for ties, what elects the sign: `"total"`, the sum of the changes, or `"frequency"`, their number.

    Raises:
        ValueError: The method is unknown, or an option does not fit it.
    """

    method: str = "sum"
    density: float | None = None
    seed: int = 0
    signs: str = "total"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if (self.method in THINNED) != (self.density is not None):
            raise ValueError(
                f"density: expected a fraction in (0, 1] for {' and '.join(THINNED)}, None for the others, got "
                f"{self.density!r} for {self.method}"
            )
        if self.density is not None:
            fraction("density", self.density)
        seed_of(self.seed)
        if self.signs not in SIGNS:
            raise ValueError(f"signs: expected one of {', '.join(SIGNS)}, got {self.signs!r}")

    def to_dict(self) -> dict[str, Any]:
        """The options that matter to the method, as JSON types."""
        fields: dict[str, Any] = {"method": self.method}
        if self.density is not None:
            fields["density"] = float(self.density)
        if self.method == "dare":
            fields["seed"] = int(self.seed)
        if self.method == "ties":
            fields["signs"] = self.signs
        return fields


SUM = Rule()
Term = tuple[Tensor, Tensor, Tensor, float]  # a sum, where to add in it, what, and times what


@dataclass(frozen=True, eq=False)
class Part:
    """What one adapter changes in one weight.

    Attributes:
        number: the adapter's place in the order, from 0.
        weight: its factor.
        indices: `[nnz]`, flat, ascending, unique.
        delta: `[nnz]`, float32 (float64 for a float64 weight), on the same device.
    """

    number: int
    weight: float
    indices: Tensor
    delta: Tensor


@dataclass(frozen=True, eq=False)
class Whole:
    """The combined change of one weight.

    Attributes:
        indices: `[n]`, the union of all parts, ascending.
        delta: `[n]`, in the dtype and on the device of the first part.
        positions: where the entries of each part stand in the union, `[nnz_i]`.
    """

    indices: Tensor
    delta: Tensor
    positions: list[Tensor]


def combined(rule: Rule, count: int, targets: Mapping[str, Sequence[Part]]) -> dict[str, Whole]:
    """Combine adapters, weight by weight: summed in float32 in their order.

    Args:
        rule: how.
        count: the number of adapters, of which not every one need change every weight.
        targets: for each parameter name one part or more, in the order of the adapters.

    Returns:
        The combined change of each parameter.

    Raises:
        ValueError: The indices of a part are not ascending and unique.
    """
    wholes: dict[str, Whole] = {}
    rounds: dict[tuple[int, torch.device, torch.dtype], list[Term]] = {}
    for name, parts in targets.items():
        device = parts[0].delta.device
        union, positions = host.merge_indices([part.indices.cpu() for part in parts])
        positions = [position.to(device) for position in positions]
        if rule.method == "ties":
            total = _vote(rule, union.numel(), parts, positions)
        else:
            total = parts[0].delta.new_zeros(union.shape)
            for turn, (part, position) in enumerate(zip(parts, positions, strict=True)):
                term = _term(rule, count, name, part, total, position)
                rounds.setdefault((turn, device, total.dtype), []).append(term)
        wholes[name] = Whole(union.to(device), total, positions)
    for _, terms in sorted(rounds.items(), key=lambda entry: entry[0][0]):
        ops.scatter_add_all_(*zip(*terms, strict=True))
    return wholes


def _term(rule: Rule, count: int, name: str, part: Part, total: Tensor, position: Tensor) -> Term:
    """What one part adds to the change of a weight, and where."""
    delta = part.delta
    if rule.method == "dare":
        kept = _drawn(rule, name, part)
        return total, position[kept], delta[kept].contiguous(), part.weight / rule.density
    factor = part.weight / count if rule.method == "mean" else part.weight
    return total, position, delta.contiguous(), factor


def _vote(rule: Rule, numel: int, parts: Sequence[Part], positions: Sequence[Tensor]) -> Tensor:
    """The elected sign's mean, `[numel]`, over the largest changes of each part."""
    changes = parts[0].delta.new_zeros(len(parts), numel)
    for row, part, position in zip(changes, parts, positions, strict=True):
        largest = topk.largest(topk.order_keys(part.delta.abs()), int(rule.density * part.delta.numel()))
        row[position[largest]] = part.delta[largest]
    votes = torch.zeros_like(changes[0])
    for row in changes:
        votes += row if rule.signs == "total" else row.sign()
    elected = torch.where(votes >= 0, 1, -1)
    total, winners = torch.zeros_like(votes), torch.zeros_like(votes)
    for row, part in zip(changes, parts, strict=True):
        wins = row.sign() == elected
        total += row * part.weight * wins
        winners += wins
    return total / winners.clamp_(min=1)


def _drawn(rule: Rule, name: str, part: Part) -> Tensor:
    """Which entries of a part DARE keeps, `[kept]`, ascending: a simple random sample, whose size is exact in the mean."""
    own, nnz = f"{name} dare {part.number}", part.delta.numel()
    share = rule.density * nnz
    whole = math.floor(share)
    chance = pattern.draw_key("dare", own, (nnz,), rule.seed) % 2**32 / 2**32
    kept = min(nnz, whole + (chance < share - whole))
    return pattern.draw("uniform", own, (nnz,), kept, rule.seed, part.delta.device).long()


def content_checksum(indices: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> str:
    """One hash of the entries of an adapter, however it is stored."""
    listed = {f"indices.{name}": value for name, value in indices.items()}
    return described.checksum(listed | {f"delta.{name}": value.detach() for name, value in deltas.items()})


@dataclass(frozen=True)
class Origin:
    """An adapter that was combined, for the record.

    Attributes:
        name: of the adapter, or of its folder.
        weight: its factor.
        checksum: of its entries, see `content_checksum`.
        shared: how many of its entries another one has as well.
    """

    name: str
    weight: float
    checksum: str
    shared: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {"name": self.name, "weight": float(self.weight), "checksum": self.checksum, "shared": self.shared}


def record(rule: Rule, origins: Sequence[Origin]) -> dict[str, Any]:
    """How a combined adapter came to be, as its `selection`."""
    return {"strategy": "combine", **rule.to_dict(), "sources": [origin.to_dict() for origin in origins]}


def shared_counts(count: int, places: Iterable[tuple[Sequence[int], Sequence[Tensor]]]) -> list[int]:
    """How many entries of each adapter another one has as well.

    Args:
        count: the number of adapters.
        places: for each weight the numbers of the adapters that change it, and where the entries of each stand in the union.
    """
    totals = [0] * count
    for order, positions in places:
        size = max((int(position[-1]) + 1 for position in positions if position.numel()), default=0)
        times = torch.zeros(size, dtype=torch.int32, device=positions[0].device)
        for position in positions:
            times[position] += 1
        for number, position in zip(order, positions, strict=True):
            totals[number] += int((times[position] > 1).sum())
    return totals
