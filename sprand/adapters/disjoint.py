"""What others train, so that a choice of entries leaves it out: adapters in the model, saved ones, masks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..files import described
from ..kernels import host
from ..layers.sites import named_parameters
from ..selection import pattern
from ..selection.config import SparseConfig
from ..selection.mask import selection_of
from ..selection.targets import Targets, View
from .file import AdapterFile
from .state import known_state

Entries = Mapping[str, Tensor] | str | os.PathLike[str]  # a mask, or indices by parameter name; or the folder of an adapter
Disjoint = bool | Entries | Sequence[Entries] | None
Shapes = Mapping[str, tuple[int, ...]]
DRAW = ("strategy", "density", "budget", "layout", "seed")  # the fields that say how entries were drawn at random


@dataclass(frozen=True)
class Taken:
    """The entries that an adapter or a mask trains.

    Attributes:
        name: what it is called in records.
        indices: `[nnz]` by parameter name, flat, ascending.
    """

    name: str
    indices: dict[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """What a record says of it, as JSON types."""
        nnz = sum(indices.numel() for indices in self.indices.values())
        return {"name": self.name, "nnz": nnz, "checksum": described.checksum(self.indices)}


def taken_by(model: nn.Module, disjoint: Disjoint) -> list[Taken]:
    """The entries to leave out, of each adapter or mask.

    Args:
        model: it may hold adapters.
        disjoint: as in `sprand.select`.

    Raises:
        FileNotFoundError: A folder holds no adapter.
        ValueError: An adapter or mask is damaged, or was made for a model with other parameters.
    """
    if disjoint is None or disjoint is False:
        return []
    if disjoint is True:
        return _taken_in(model)
    given = [disjoint] if isinstance(disjoint, (str, os.PathLike, Mapping)) else list(disjoint)
    shapes = {name: tuple(p.shape) for name, p in named_parameters(model, remove_duplicate=False)}
    return [_taken(item, shapes) for item in given]


def avoided(view: View, targets: Targets, taken: Sequence[Taken]) -> dict[str, Tensor]:
    """The entries of each target that others train, ascending, on its device."""
    lists: dict[str, list[Tensor]] = {}
    for other in taken:
        for name, indices in other.indices.items():
            first_name = view.weights[name].name
            lists.setdefault(first_name, []).append(indices.cpu())
    unions = {}
    for site in targets.sites:
        if site.name in lists:
            union, _ = host.merge_indices(lists[site.name])
            unions[site.name] = union.to(site.device)
    return unions


def selection_without(config: SparseConfig, taken: Sequence[Taken]) -> dict[str, Any] | None:
    """How entries are chosen, as JSON types, with what they leave out."""
    selection = selection_of(config)
    if not taken:
        return selection
    if selection is None and isinstance(config.strategy, Mapping):
        selection = {"strategy": pattern.GIVEN}
    elif selection is None:
        selection = {field: getattr(config, field) for field in DRAW}
    return selection | {"disjoint": [other.to_dict() for other in taken]}


def _taken_in(model: nn.Module) -> list[Taken]:
    """What the adapters of the model train."""
    state = known_state(model)
    if state is None:
        return []
    taken = []
    for name, adapter in state.adapters.items():
        frozen = {key: entries.indices for key, entries in adapter.frozen.items()}
        taken.append(Taken(name, _joined(adapter.indices, frozen)))
    return taken


def _taken(item: Entries, shapes: Shapes) -> Taken:
    if isinstance(item, Mapping):
        return _taken_by_mask(item, shapes)
    if not isinstance(item, (str, os.PathLike)):
        raise ValueError(f"disjoint: expected True, folders of adapters, masks or indices by name, got {type(item).__name__}")
    file = AdapterFile.read(item)
    own, frozen = {}, {}
    for name, target in file.targets.items():
        _check_shape(str(file.path), name, tuple(target["shape"]), shapes)
        own[name], _ = file.entries(name)
        left = file.frozen(name)
        if left is not None:
            frozen[name], _ = left
    return Taken(described.label(file.path), _joined(own, frozen))


def _taken_by_mask(mask: Mapping[str, Tensor], shapes: Shapes) -> Taken:
    own = getattr(mask, "shapes", {})
    for name in mask:
        _check_shape("disjoint", name, own.get(name), shapes)
    return Taken("mask", {name: pattern.from_user(f"disjoint: {name}", value, shapes[name]) for name, value in mask.items()})


def _check_shape(what: str, name: str, shape: tuple[int, ...] | None, shapes: Shapes) -> None:
    if name not in shapes:
        raise ValueError(f"{what} was made for another model: this one has no parameter {name!r}")
    here = shapes[name]
    if shape is not None and tuple(shape) != here:
        raise ValueError(f"{what} was made for another model: {name} is {list(here)} here and {list(shape)} there")


def _joined(own: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ascending indices by name, of entries that train and of frozen ones."""
    joined = {name: indices.cpu() for name, indices in own.items()}
    for name, indices in frozen.items():
        lists = [indices.cpu()]
        if name in joined:
            lists.append(joined[name])
        joined[name] = host.merge_indices(lists)[0]
    return joined
