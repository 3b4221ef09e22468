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
from .entries import PartedEntries, PendingEntries
from .names import is_tied, resolve, twins
from .shards import TRAINABLE, Checkpoint, Stored
from .stream import Progress


class Edit:
    """The entries of one tensor that adapters change: `cast(base + delta)`, rounded once, over frozen entries.

    Args:
        stored: the tensor.
        pending: the entries of the parameter that it is, or is a part of.
        begin: the position of its first entry in the parameter.
    """

    def __init__(self, stored: Stored, pending: PendingEntries, begin: int = 0) -> None:
        self.stored, self.pending, self.begin = stored, pending, begin
        self._lock = threading.Lock()
        self._entries: tuple[PartedEntries, PartedEntries] | None = None

    @property
    def trained(self) -> PartedEntries:
        """The entries that have a delta, and their deltas, float32 (float64 for float64 tensors).

        Raises:
            ValueError: An adapter is damaged.
        """
        return self.prepare()[0]

    @property
    def frozen(self) -> PartedEntries:
        """The frozen entries, which lie under the deltas, and their values.

        Raises:
            ValueError: An adapter is damaged.
        """
        return self.prepare()[1]

    def prepare(self) -> tuple[PartedEntries, PartedEntries]:
        """Work the entries out, if that has not been done yet."""
        with self._lock:
            if self._entries is None:
                whole = self.pending.entries()
                trained = PartedEntries(self.stored, whole.indices, whole.deltas, self.begin)
                frozen = PartedEntries(self.stored, whole.frozen_indices, whole.frozen_values, self.begin)
                self._entries = trained, frozen
            return self._entries

    def touches(self, first: int, count: int) -> bool:
        """Whether it changes any of `count` entries from `first` on."""
        return any(entries.touch(first, count) for entries in self.prepare())

    def apply(self, part: Tensor, first: int) -> None:
        """Change a part of the tensor, flat, in place; `first` is the position of its first entry."""
        trained, frozen = self.prepare()
        own, places = trained.within(first, part.numel())
        start = trained.base[own] = ops.gather(part, places)
        if frozen.indices.numel():
            under, frozen_places = frozen.within(first, part.numel())
            frozen.base[under] = ops.gather(part, frozen_places)
            ops.patch_(part, frozen_places, frozen.values[under], None)
            start = ops.gather(part, places)
        ops.patch_(part, places, start, trained.values[own])

    def restore(self, part: Tensor, first: int) -> None:
        """Put the base back into a part that holds the trained values.

        Raises:
            ValueError: The part holds other values.
        """
        before = self._held(part, first)
        self._put_base(part, first)
        self.apply(part, first)
        for made, held in zip(self._held(part, first), before, strict=True):
            _same(self.stored, made, held)
        self._put_base(part, first)

    def _held(self, part: Tensor, first: int) -> list[Tensor]:
        return [entries.held(part, first) for entries in self.prepare()]

    def _put_base(self, part: Tensor, first: int) -> None:
        self.frozen.put_base(part, first)
        self.trained.put_base(part, first)


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
        """Do nothing: all is known."""

    def touches(self, first: int, count: int) -> bool:
        """Every entry changes."""
        return True

    def apply(self, part: Tensor, first: int) -> None:
        """Change a part of the tensor, flat, in place; `first` is the position of its first entry."""
        own = slice(first, first + part.numel())
        self.base[own] = part
        part.copy_(self.values[own])

    def restore(self, part: Tensor, first: int) -> None:
        """Put the base back into a part that holds the trained values.

        Raises:
            ValueError: The part holds other values.
        """
        own = slice(first, first + part.numel())
        _same(self.stored, self.values[own], part)
        part.copy_(self.base[own])


