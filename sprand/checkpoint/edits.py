"""What adapters change in the tensors of a checkpoint, and the proof that it is the base they were trained on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters.combining import SUM, Rule
from ..adapters.file import AdapterFile
from ..kernels import ops
from ..selection import pattern
from .entries import Changes, Cut, Pending, bounds
from .names import resolve, twins
from .shards import CHUNK, TRAINABLE, Checkpoint, Stored
from .stream import Progress


class Edit:
    """The trained entries of one tensor: `cast(base + delta)`, rounded once, over values that are set.

    Args:
        stored: the tensor.
        pending: the changes of the parameter that it is, or is a part of.
        begin: the position of its first entry in the parameter.
    """

    def __init__(self, stored: Stored, pending: Pending, begin: int = 0) -> None:
        self.stored, self.pending, self.begin = stored, pending, begin
        self._lock, self._own = threading.Lock(), None

    @property
    def indices(self) -> Tensor:
        """`[n]`, flat, sorted."""
        return self.own.cut.indices

    @property
    def deltas(self) -> Tensor:
        """`[n]`, float32 (float64 for float64 tensors)."""
        return self.own.deltas

    @property
    def set_indices(self) -> Tensor:
        """Entries that are given as values, under the deltas; flat, sorted."""
        return self.own.set_cut.indices

    @property
    def set_values(self) -> Tensor:
        """Their values."""
        return self.own.set_values

    @property
    def base(self) -> Tensor:
        """What the tensor held at `indices` before; known once all its parts were edited."""
        return self.own.base

    @property
    def set_base(self) -> Tensor:
        """What it held at `set_indices`."""
        return self.own.set_base

    @property
    def own(self) -> _Own:
        """The changes of this tensor alone; worked out when they are first needed.

        Raises:
            ValueError: an adapter is damaged.
        """
        self.prepare()
        return self._own

    def prepare(self) -> None:
        """Work the changes out, if that has not been done yet."""
        with self._lock:
            if self._own is None:
                self._own = _Own(self.stored, self.pending.changes(), self.begin)

    def touches(self, first: int, count: int) -> bool:
        """Whether it changes any of `count` entries from `first` on."""
        spans = (cut.span(first, count) for cut in (self.own.cut, self.own.set_cut))
        return any(low < high for low, high in spans)

    def apply(self, part: Tensor, first: int) -> None:
        """Change a part of the tensor, flat, in place; `first` is the position of its first entry."""
        all_of = self.own
        own, local = all_of.cut.part(first, part.numel())
        start = all_of.base[own] = ops.gather(part, local)
        if all_of.set_values.numel():
            other, places = all_of.set_cut.part(first, part.numel())
            all_of.set_base[other] = ops.gather(part, places)
            ops.patch_(part, places, all_of.set_values[other], None)
            start = ops.gather(part, local)
        ops.patch_(part, local, start, all_of.deltas[own])

    def restore(self, part: Tensor, first: int) -> None:
        """Put the base back into a part that holds the trained values.

        Raises:
            ValueError: it holds others.
        """
        held = self._held(part, first)
        self._put_base(part, first)
        self.apply(part, first)
        for expected, found in zip(self._held(part, first), held, strict=True):
            _same(self.stored, expected, found)
        self._put_base(part, first)

    def _held(self, part: Tensor, first: int) -> list[Tensor]:
        return [ops.gather(part, cut.part(first, part.numel())[1]) for cut in (self.own.cut, self.own.set_cut)]

    def _put_base(self, part: Tensor, first: int) -> None:
        for cut, base in ((self.own.set_cut, self.set_base), (self.own.cut, self.base)):
            own, local = cut.part(first, part.numel())
            ops.patch_(part, local, base[own], None)


class _Own:
    """The entries of one tensor, cut where the parts begin in which it is read, and room for its base."""

    def __init__(self, stored: Stored, changes: Changes, begin: int) -> None:
        lists = []
        for indices, values in ((changes.indices, changes.deltas), (changes.set_indices, changes.set_values)):
            low, high = bounds(indices, begin, stored.numel)
            lists += [(indices[low:high] - begin).to(pattern.index_dtype(stored.numel)), values[low:high]]
        indices, self.deltas, set_indices, self.set_values = lists
        step = CHUNK // stored.dtype.itemsize
        self.cut, self.set_cut = (Cut(part, stored.numel, step) for part in (indices, set_indices))
        self.base, self.set_base = (torch.empty(part.shape, dtype=stored.dtype) for part in (indices, set_indices))


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

    def prepare(self) -> None:
        """Nothing has to be worked out."""

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
    pending: Pending

    @property
    def claims(self) -> list[tuple[AdapterFile, Tensor | None]]:
        """The adapters that change it, and where the entries of each stand among all; None for all of them in order."""
        return list(zip(self.pending.chosen, self.pending.changes().positions, strict=True))

    def prove(self) -> None:
        """Compare the base of all its edits, which is known now, with the fingerprints of the adapters.

        Raises:
            ValueError: an adapter was trained on another base.
        """
        base, set_base = (torch.cat([getattr(edit, name) for edit in self.edits]) for name in ("base", "set_base"))
        for adapter, positions in self.claims:
            adapter.check_base(self.name, base if positions is None else base[positions])
            if "frozen" in adapter.targets[self.name]:
                adapter.check_frozen_base(self.name, set_base)


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


def edits_of(checkpoint: Checkpoint, adapters: Sequence[AdapterFile], rule: Rule = SUM) -> Edits:
    """What adapters change in a checkpoint.

    Several adapters, or one with a factor, are combined as `sprand.switch(model, {name: weight})` and `sprand.combine` do it: in
    float32, in their order, rounded once with the base.

    Raises:
        ValueError: a parameter is not in the checkpoint, in a dtype that is not trained, or an adapter is damaged.
    """
    shapes = {name: target["shape"] for adapter in adapters for name, target in adapter.targets.items()}
    saved = {name: values for adapter in adapters for name, values in adapter.heads.items()}
    places, names = resolve(checkpoint, shapes, saved)
    result = Edits({}, [], {})
    for name, tensors in places.items():
        whole = _combined(checkpoint, name, tensors, adapters, rule)
        for target in (whole, *_twins(checkpoint, whole)):
            result.targets.append(target)
            for edit in target.edits:
                _take(result, name, edit)
    for name, values in saved.items():
        stored = checkpoint.tensors.get(names[name])
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


def _combined(checkpoint: Checkpoint, name: str, tensors: Sequence[str], adapters: Sequence[AdapterFile], rule: Rule) -> Target:
    """One parameter of all adapters that train it, as edits of the tensors that hold it."""
    pieces = [checkpoint.tensors[tensor] for tensor in tensors]
    for stored in pieces:
        _trainable(stored)
    chosen = [adapter for adapter in adapters if name in adapter.targets]
    shape = chosen[0].targets[name]["shape"]
    for adapter in chosen:
        other = adapter.targets[name]["shape"]
        if other != shape:
            raise ValueError(f"{name} is {other} in {adapter.path} and {shape} in {chosen[0].path}")
    pending = Pending(name, chosen, adapters, rule, pieces[0].dtype)
    edits, begin = [], 0
    for stored in pieces:
        edits.append(Edit(stored, pending, begin))
        begin += stored.numel
    return Target(name, tuple(edits), pending)


def _twins(checkpoint: Checkpoint, target: Target) -> list[Target]:
    """The same change of tensors that are tied to this one and hold the same entries there."""
    if len(target.edits) > 1:
        return []
    edit, found = target.edits[0], []
    for name in twins(checkpoint, edit.stored.name):
        indices = torch.cat([edit.indices, edit.set_indices])
        one, two = (_bits(ops.gather(checkpoint.read(tensor), indices)) for tensor in (edit.stored.name, name))
        if torch.equal(one, two):
            found.append(Target(target.name, (Edit(checkpoint.tensors[name], target.pending),), target.pending))
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


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _same(stored: Stored, expected: Tensor, found: Tensor) -> None:
    if not torch.equal(_bits(expected), _bits(found)):
        raise ValueError(
            f"{stored.name} holds other values than the merge wrote: it was changed since, or other adapters or weights were "
            "merged"
        )


def read_bases(checkpoint: Checkpoint, edits: Edits, progress: Progress = lambda count: None) -> dict[str, Tensor]:
    """Read what every trained entry starts from, `[nnz]` by parameter name, and prove that it is the adapters' base.

    Raises:
        ValueError: an adapter was trained on another base.
    """
    found: dict[str, Tensor] = {}
    for target in edits.targets:
        for edit in target.edits:
            for part, first in checkpoint.chunks(edit.stored.name):
                edit.apply(part, first)
                progress(part.nbytes)
        target.prove()
        found.setdefault(target.name, torch.cat([edit.base for edit in target.edits]))
    return found


@contextmanager
def worked_out_ahead(checkpoint: Checkpoint, edits: Edits) -> Iterator[None]:
    """While the block runs, a thread draws and combines what changes in each tensor, in the order in which files are written.

    What is wrong with an adapter is raised where its changes are used.
    """
    order = [stored.name for shard in checkpoint.shards.values() for stored in shard.tensors if stored.name in edits.by_tensor]
    pool = ThreadPoolExecutor(1)
    try:
        for name in order:
            pool.submit(edits.by_tensor[name].prepare)
        yield
    finally:
        pool.shutdown(cancel_futures=True)


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
