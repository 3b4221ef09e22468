"""One parameter of a base model, and what the adapters of a PEFT layer train of it: deltas, positions and base, by adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.host import merge_indices
from ..layers import sharding
from ..layers.entries import Entries, Schedules, Written
from ..layers.units import Pattern, Units
from .config import SprandConfig

Names = tuple[str, ...]  # of adapters, in their order

_settling = threading.RLock()


class Delta(nn.Module):
    """One adapter's delta `[nnz]`, as `weight`: it follows its module to a device, and keeps its dtype where that is cast.

    It is a module of its own so that its name ends in `.default.weight`, by which TRL copies an adapter into its reference.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = self.weight.data
        super()._apply(fn, recurse)
        if before.is_meta and not self.weight.is_meta:
            self.weight.data.zero_()
        elif self.weight.dtype != before.dtype:
            self.weight.data = before.to(self.weight.device)
        return self


class Deltas(Mapping[str, nn.Parameter]):
    """The parameters of a dict of `Delta`s, by adapter."""

    def __init__(self, modules: nn.ModuleDict) -> None:
        self.modules = modules

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.modules[name].weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


class Positions(BufferDict):
    """Patterns by adapter: whole columns are kept as such, and given as flat indices like all others, also to a state.

    Attributes:
        replaced: the adapters whose entries were replaced by others, as a checkpoint does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replaced: set[str] = set()
        self._columns: Units | None = None
        self._by_columns: set[str] = set()

    def put(self, name: str, indices: Tensor, columns: Units, persistent: bool) -> None:
        """Keep the entries of an adapter.

        Args:
            name: of the adapter.
            indices: `[nnz]`, flat, in any order.
            columns: of the weight, see `Site.units`.
            persistent: whether they are in `state_dict`.
        """
        self._columns = columns
        self._buffers.pop(name, None)
        self.register_buffer(name, self._chosen(name, indices), persistent=persistent)
        self.replaced.add(name)

    def replace(self, name: str, indices: Tensor) -> None:
        """Give an adapter as many other entries `[nnz]`; its tensor is kept where it can be: a graph may hold it."""
        chosen, own = self._chosen(name, indices), self._buffers[name]
        self._buffers[name] = own.copy_(chosen) if own.shape == chosen.shape else chosen
        self.replaced.add(name)

    def pattern(self, name: str) -> Pattern:
        """The pattern of an adapter."""
        return Pattern(self._buffers[name], self._columns if name in self._by_columns else None)

    def made_of(self, indices: Tensor) -> Pattern:
        """The pattern of flat indices `[nnz]`."""
        return Pattern.of(indices, self._columns)

    def move(self, name: str, device: torch.device) -> None:
        """Have the pattern of an adapter on a device."""
        self._buffers[name] = self._buffers[name].to(device)

    def _chosen(self, name: str, indices: Tensor) -> Tensor:
        pattern = self.made_of(indices)
        (self._by_columns.discard if pattern.columns is None else self._by_columns.add)(name)
        return pattern.chosen

    def __setattr__(self, name: str, value: Any) -> None:
        """Flat indices that a loader assigns, as that of transformers does, replace those of an adapter."""
        if isinstance(value, Tensor) and name in self._buffers:
            self.replaced.add(name)
            value = self._chosen(name, value)
        super().__setattr__(name, value)

    def __getitem__(self, name: str) -> Tensor:
        """The flat indices of an adapter; of columns they are made anew at each call."""
        return self.pattern(name).indices

    def _replicate_for_data_parallel(self) -> nn.Module:
        """A replica is given copies of its buffers, which replace nothing."""
        replica = super()._replicate_for_data_parallel()
        replica.replaced = set()
        return replica

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._by_columns:
            if prefix + name in destination:
                destination[prefix + name] = self[name]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = {name for name in self if prefix + name in state_dict}
        for name in given:
            indices, own = state_dict[prefix + name], self._buffers[name]
            if indices.numel() == self.pattern(name).nnz:
                state_dict[prefix + name] = chosen = self._chosen(name, indices)
                self._buffers[name] = own if own.shape == chosen.shape else torch.empty_like(chosen, device=own.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.replaced |= given

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for name, indices in self._buffers.items():
            device = fn(indices).device
            if device.type != "meta":  # they cannot be made again from nothing
                self._buffers[name] = indices.to(device)
        return self


class AdapterTarget:
    """One parameter of a base model, and the entries that each adapter trains of it.

    Attributes:
        name: the parameter's name in the base model.
        deltas, indices, bases: by adapter; the containers of the PEFT layer.
        scales: factor on each adapter's delta; 1 where it says nothing.
        active: adapters that a forward uses now, in their order.
        merged: adapters that are merged into the weight.
        written: whether the weight holds the delta of the one active adapter already.
        waiting: the columns `[c]` that keep the place of those which are chosen while the model trains, and the configuration, by
            adapter.
        scores: as in `Entries`, while columns wait to be chosen by gradients.
        candidates, frozen: as in a model of `sprand.apply` whose mask changes, which that of a PEFT model does not.
    """

    candidates = None
    frozen = False

    def __init__(
        self,
        name: str,
        deltas: Mapping[str, Tensor],
        indices: Positions,
        bases: BufferDict,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        self.name = name
        self.deltas, self.indices, self.bases = deltas, indices, bases
        self.scales = {} if scales is None else scales
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.written = Written()
        self.waiting: dict[str, tuple[Tensor, SprandConfig]] = {}
        self.scores: Tensor | None = None
        self._ordered: dict[str, bool] = {}
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_unions": {}, "_union_bases": {}, "_schedules": {}}

    def known(self, names: Iterable[str]) -> list[str]:
        """Those of the adapters that train entries of this parameter."""
        return [name for name in names if name in self.deltas]

    def forget(self) -> None:
        """Drop what was derived from indices, base or the weight's place."""
        self.written.forget()
        self._unions: dict[Names, tuple[Pattern, list[Tensor]]] = {}
        self._union_bases: dict[Names, Tensor] = {}
        self._schedules: dict[tuple[Names, torch.device], Schedules | None] = {}

    def forget_positions(self, name: str) -> None:
        """The indices of an adapter are others, or elsewhere."""
        self._ordered.pop(name, None)
        self.forget()

    def forget_base(self) -> None:
        """The weight holds a new base: read it anew before the next use."""
        self.indices.replaced |= set(self.indices)
        self.forget()

    def read_base(self, weight: Tensor) -> None:
        """Read every base that is not known; of a sharded weight every rank must call this."""
        with torch.no_grad():
            for name in self.indices:
                self._settle(weight, name)
            if self.in_effect and is_whole(weight):  # a graph that is compiled takes what is known
                pattern, _ = self._pattern_and_base(self.in_effect)
                self._schedules_of(weight, self.in_effect, pattern)

    def cast_base(self, weight: Tensor) -> None:
        """Let each base have the dtype of the weight, which a module's own cast changes, and FSDP2's mixed precision does not."""
        for name, base in self.bases._buffers.items():
            self.bases._buffers[name] = base.to(weight.dtype)
        self.forget()

    def entries(self, weight: Tensor, names: Sequence[str] | None = None) -> Entries:
        """The entries of the given adapters, by default those in effect."""
        names = self.in_effect if names is None else tuple(names)
        for name in names:
            self._settle(weight, name)
        pattern, base = self._pattern_and_base(names)
        delta, scale = self._delta_and_scale(names, base)
        schedules = self._schedules_of(weight, names, pattern)
        return Entries(delta, pattern, base, scale, self.written, schedules, scores=self.scores)

    @property
    def in_effect(self) -> tuple[str, ...]:
        """The merged adapters, or else the active ones."""
        return self.merged or self.active

    def in_order(self, name: str) -> bool:
        """Whether an adapter's indices ascend, so that its delta can be used as it is."""
        if name not in self._ordered:
            chosen, columns = self.indices.pattern(name)
            ascends = columns is not None or chosen.is_meta or bool((chosen[1:] > chosen[:-1]).all())
            self._ordered[name] = ascends
        return self._ordered[name]

    def union(self, names: Names) -> tuple[Pattern, list[Tensor]]:
        """The sorted union of adapters' entries, and where the entries of each adapter stand in it."""
        if names not in self._unions:
            union, positions = _union_of([self.indices[name] for name in names])
            self._unions[names] = self.indices.made_of(union), positions
        return self._unions[names]

    def summed(self, names: Names, dtype: torch.dtype) -> Tensor:
        """The sum of scale * delta over adapters, in a dtype, at the entries of their union."""
        pattern, positions = self.union(names)
        delta = torch.zeros(pattern.nnz, dtype=dtype, device=pattern.chosen.device)
        for name, position in zip(names, positions, strict=True):
            change = self.deltas[name].to(delta) * self.scale(name)
            delta = delta.index_add(0, position, change)
        return delta

    def write(self, weight: Tensor) -> None:
        """Make the weight hold the merged adapters, or the active ones."""
        deltas = [self.deltas[name] for name in self.in_effect]
        if deltas and all(map(is_whole, (weight, *deltas))):
            with torch.no_grad():
                self.entries(weight).write(weight)

    def restore(self, weight: Tensor) -> None:
        """Put the base back, bit for bit."""
        self.written.forget()
        with_base = [name for name in self.in_effect if name in self.bases and name not in self.indices.replaced]
        is_at_hand = is_whole(weight) and not any(self.bases[name].is_meta for name in with_base)
        if with_base and is_at_hand:
            self._restore(weight, with_base)

    @contextmanager
    def pristine(self, weight: Tensor) -> Iterator[None]:
        """The weight holds its base inside of a `with` block."""
        self.restore(weight)
        try:
            yield
        finally:
            self.write(weight)

    def activate(self, weight: Tensor, names: Sequence[str]) -> None:
        """Let other adapters be in effect."""
        names = tuple(self.known(names))
        if names == self.active:
            return
        if not self.merged:
            self.restore(weight)
        self.active = names
        if not self.merged:
            self.write(weight)

    def merge(self, weight: Tensor, names: Sequence[str]) -> None:
        """Write the sum of these adapters for good, until `unmerge`."""
        self.restore(weight)
        self.merged, self.active = tuple(names), ()
        self.write(weight)

    def unmerge(self, weight: Tensor) -> None:
        """Put the base back."""
        self.restore(weight)
        self.merged = ()

    def _settle(self, weight: Tensor, name: str) -> None:
        """Have indices and base of an adapter on the weight's device, read from the weight where they are not known yet."""
        if self._is_settled(weight, name):
            return
        with _settling:  # a second thread must not read a base from what the first one has written
            if self.indices.pattern(name).chosen.device != weight.device:
                self.indices.move(name, weight.device)
                self.forget_positions(name)
            if self._is_base_known(weight, name):
                self.bases._buffers[name] = self.bases[name].to(weight.device)
            else:
                self._read_base(weight, name)

    def _is_settled(self, weight: Tensor, name: str) -> bool:
        if not self._is_base_known(weight, name):
            return False
        return self.indices._buffers[name].device == self.bases[name].device == weight.device

    def _is_base_known(self, weight: Tensor, name: str) -> bool:
        base = self.bases._buffers.get(name)
        return base is not None and name not in self.indices.replaced and base.is_meta == weight.is_meta

    def _read_base(self, weight: Tensor, name: str) -> None:
        self.bases._buffers.pop(name, None)
        others = [other for other in self.in_effect if other != name and other in self.bases]
        if others and is_whole(weight):
            self._restore(weight, others)
        self.forget_positions(name)
        self.bases[name] = _gather(sharding.whole(weight), self.indices.pattern(name), self.in_order(name))
        self.indices.replaced.discard(name)

    def _restore(self, weight: Tensor, names: Sequence[str]) -> None:
        for name in names:
            self._settle(weight, name)
        pattern, base = self._pattern_and_base(tuple(names))
        ops.patch_(pattern.view(weight.data), pattern.chosen, base.to(weight.dtype), None)

    def _is_one(self, names: Names) -> bool:
        """Whether the entries are those of one adapter as it holds them; others are put together."""
        return len(names) == 1 and self.in_order(names[0])

    def _pattern_and_base(self, names: Names) -> tuple[Pattern, Tensor]:
        if self._is_one(names):
            return self.indices.pattern(names[0]), self.bases[names[0]]
        pattern, positions = self.union(names)
        if names not in self._union_bases:
            base = torch.empty(pattern.nnz, dtype=self.bases[names[0]].dtype, device=pattern.chosen.device)
            for name, position in zip(names, positions, strict=True):
                base[position] = self.bases[name]
            self._union_bases[names] = base
        return pattern, self._union_bases[names]

    def _delta_and_scale(self, names: Names, base: Tensor) -> tuple[Tensor, float]:
        if self._is_one(names):
            return self.deltas[names[0]], self.scale(names[0])
        return self.summed(names, ops.accumulation_dtype(base.dtype)), 1.0

    def scale(self, name: str) -> float:
        """The factor on an adapter's delta."""
        return float(self.scales.get(name, 1.0))

    def _schedules_of(self, weight: Tensor, names: Names, pattern: Pattern) -> Schedules | None:
        key = names, weight.device
        if key not in self._schedules and not torch.compiler.is_compiling():
            self._schedules[key] = Schedules.on_gpu(weight, pattern)
        return self._schedules.get(key)


def _union_of(lists: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The sorted union of index lists in any order, on their device, and where the entries of each list stand in it."""
    ascending, orders = zip(*(indices.sort() for indices in lists), strict=True)
    union, positions = merge_indices(ascending)
    return union, [
        torch.empty_like(position).index_copy_(0, order, position) for position, order in zip(positions, orders, strict=True)
    ]


def _gather(weight: Tensor, pattern: Pattern, in_order: bool) -> Tensor:
    return pattern.gather(weight.contiguous()) if in_order else weight.flatten()[pattern.chosen.long()]


def is_whole(tensor: Tensor) -> bool:
    """Whether all values of a tensor are at hand: it is an ordinary one, not on the meta device, and in no parts."""
    return type(tensor.data) is Tensor and not tensor.is_meta and tensor.numel() > 0 and not sharding.is_of_fsdp1(tensor)