@dataclass(eq=False)
class EditedParameter:
    """One parameter of the adapters, the edits of the tensors that hold it, and what proves their base."""

    name: str
    edits: tuple[Edit, ...]
    pending: PendingEntries

    @property
    def claims(self) -> list[tuple[AdapterFile, Tensor | None]]:
        """The adapters that change it, and where the entries of each stand among all; None for all of them in order."""
        return list(zip(self.pending.chosen, self.pending.entries().positions, strict=True))

    @property
    def numel(self) -> int:
        """How many entries the tensors have that hold it."""
        return sum(edit.stored.numel for edit in self.edits)

    @property
    def base(self) -> Tensor:
        """What its trained entries started from, `[nnz]`; known once all its edits were applied."""
        return torch.cat([edit.trained.base for edit in self.edits])

    def apply(self, checkpoint: Checkpoint, progress: Progress = lambda count: None) -> None:
        """Apply its edits to what is read of the checkpoint, so that their base is known, and prove that."""
        for edit in self.edits:
            for part, first in checkpoint.chunks(edit.stored.name):
                edit.apply(part, first)
                progress(part.nbytes)
        self.prove()

    def prove(self) -> None:
        """Compare the base of all its edits, which is known now, with the fingerprints of the adapters.

        Raises:
            ValueError: An adapter was trained on another base.
        """
        base, frozen_base = self.base, torch.cat([edit.frozen.base for edit in self.edits])
        for adapter, positions in self.claims:
            adapter.check_base(self.name, base if positions is None else base[positions])
            if "frozen" in adapter.targets[self.name]:
                adapter.check_frozen_base(self.name, frozen_base)


@dataclass
class Edits:
    """All that adapters change in a checkpoint.

    Attributes:
        by_tensor: the edit of each changed tensor by its name in the checkpoint.
        parameters: the parameters of the adapters.
        added: tensors that the checkpoint does not have, such as a new head.
    """

    by_tensor: dict[str, Edit | Overwrite]
    parameters: list[EditedParameter]
    added: dict[str, Tensor]

    @property
    def count(self) -> int:
        """How many entries are changed or added."""
        return sum(values.numel() for values in (*self.base_values().values(), *self.added.values()))

    def prove(self) -> None:
        """Prove the base of every parameter; all edits were applied.

        Raises:
            ValueError: An adapter was trained on another base.
        """
        for parameter in self.parameters:
            parameter.prove()

    def base_values(self) -> dict[str, Tensor]:
        """What the changed tensors held before, by their names after `base.`, `set.` (frozen entries) and `whole.`."""
        values: dict[str, Tensor] = {}
        for name, edit in self.by_tensor.items():
            if isinstance(edit, Overwrite):
                values[f"whole.{name}"] = edit.base
                continue
            values[f"base.{name}"] = edit.trained.base
            if edit.frozen.indices.numel():
                values[f"set.{name}"] = edit.frozen.base
        return values

    @contextmanager
    def worked_out_ahead(self, checkpoint: Checkpoint) -> Iterator[None]:
        """While the block runs, a thread draws and combines what changes in each tensor, in the order of the files.

        What is wrong with an adapter is raised where its changes are used.
        """
        names = (stored.name for shard in checkpoint.shards.values() for stored in shard.tensors)
        pool = ThreadPoolExecutor(1)
        try:
            for name in names:
                if name in self.by_tensor:
                    pool.submit(self.by_tensor[name].prepare)
            yield
        finally:
            pool.shutdown(cancel_futures=True)

    def take(self, name: str, edit: Edit | Overwrite) -> None:
        """Add the edit of a tensor for a parameter.

        Raises:
            ValueError: Another parameter changes this tensor already.
        """
        tensor = edit.stored.name
        if tensor in self.by_tensor:
            raise ValueError(f"{name} and another parameter of the adapters are one tensor of the checkpoint, {tensor}")
        self.by_tensor[tensor] = edit


def edits_of(checkpoint: Checkpoint, adapters: Sequence[AdapterFile], rule: Rule = SUM) -> Edits:
    """What adapters change in a checkpoint.

    Several adapters, or one with a factor, are combined as `sprand.switch(model, {name: weight})` and `sprand.combine` do it: in
    float32, in their order, rounded once with the base.

    Raises:
        ValueError: A parameter is not in the checkpoint, in a dtype that is not trained, or an adapter is damaged.
    """
    shapes = {name: target["shape"] for adapter in adapters for name, target in adapter.targets.items()}
    heads = {name: values for adapter in adapters for name, values in adapter.heads.items()}
    for adapter in adapters:
        _refuse_tied_copies(checkpoint, adapter)
    tensors, head_names = resolve(checkpoint, shapes, heads)
    edits = Edits({}, [], {})
    for name, parts in tensors.items():
        parameter = _edited(checkpoint, name, parts, adapters, rule)
        for one in (parameter, *_tied(checkpoint, parameter)):
            edits.parameters.append(one)
            for edit in one.edits:
                edits.take(name, edit)
    _overwrite(edits, checkpoint, heads, head_names)
    return edits


