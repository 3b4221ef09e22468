"""Modules that are replaced or resized after `apply`: entries go along with a weight that was copied, new rows train in full."""

from __future__ import annotations

import dataclasses
import math
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..kernels import ops
from ..layers import sharding
from ..layers.sites import joined, named_parameters, plain_name, sites_of, weights_of
from ..layers.units import Pattern, index_dtype
from ..selection.config import AS_GIVEN
from .attaching import activate, take_off
from .frozen import Frozen, nothing_frozen
from .in_full import buffers_of, changed, copies, first_of, fit_moments, take_unfrozen, with_rows
from .state import Adapter, State, known_state, watched

COPIED, OTHER, GONE, BACK = "copied", "other", "gone", "back"

_hooks: list[object] = []
_taken_out: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def watch() -> None:
    """Look at every module that takes the place of another one, in models that hold adapters."""
    if not _hooks:
        _hooks.append(register_module_module_registration_hook(_look))


def _look(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    old = parent._modules.get(name)
    if old is None or torch.compiler.is_compiling():
        return
    for model in list(watched):
        state = known_state(model)
        prefix = next((prefix for prefix, module in model.named_modules() if module is parent), None)
        is_wrapped = new is not None and new is not old and any(module is old for module in new.modules())
        if state is not None and prefix is not None and not is_wrapped:
            _Replacement(model, state, parent, name, plain_name(joined(prefix, name)), old, new).follow()


@dataclass
class _Replacement:
    """A module of a model that another one replaces, or that is set again since it was resized.

    Attributes:
        model: the model.
        state: what sprand keeps with it.
        parent, name: where the module is.
        path: its name in the model.
        old: the module that is there.
        new: the module that will be there; None for none.
        before, after: the parameters of both, by their names in the model.
        kinds: for each parameter that matters to an adapter, what becomes of it.
    """

    model: nn.Module
    state: State
    parent: nn.Module
    name: str
    path: str
    old: nn.Module
    new: nn.Module | None
    before: dict[str, nn.Parameter] = field(init=False)
    after: dict[str, nn.Parameter] = field(init=False)
    kinds: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.before, self.after = self._parameters(self.old), self._parameters(self.new)
        first = {id(p): name for name, p in named_parameters(self.model)}
        for name, p in list(self.after.items()):
            before = self.before.get(name)
            known_as = first.get(id(before), name)  # a tied one is known by its first name
            if before is not None and (p is before or known_as in self.state.base_saved):
                del self.before[name], self.after[name]
                self.before[known_as], self.after[known_as] = before, p
        kinds = {name: self._kind(name) for name in self.before | self.after}
        self.kinds = {name: kind for name, kind in kinds.items() if kind is not None and self._matters(name, kind)}

    def follow(self) -> None:
        """Let the adapters follow, and the module take its place.

        Raises:
            ValueError: The model is sharded, and an adapter trains something of the module; nothing has changed then.
        """
        state, buffers = self.state, copies(self._buffers())
        if self.kinds:
            sharding.refuse(self.model, f"replacing {self.path}", "replace and resize modules before the model is sharded")
            active, mixed, full = state.active, state.mixed, {name: p.data for name, p in self.after.items()}
            for name in self.kinds:
                self._cut_in_place(name)
            take_off(self.model, state, keep=False)
        self.parent._modules[self.name] = self.new
        self._remember_buffers(buffers)
        if self.kinds:
            for name, kind in self.kinds.items():
                if kind == COPIED:
                    self._carry(name, full[name])
                elif kind == OTHER:
                    self._forget(name)
            self._mark_gone()
            activate(self.model, state, active, mixed)
        after = {id(p) for p in self.after.values()}
        named = named_parameters(self.model, remove_duplicate=False)
        state.shapes |= {name: tuple(p.shape) for name, p in named if id(p) in after}
        self._train_again()

    def _parameters(self, module: nn.Module | None) -> dict[str, nn.Parameter]:
        named = () if module is None else module.named_parameters(remove_duplicate=False)
        return {joined(self.path, plain_name(name)): p for name, p in named if "sprand_" not in name}

    def _buffers(self) -> dict[str, Tensor]:
        """The buffers in the place of the module."""
        return {name: buffer for name, buffer in buffers_of(self.model).items() if name.startswith(f"{self.path}.")}

    def _kind(self, name: str) -> str | None:
        """What becomes of a parameter; None where it stays as it is."""
        before, after, shape = self.before.get(name), self.after.get(name), self.state.shapes.get(name)
        if after is None:
            return GONE
        if after is not before and any(after is p for p in self.old.parameters()):
            return None  # it has come out of a wrapper
        if before is None or shape is None:
            return BACK if self.new in _taken_out else OTHER
        if after is before:
            return None if after.shape == shape else COPIED if after.shape[1:] == shape[1:] else OTHER
        return COPIED if _holds_copy(after.data, before.data) else OTHER

    def _matters(self, name: str, kind: str) -> bool:
        """Whether an adapter is concerned: it trains the parameter, or a frozen one has got rows."""
        adapters = self.state.adapters.values()
        known = name in self.state.base_saved or any(name in adapter.patterns for adapter in adapters)
        if known or kind != COPIED:
            return known
        after, shape = self.after[name], self.state.shapes[name]
        return after.shape[0] > shape[0] and not after.requires_grad

    def _cut_in_place(self, name: str) -> None:
        """Where a weight itself has lost rows, drop its entries in them before any is written."""
        after = self.after.get(name)
        if after is None or after is not self.before.get(name):
            return
        for site in sites_of(self.model):
            if site.weight is not after:
                continue
            entries, indices = site.entries, site.entries.indices
            kept = int((indices < after.numel()).sum())
            for module, parameter in site.owners:
                module.put_entries(parameter, Pattern.of(indices[:kept].clone(), site.units), entries.base[:kept].clone())
            _resize(entries.delta, entries.delta.data[:kept].clone())
        for adapter in self.state.adapters.values():
            if name in adapter.frozen:
                adapter.frozen[name] = _below(adapter.frozen[name], after.numel())

    def _carry(self, name: str, full: Tensor) -> None:
        """Let what trains in a weight train in its copy, and in rows that are new all entries.

        Args:
            name: of the weight.
            full: what the copy held before the base was put back.
        """
        state, weight, before, shape = self.state, self.after[name], self.before[name], self.state.shapes[name]
        rows = min(shape[0], len(full))
        if name in state.base_saved:
            state.base_saved[name] = with_rows(state.base_saved[name], full)
            for adapter in state.adapters.values():
                if name in adapter.saved:
                    adapter.saved[name] = with_rows(adapter.saved[name], full)
            _resize(before, state.base_saved[name])
            fit_moments(before, torch.Size(shape))
            self._keep_parameter(weight, before)
            weight = before
        elif weight is not before:
            weight.data[:rows].copy_(before.data[:rows])
        concerned = [adapter for adapter in state.adapters.values() if name not in adapter.saved]
        is_new = any(name not in adapter.deltas for adapter in concerned)
        for adapter in concerned:
            _fit(adapter, name, weight.data, rows)
        if concerned and len(full) > rows:
            warnings.warn(
                f"{name} has {len(full) - rows:,} rows more than it had under sprand.apply: they train in full "
                f"({weight.numel() - rows * math.prod(shape[1:]):,} entries) and are saved with the adapter, which asks for a "
                "base that was resized alike; to leave them as they are, resize the model before sprand.apply"
                f"{'. An optimizer that was made before does not hold them: make it anew' if is_new else ''}",
                stacklevel=2,
            )

    def _keep_parameter(self, weight: nn.Parameter, kept: nn.Parameter) -> None:
        """Let modules hold, instead of a copy, the parameter that an optimizer knows."""
        for site in {id(site): site for site in weights_of(self.model).values()}.values():
            if site.weight is weight:
                for module, parameter in site.owners:
                    module._parameters[parameter] = kept

    def _forget(self, name: str) -> None:
        """Drop what trained in a weight that was replaced by another one."""
        state, weight = self.state, self.after[name]
        trained = [adapter.patterns.pop(name) for adapter in state.adapters.values() if name in adapter.patterns]
        for adapter in state.adapters.values():
            for part in (adapter.deltas, adapter.frozen, adapter.added):
                part.pop(name, None)
        if name in state.base_saved:
            state.base_saved[name] = weight.data.clone()
            for adapter in state.adapters.values():
                if name in adapter.saved and (adapter is state.current or adapter.saved[name].shape == weight.shape):
                    adapter.saved[name] = weight.data.clone()
        if trained:
            warnings.warn(
                f"{name}, of which sprand trained {trained[0].nnz:,} entries, was replaced by another weight, and they are "
                "dropped; the new one trains in full if it requires a gradient. To train entries of it, replace it before "
                "sprand.apply",
                stacklevel=2,
            )

    def _mark_gone(self) -> None:
        """Say which weights are out of the model; their entries wait for them."""
        gone = [name for name, kind in self.kinds.items() if kind == GONE]
        if gone:
            _taken_out.update(self.old.modules())
            warnings.warn(
                f"{first_of(gone)}, which sprand trains, was taken out of the model: it holds its base now, and what it learned "
                "is back when the same module is",
                stacklevel=2,
            )

    def _remember_buffers(self, before: Mapping[str, Tensor]) -> None:
        """Of buffers that are no copies of what was there, what they hold now is the base."""
        new = changed(self._buffers(), before)
        self.state.base_buffers |= copies(new)
        for adapter in self.state.adapters.values():
            adapter.buffers = {name: value for name, value in adapter.buffers.items() if name not in new}

    def _train_again(self) -> None:
        """Let entries require a gradient where the module's parameters were told not to, and let new parameters train."""
        if self.state.current is None or self.state.mixed is not None:
            return
        inside = set() if self.new is None else set(self.new.modules())
        for site in sites_of(self.model):
            if any(module in inside for module, _ in site.owners):
                site.entries.delta.requires_grad_(True)
        take_unfrozen(self.model, self.state)


def _holds_copy(weight: Tensor, other: Tensor) -> bool:
    """Whether two weights are alike but for the number of their rows."""
    if weight.dtype != other.dtype or weight.dim() == 0 or weight.shape[1:] != other.shape[1:]:
        return False
    if weight.is_meta or sharding.is_sharded(weight) or sharding.is_sharded(other):
        return False
    rows = min(len(weight), len(other))
    return torch.equal(weight[:rows], other[:rows].to(weight.device))


def _below(frozen: Frozen, limit: int) -> Frozen:
    """The frozen entries at positions below a limit."""
    kept = int((frozen.indices < limit).sum())
    return Frozen(frozen.indices[:kept], frozen.values[:kept], frozen.base[:kept])


def _fit(adapter: Adapter, name: str, weight: Tensor, rows: int) -> None:
    """Let an adapter train, of a weight that has its base, its entries in the first rows, and all entries in further ones."""
    limit = rows * math.prod(weight.shape[1:])
    pattern = adapter.patterns.get(name)
    if pattern is None and limit == weight.numel():
        return
    added = torch.arange(limit, weight.numel(), dtype=index_dtype(weight.numel()), device=weight.device)
    indices = added[:0] if pattern is None else pattern.indices
    kept = indices[indices < limit].to(added)
    adapter.patterns[name] = Pattern(torch.cat([kept, added]))
    zeros = torch.zeros(adapter.patterns[name].chosen.shape, dtype=ops.accumulation_dtype(weight.dtype), device=weight.device)
    delta = adapter.deltas.setdefault(name, nn.Parameter(zeros[:0]))
    _resize(delta, with_rows(delta.data[: kept.numel()], zeros))
    adapter.config = dataclasses.replace(adapter.config, **AS_GIVEN)
    if name in adapter.added:
        adapter.added[name] = min(adapter.added[name], rows)
    if added.numel():
        values = ops.gather(weight, added)
        frozen = _below(adapter.frozen.get(name, nothing_frozen(kept[:0], values[:0])), limit)
        parts = zip((frozen.indices, frozen.values, frozen.base), (added, values, values), strict=True)
        adapter.frozen[name] = Frozen(*(torch.cat([part.to(more), more]) for part, more in parts))
        adapter.added.setdefault(name, rows)


def _resize(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter more or fewer rows, and what optimizers keep of it."""
    before = parameter.shape
    parameter.grad = None
    parameter.data = values
    fit_moments(parameter, before)
