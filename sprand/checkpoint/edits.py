"""What adapters change in the tensors of a checkpoint, and the proof that it is the base they were trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters.combining import SUM, Rule
from ..adapters.file import AdapterFile
from ..kernels import ops
from .conversion import Place
from .entries import PendingEntries
from .names import is_tied, resolve, twins
from .shards import TRAINABLE, Checkpoint, Stored
from .stream import Progress
from .tensor_edits import Edit, Overwrite, bits


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
    def shape(self) -> tuple[int, ...]:
        """Its shape in the model."""
        return tuple(self.pending.chosen[0].targets[self.name]["shape"])

    @property
    def numel(self) -> int:
        """How many entries the tensors have that hold it."""
        return sum(edit.stored.numel for edit in self.edits)

    @property
    def base(self) -> Tensor:
        """What its trained entries started from, `[nnz]`; known once all its edits were applied."""
        return self._bases()[0]

    @property
    def frozen_base(self) -> Tensor:
        """What its frozen entries held before, `[n]`; known once all its edits were applied."""
        return self._bases()[1]

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
        base, frozen_base = self._bases()
        for adapter, positions in self.claims:
            adapter.check_base(self.name, base if positions is None else base[positions])
            if "frozen" in adapter.targets[self.name]:
                adapter.check_frozen_base(self.name, frozen_base)

    def _bases(self) -> tuple[Tensor, Tensor]:
        parts = zip(*(edit.bases(self.pending) for edit in self.edits), strict=True)
        trained, frozen = (placed.restored(torch.cat(part)) for placed, part in zip(self.pending.placed(), parts, strict=True))
        return trained, frozen


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

    def take(self, name: str, edit: Edit | Overwrite) -> Edit | Overwrite:
        """Add the edit of a tensor for a parameter.

        Returns:
            The edit of that tensor, which is another one where the tensor holds entries of several parameters.

        Raises:
            ValueError: Another parameter changes the same entries already.
        """
        tensor = edit.stored.name
        there = self.by_tensor.setdefault(tensor, edit)
        if there is not edit:
            edits = [one for one in (there, edit) if isinstance(one, Edit)]
            if len(edits) < 2 or any(pending.place.rows is None for one in edits for pending, _ in one.claims):
                raise ValueError(f"{name} and another parameter of the adapters are one tensor of the checkpoint, {tensor}")
            there.claims += edit.claims
        return there


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
    classes = [adapter.architecture["classes"] for adapter in adapters if adapter.architecture]
    places, head_places = resolve(checkpoint, shapes, heads, classes)
    edits = Edits({}, [], {})
    for name, place in places.items():
        parameter = _edited(checkpoint, name, place, adapters, rule)
        for one in (parameter, *_tied(checkpoint, parameter)):
            edits.parameters.append(replace(one, edits=tuple(edits.take(name, edit) for edit in one.edits)))
    for name, values in heads.items():
        _overwrite(edits, checkpoint, name, values, head_places[name])
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


def _edited(checkpoint: Checkpoint, name: str, place: Place, adapters: Sequence[AdapterFile], rule: Rule) -> EditedParameter:
    """One parameter of all adapters that train it, as edits of the tensors that hold it."""
    parts = [checkpoint.tensors[tensor] for tensor in place.tensors]
    for stored in parts:
        _refuse_untrainable(stored)
    pending = PendingEntries(name, adapters, rule, parts[0].dtype, place)
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
    if len(parameter.edits) > 1 or parameter.pending.place.rows is not None:
        return []
    (edit,), pending = parameter.edits, parameter.pending
    tied = []
    for name in twins(checkpoint, edit.stored.name):
        indices = torch.cat([edit.trained.indices, edit.frozen.indices])
        own, other = (ops.gather(checkpoint.read(tensor), indices) for tensor in (edit.stored.name, name))
        if torch.equal(bits(own), bits(other)):
            tied.append(EditedParameter(parameter.name, (Edit(checkpoint.tensors[name], pending),), pending))
    return tied


def _overwrite(edits: Edits, checkpoint: Checkpoint, name: str, values: Tensor, place: Place) -> None:
    """Add a parameter that was trained in full."""
    if place.tensors[0] not in checkpoint.tensors:
        edits.added[place.tensors[0]] = values
        return
    parts = [checkpoint.tensors[tensor] for tensor in place.tensors]
    shape, moved = list(parts[0].shape), len(parts) > 1 or place.rows is not None
    if sum(stored.numel for stored in parts) != values.numel() or (shape != list(values.shape) and not moved):
        raise ValueError(
            f"{name} was trained in full as {list(values.shape)}, and {checkpoint.folder} holds "
            f"{f'it with others in {parts[0].name} ' if moved else ''}{shape}; give a base without it, or one of its shape"
        )
    flat = torch.empty_like(values.flatten())
    flat[place.positions(torch.arange(values.numel()))] = values.flatten()
    for stored, own in zip(parts, flat.split([stored.numel for stored in parts]), strict=True):
        if stored.dtype != values.dtype:  # a buffer may be of whole numbers in both
            _refuse_untrainable(stored)
        edits.take(name, Overwrite(stored, own.to(stored.dtype)))
        for twin in twins(checkpoint, stored.name):
            if torch.equal(bits(checkpoint.read(twin)), bits(checkpoint.read(stored.name))):
                edits.take(name, Overwrite(checkpoint.tensors[twin], own.to(stored.dtype)))


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