def read_bases(checkpoint: Checkpoint, edits: Edits, progress: Progress = lambda count: None) -> dict[str, Tensor]:
    """Read what every trained entry starts from, `[nnz]` by parameter name, and prove that it is the adapters' base.

    Raises:
        ValueError: An adapter was trained on another base.
    """
    bases: dict[str, Tensor] = {}
    for parameter in edits.parameters:
        parameter.apply(checkpoint, progress)
        bases.setdefault(parameter.name, parameter.base)
    return bases


def _edited(
    checkpoint: Checkpoint, name: str, tensors: Sequence[str], adapters: Sequence[AdapterFile], rule: Rule
) -> EditedParameter:
    """One parameter of all adapters that train it, as edits of the tensors that hold it."""
    parts = [checkpoint.tensors[tensor] for tensor in tensors]
    for stored in parts:
        _refuse_untrainable(stored)
    pending = PendingEntries(name, adapters, rule, parts[0].dtype)
    first, *others = pending.chosen
    shape = first.targets[name]["shape"]
    for adapter in others:
        other = adapter.targets[name]["shape"]
        if other != shape:
            raise ValueError(f"{name} is {other} in {adapter.path} and {shape} in {first.path}")
    edits, begin = [], 0
    for stored in parts:
        edits.append(Edit(stored, pending, begin))
        begin += stored.numel
    return EditedParameter(name, tuple(edits), pending)


def _tied(checkpoint: Checkpoint, parameter: EditedParameter) -> list[EditedParameter]:
    """The same change of tensors that are tied to this one and hold the same entries there."""
    if len(parameter.edits) > 1:
        return []
    (edit,), pending = parameter.edits, parameter.pending
    tied = []
    for name in twins(checkpoint, edit.stored.name):
        indices = torch.cat([edit.trained.indices, edit.frozen.indices])
        own, other = (ops.gather(checkpoint.read(tensor), indices) for tensor in (edit.stored.name, name))
        if torch.equal(_bits(own), _bits(other)):
            tied.append(EditedParameter(parameter.name, (Edit(checkpoint.tensors[name], pending),), pending))
    return tied


def _overwrite(edits: Edits, checkpoint: Checkpoint, heads: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Add the parameters that were trained in full, of which `names` are those in the checkpoint."""
    for name, values in heads.items():
        stored = checkpoint.tensors.get(names[name])
        if stored is None:
            edits.added[names[name]] = values
            continue
        if list(stored.shape) != list(values.shape):
            raise ValueError(
                f"{name} was trained in full as {list(values.shape)}, and {checkpoint.folder} holds {list(stored.shape)}; give a "
                "base without it, or one of its shape"
            )
        if stored.dtype != values.dtype:  # a buffer may be of whole numbers in both
            _refuse_untrainable(stored)
        edits.take(name, Overwrite(stored, values.flatten().to(stored.dtype)))
        for twin in twins(checkpoint, stored.name):
            if torch.equal(_bits(checkpoint.read(twin)), _bits(checkpoint.read(stored.name))):
                edits.take(name, Overwrite(checkpoint.tensors[twin], values.flatten().to(stored.dtype)))


def _refuse_tied_copies(checkpoint: Checkpoint, adapter: AdapterFile) -> None:
    for name in adapter.heads if adapter.copied_heads else ():
        if is_tied(checkpoint, name):
            raise ValueError(
                f"{adapter.path} trained a copy of {name} through PEFT, and {checkpoint.folder} ties it to another weight, which "
                "stayed as it was; merge by PeftModel.from_pretrained, or give a base that does not tie them"
            )


def _refuse_untrainable(stored: Stored) -> None:
    if stored.dtype not in TRAINABLE:
        raise ValueError(
            f"{stored.name} is stored as {stored.code}; expected F64, F32, F16 or BF16: merge into the checkpoint that is not "
            "quantized"
        )


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _same(stored: Stored, expected: Tensor, held: Tensor) -> None:
    if not torch.equal(_bits(expected), _bits(held)):
        raise ValueError(
            f"{stored.name} holds other values than the merge wrote: it was changed since, or other adapters or weights were "
            "merged"
        )
