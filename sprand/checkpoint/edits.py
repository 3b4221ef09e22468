"""What adapters change in the tensors of a checkpoint, and the proof that it is the base they were trained on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import host, ops, pattern
from ..adapter_file import check_base, entries, frozen_entries, read
from ..config import SparseConfig
from .names import resolve, twins
from .shards import CHUNK, TRAINABLE, Checkpoint, Stored


@dataclass(frozen=True)
class Source:
    """An adapter that was read, and its factor."""

    path: Path
    description: dict[str, Any]
    tensors: dict[str, Tensor]
    weight: float = 1.0

    @property
    def config(self) -> SparseConfig:
        """How its entries were chosen."""
        return SparseConfig.from_dict(self.description["config"])


def open_adapters(adapters: Iterable[tuple[str | os.PathLike[str], float]]) -> list[Source]:
    """Read adapters, each with a factor.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: none was given, one is damaged, or it cannot be mixed.
    """
    sources = [Source(Path(path), *read(path), float(weight)) for path, weight in adapters]
    if not all(math.isfinite(source.weight) for source in sources):
        raise ValueError(f"weights: expected finite numbers, got {[source.weight for source in sources]}")
    if not sources:
        raise ValueError("expected at least one adapter, got none")
    for source in sources if len(sources) > 1 or sources[0].weight != 1 else ():
        if source.description["saved"]:
            whole = ", ".join(source.description["saved"])
            raise ValueError(
                f"{source.path} trained whole modules ({whole}), which cannot be mixed; merge it alone, with weight 1"
            )
        if any("frozen" in target for target in source.description["targets"].values()):
            raise ValueError(
                f"{source.path} has entries that are stored as values (of a redrawn mask, or sprand diff), which cannot be "
                "mixed; merge it alone, with weight 1"
            )
    return sources


@dataclass(eq=False)
class Edit:
    """The trained entries of one tensor: `cast(base + delta)`, rounded once, over values that are set.

    Attributes:
        stored: the tensor.
        indices: `[n]`, flat, sorted.
        deltas: `[n]`, float32 (float64 for float64 tensors).
        set_indices, set_values: entries that are given as values, under the deltas; flat, sorted.
        base, set_base: what the tensor held there before; known once all its parts were edited.
    """

    stored: Stored
    indices: Tensor
    deltas: Tensor
    set_indices: Tensor
    set_values: Tensor
    base: Tensor = field(init=False)
    set_base: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.base = torch.empty(self.indices.shape, dtype=self.stored.dtype)
        self.set_base = torch.empty(self.set_indices.shape, dtype=self.stored.dtype)
        step = CHUNK // self.stored.dtype.itemsize
        self._cut, self._set_cut = (_Cut(indices, self.stored.numel, step) for indices in (self.indices, self.set_indices))

    def touches(self, first: int, count: int) -> bool:
        """Whether it changes any of `count` entries from `first` on."""
        return any(cut.span(first, count)[0] < cut.span(first, count)[1] for cut in (self._cut, self._set_cut))

    def apply(self, part: Tensor, first: int) -> None:
        """Change a part of the tensor, flat, in place; `first` is the position of its first entry."""
        own, local = self._cut.part(first, part.numel())
        start = self.base[own] = ops.gather(part, local)
        if self.set_indices.numel():
            other, places = self._set_cut.part(first, part.numel())
            self.set_base[other] = ops.gather(part, places)
            ops.patch_(part, places, self.set_values[other], None)
            start = ops.gather(part, local)
        ops.patch_(part, local, start, self.deltas[own])

    def restore(self, part: Tensor, first: int) -> None:
        """Put the base back into a part that holds the trained values.

        Raises:
            ValueError: it holds others.
        """
        before = part.clone()
        for cut, base in ((self._set_cut, self.set_base), (self._cut, self.base)):
            own, local = cut.part(first, part.numel())
            ops.patch_(part, local, base[own], None)
        again = part.clone()
        self.apply(again, first)
        _same(self.stored, again, before)


@dataclass(eq=False)
class Overwrite:
    """All entries of one tensor: a module that was trained in full.

    Attributes:
        stored: the tensor.
        values: its new entries, flat, in its dtype.
        base: what it held before; known once all its parts were edited.
    """

    stored: Stored
    values: Tensor
    base: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.base = torch.empty_like(self.values)

    def touches(self, first: int, count: int) -> bool:
        """Always."""
        return True

    def apply(self, part: Tensor, first: int) -> None:
        """Change a part of the tensor, flat, in place; `first` is the position of its first entry."""
        own = slice(first, first + part.numel())
        self.base[own] = part
        part.copy_(self.values[own])

    def restore(self, part: Tensor, first: int) -> None:
        """Put the base back into a part that holds the trained values.

        Raises:
            ValueError: it holds others.
        """
        own = slice(first, first + part.numel())
        _same(self.stored, self.values[own], part)
        part.copy_(self.base[own])


@dataclass(eq=False)
class Target:
    """One parameter of the adapters, the edits of the tensors that hold it, and what proves their base."""

    name: str
    edits: tuple[Edit, ...]
    claims: list[tuple[Source, Tensor | None]]

    def prove(self) -> None:
        """Compare the base of all its edits, which is known now, with the fingerprints of the adapters.

        Raises:
            ValueError: an adapter was trained on another base.
        """
        base, set_base = (torch.cat([getattr(edit, name) for edit in self.edits]) for name in ("base", "set_base"))
        for source, positions in self.claims:
            target = source.description["targets"][self.name]
            check_base(source.path, self.name, base if positions is None else base[positions], target["fingerprint"])
            if "frozen" in target:
                check_base(source.path, self.name, set_base, target["frozen"]["fingerprint"])


@dataclass
class Edits:
    """All that adapters change in a checkpoint.

    Attributes:
        by_tensor: the edit of each changed tensor by its name in the checkpoint.
        targets: the parameters of the adapters.
        added: tensors that the checkpoint does not have, such as a new head.
    """

    by_tensor: dict[str, Edit | Overwrite]
    targets: list[Target]
    added: dict[str, Tensor]


def edits_of(checkpoint: Checkpoint, sources: Sequence[Source]) -> Edits:
    """What adapters change in a checkpoint.

    Several adapters, or one with a factor, are summed as `sprand.switch(model, {name: weight})` sums them: in float32, in their
    order, rounded once with the base.

    Raises:
        ValueError: a parameter is not in the checkpoint, in a dtype that is not trained, or an adapter is damaged.
    """
    shapes = {name: target["shape"] for source in sources for name, target in source.description["targets"].items()}
    saved = {name: source.tensors.get(f"saved.{name}") for source in sources for name in source.description["saved"]}
    places, names = resolve(checkpoint, shapes, saved)
    result = Edits({}, [], {})
    for name, tensors in places.items():
        whole = _summed(checkpoint, name, tensors, sources)
        for target in (whole, *_twins(checkpoint, whole)):
            result.targets.append(target)
            for edit in target.edits:
                _take(result, name, edit)
    for name, values in saved.items():
        stored = checkpoint.tensors.get(names[name])
        if values is None:
            raise ValueError(f"{sources[0].path} is damaged: it has no values for {name}")
        if stored is None:
            result.added[names[name]] = values
            continue
        if list(stored.shape) != list(values.shape):
            raise ValueError(
                f"{name} was trained in full as {list(values.shape)}, and {checkpoint.folder} holds {list(stored.shape)}; give a "
                "base without it, or one of its shape"
            )
        _trainable(stored)
        for twin in (stored.name, *twins(checkpoint, stored.name)):
            other = checkpoint.tensors[twin]
            if other is stored or torch.equal(_bits(checkpoint.read(twin)), _bits(checkpoint.read(stored.name))):
                _take(result, name, Overwrite(other, values.flatten().to(stored.dtype)))
    return result


def _summed(checkpoint: Checkpoint, name: str, tensors: Sequence[str], sources: Sequence[Source]) -> Target:
    """One parameter of all adapters that train it, as edits of the tensors that hold it."""
    pieces = [checkpoint.tensors[tensor] for tensor in tensors]
    for stored in pieces:
        _trainable(stored)
    dtype = pieces[0].dtype
    chosen = [source for source in sources if name in source.description["targets"]]
    shape = chosen[0].description["targets"][name]["shape"]
    found = []
    for source in chosen:
        target = source.description["targets"][name]
        if target["shape"] != shape:
            raise ValueError(f"{name} is {target['shape']} in {source.path} and {shape} in {chosen[0].path}")
        found.append(entries(source.path, source.config, name, target, source.tensors))
    union, positions = found[0][0], [None]
    total = found[0][1].to(ops.accumulation_dtype(dtype))
    if len(chosen) > 1 or chosen[0].weight != 1:
        union, positions = host.merge_indices([indices for indices, _ in found])
        total = torch.zeros(union.shape, dtype=total.dtype)
        for source, (_, deltas), position in zip(chosen, found, positions, strict=True):
            ops.scatter_add_all_([total], [position], [deltas.to(total.dtype)], [source.weight])
    set_indices, set_values = union[:0], torch.empty(0, dtype=dtype)
    target = chosen[0].description["targets"][name]
    if "frozen" in target:
        set_indices, set_values = frozen_entries(chosen[0].path, name, target, chosen[0].tensors)
        set_values = set_values.to(dtype)
    edits, begin = [], 0
    for stored in pieces:
        lists = []
        for indices, values in ((union, total), (set_indices, set_values)):
            low, high = _bounds(indices, begin, stored.numel)
            lists += [(indices[low:high] - begin).to(pattern.index_dtype(stored.numel)), values[low:high]]
        edits.append(Edit(stored, *lists))
        begin += stored.numel
    return Target(name, tuple(edits), list(zip(chosen, positions, strict=True)))


def _twins(checkpoint: Checkpoint, target: Target) -> list[Target]:
    """The same change of tensors that are tied to this one and hold the same entries there."""
    if len(target.edits) > 1:
        return []
    edit, found = target.edits[0], []
    for name in twins(checkpoint, edit.stored.name):
        indices = torch.cat([edit.indices, edit.set_indices])
        one, two = (_bits(ops.gather(checkpoint.read(tensor), indices)) for tensor in (edit.stored.name, name))
        if torch.equal(one, two):
            other = Edit(checkpoint.tensors[name], edit.indices, edit.deltas, edit.set_indices, edit.set_values)
            found.append(Target(target.name, (other,), target.claims))
    return found


def _take(result: Edits, name: str, edit: Edit | Overwrite) -> None:
    if edit.stored.name in result.by_tensor:
        raise ValueError(f"{name} and another parameter of the adapters are one tensor of the checkpoint, {edit.stored.name}")
    result.by_tensor[edit.stored.name] = edit


def _trainable(stored: Stored) -> None:
    if stored.dtype not in TRAINABLE:
        raise ValueError(
            f"{stored.name} is stored as {stored.code}; expected F64, F32, F16 or BF16: merge into the checkpoint that is not "
            "quantized"
        )


class _Cut:
    """Sorted indices of a tensor, cut where the parts of `step` entries begin in which it is read."""

    def __init__(self, indices: Tensor, numel: int, step: int) -> None:
        starts = torch.arange(0, numel + step, step).clamp_(max=numel)
        self.indices, self.step, self.bounds = indices, step, torch.searchsorted(indices.long(), starts).tolist()

    def span(self, first: int, count: int) -> tuple[int, int]:
        """Which of the indices lie in the part that begins at `first`."""
        assert first % self.step == 0 and count <= self.step
        return self.bounds[first // self.step], self.bounds[first // self.step + 1]

    def part(self, first: int, count: int) -> tuple[slice, Tensor]:
        """The same as a slice, and where they lie in the part."""
        low, high = self.span(first, count)
        return slice(low, high), (self.indices[low:high] - first).to(torch.int32)


def _bounds(indices: Tensor, first: int, count: int) -> tuple[int, int]:
    limits = torch.tensor([first, first + count])
    low, high = torch.searchsorted(indices, limits.clamp(max=torch.iinfo(indices.dtype).max).to(indices.dtype)).tolist()
    return low, high


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _same(stored: Stored, expected: Tensor, found: Tensor) -> None:
    if not torch.equal(_bits(expected), _bits(found)):
        raise ValueError(
            f"{stored.name} holds other values than the merge wrote: it was changed since, or other adapters or weights were "
            "merged"
        )


def base_values(edits: Mapping[str, Edit | Overwrite]) -> dict[str, Tensor]:
    """What the changed tensors held before, by `base.`, `set.` and `whole.` and their names."""
    found: dict[str, Tensor] = {}
    for name, edit in edits.items():
        if isinstance(edit, Overwrite):
            found[f"whole.{name}"] = edit.base
            continue
        found[f"base.{name}"] = edit.base
        if edit.set_indices.numel():
            found[f"set.{name}"] = edit.set_base
    return found
