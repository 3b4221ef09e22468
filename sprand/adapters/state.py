"""What sprand keeps with a model: its adapters, which one is active, and the entries that train now."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layers.module import sparse_modules
from ..layers.sites import Site, joined, named_modules, named_parameters, sites_of
from ..layers.units import Pattern
from ..selection.config import SparseConfig
from ..selection.mask import Mask
from .frozen import Frozen

watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that hold adapters, as far as they are known


@dataclass
class Adapter:
    """A set of trained entries, attached to the model or set aside.

    Attributes:
        config: what it was made from.
        patterns: which entries, by parameter name.
        deltas: trained changes by parameter name.
        saved: values of the parameters that train in full, by name: those of `modules_to_save`, and what was unfrozen by hand.
        buffers: values of the model's buffers as its training left them, by name.
        frozen: entries that trained under an earlier mask, and those of rows that were added, by parameter name.
        added: the first row that a parameter was given after `apply`, by its name.
        selection: how the entries were chosen, where not by a random draw: fields of `SparseConfig` as JSON types.
        waiting: the columns `[c]` that keep the place of those which are chosen while the model trains, by parameter name.
    """

    config: SparseConfig
    patterns: dict[str, Pattern] = field(default_factory=dict)
    deltas: dict[str, nn.Parameter] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Frozen] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)
    selection: dict[str, Any] | None = None
    waiting: dict[str, Tensor] = field(default_factory=dict)

    @property
    def indices(self) -> dict[str, Tensor]:
        """The flat indices `[nnz]` by parameter name; those of whole columns are made anew at each call."""
        return {name: pattern.indices for name, pattern in self.patterns.items()}


@dataclass
class State:
    """What sprand keeps with a model: its adapters, which one is active, and what the model was before.

    Attributes:
        adapters: by name.
        active: the name of the one whose entries are attached; None for the base, or a mixture.
        mixed: several adapters as one.
        trained_before: the parameters that required a gradient before the first adapter.
        base_saved: the base of parameters that an adapter trains in full, by name.
        base_buffers: the base of buffers that training may change, by name.
        shapes: of all parameters, by name.
        takes_plain_states: whether a state without entries is no error, since the caller brings them back.
        handles: of hooks on the model.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    mixed: Adapter | None = None
    trained_before: set[str] = field(default_factory=set)
    base_saved: dict[str, Tensor] = field(default_factory=dict)
    base_buffers: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    takes_plain_states: bool = False
    handles: list[RemovableHandle] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """A copy, for a copy of the model, which is watched as well."""
        fields = {field.name: copy.deepcopy(getattr(self, field.name), memo) for field in dataclasses.fields(self)}
        watched.update([memo[id(model)] for model in watched if known_state(model) is self and id(model) in memo])
        return State(**fields)

    @property
    def current(self) -> Adapter | None:
        """The adapter whose entries are attached now."""
        return self.mixed or (self.adapters[self.active] if self.active is not None else None)


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter may hold in full, by every name: a model's parameters, and the buffers that it saves."""
    buffers = {
        joined(prefix, name): buffer
        for prefix, module in named_modules(model)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return dict(named_parameters(model, remove_duplicate=False)) | buffers


def known_state(model: nn.Module) -> State | None:
    """What sprand keeps with a model; None of a model that no adapter was put on."""
    return getattr(model, "_sprand", None)


def state_of(model: nn.Module) -> State:
    """What sprand keeps with a model.

    Raises:
        ValueError: Nothing was applied to or loaded into this model.
    """
    state = known_state(model)
    if state is None:
        raise ValueError(
            "this model has no trained entries; call sprand.apply(model, ...) or sprand.load(model, path) first (and pass the "
            "model itself, not its DataParallel wrapper)"
        )
    return state


def active_sites(model: nn.Module) -> list[Site]:
    """The weights whose entries train now, of a model of `sprand.apply` or of PEFT.

    Raises:
        ValueError: The model has no trained entries, or no adapter is active.
    """
    sites = sites_of(model)
    if not sites and hasattr(model, "peft_config"):
        raise ValueError("no adapter of this PEFT model is active; call model.set_adapter(name) first")
    if not sites and state_of(model).current is None:
        raise ValueError("no adapter is active, so nothing trains; call sprand.switch(model, name) first")
    return sites


def mask_of(model: nn.Module) -> Mask:
    """The entries that a model of `sprand.apply` trains, as a mask.

    Raises:
        ValueError: The model has no trained entries, or no adapter is active.
    """
    state, sites = state_of(model), active_sites(model)
    indices = {site.name: site.entries.indices for site in sites}
    shapes = {site.name: site.shape for site in sites}
    return Mask(indices, shapes, state.current.selection)


def tensor_names(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """The names, in the state of a model, of delta, indices and base of every targeted parameter of every module."""
    for prefix, module in sparse_modules(model):
        for delta, indices, base in module.sparse_tensors():
            yield joined(prefix, delta), joined(prefix, indices), joined(prefix, base)
