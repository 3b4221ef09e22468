"""Hosted modules: sparse modules whose deltas live in a PEFT layer around them, one delta per adapter.

`host` gives a module the same class-with-a-delta that `sprand.apply` gives it, so that both doors run one forward. What
differs is where the entries are kept (`AdapterTarget`, shared with the PEFT layer) and that several adapters may be in
effect on one weight: then `base + sum of scale * delta` is summed in float32 in their order and rounded once.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..kernels import ops
from ..layers import sharding
from ..layers.entries import Entries, Schedules, Written
from ..layers.module import SparseModule, sparse_class, track, untrack
from ..layers.sites import Site, site_of

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
    """Flat indices by adapter; remembers which of them were replaced by others, as a checkpoint does."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced: set[str] = set()

    def put(self, name: str, indices: Tensor, persistent: bool) -> None:
        """Keep the indices of an adapter; in `state_dict` if persistent."""
        self._buffers.pop(name, None)
        self.register_buffer(name, indices, persistent=persistent)
        self.replaced.add(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.replaced.add(name)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.replaced |= {name for name in self if prefix + name in state_dict}

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
    """

    candidates = None
    folded = False

    def __init__(
        self,
        name: str,
        deltas: Mapping[str, Tensor],
        indices: Positions,
        bases: BufferDict,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        self.name, self.deltas, self.indices, self.bases = name, deltas, indices, bases
        self.scales = {} if scales is None else scales
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.written = Written()
        self._ordered: dict[str, bool] = {}
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_unions": {}, "_schedules": {}}

    def forget(self) -> None:
        """Drop what was derived from indices, base or the weight's place."""
        self.written.forget()
        self._unions: dict[tuple[str, ...], tuple[Tensor, Tensor, list[Tensor]]] = {}
        self._schedules: dict[tuple[tuple[str, ...], torch.device], Schedules | None] = {}

    def forget_base(self) -> None:
        """The weight holds a new base: read it anew before the next use."""
        self.indices.replaced |= set(self.indices)
        self.forget()

    def read_base(self, weight: Tensor) -> None:
        """Read every base that is not known; of a sharded weight every rank must call this."""
        with torch.no_grad():
            for name in self.indices:
                self._settle(weight, name)

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
        if len(names) == 1 and self.in_order(names[0]):
            (name,) = names
            indices = self.indices[name]
            return Entries(
                self.deltas[name], indices, self.bases[name], float(self.scales.get(name, 1.0)), self.written,
                self._schedules_of(weight, names, indices),
            )  # fmt: skip
        union, base, positions = self._union(names)
        delta = torch.zeros(union.shape, dtype=ops.accumulation_dtype(weight.dtype), device=weight.device)
        for name, position in zip(names, positions, strict=True):
            delta = delta.index_add(0, position, self.deltas[name].to(delta) * float(self.scales.get(name, 1.0)))
        return Entries(delta, union, base, 1.0, self.written, self._schedules_of(weight, names, union))

    @property
    def in_effect(self) -> tuple[str, ...]:
        """The merged adapters, or else the active ones."""
        return self.merged or self.active

    def in_order(self, name: str) -> bool:
        """Whether an adapter's indices ascend, so that its delta can be used as it is."""
        if name not in self._ordered:
            indices = self.indices[name]
            self._ordered[name] = bool((indices[1:] > indices[:-1]).all()) if not indices.is_meta else True
        return self._ordered[name]

    def write(self, weight: Tensor) -> None:
        """Make the weight hold the merged adapters, or the active ones."""
        names = self.in_effect
        if names and all(map(_whole, (weight, *(self.deltas[name] for name in names)))):
            with torch.no_grad():
                self.entries(weight, names).write(weight)

    def restore(self, weight: Tensor) -> None:
        """Put the base back, bit for bit."""
        self.written.forget()
        names = [name for name in self.in_effect if name in self.bases and name not in self.indices.replaced]
        if names and _whole(weight) and not self.bases[names[0]].is_meta:
            self._restore(weight, names)

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
        names = tuple(name for name in names if name in self.deltas)
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
            if self.indices[name].device != weight.device:
                self.indices._buffers[name] = self.indices[name].to(weight.device)
                self.forget()
            if self._is_base_known(weight, name):
                self.bases._buffers[name] = self.bases[name].to(weight.device)
            else:
                self._read_base(weight, name)

    def _is_settled(self, weight: Tensor, name: str) -> bool:
        here = weight.device
        return self._is_base_known(weight, name) and self.indices[name].device == here and self.bases[name].device == here

    def _is_base_known(self, weight: Tensor, name: str) -> bool:
        base = self.bases._buffers.get(name)
        return base is not None and name not in self.indices.replaced and base.is_meta == weight.is_meta

    def _read_base(self, weight: Tensor, name: str) -> None:
        self.bases._buffers.pop(name, None)
        others = [other for other in self.in_effect if other != name and other in self.bases]
        if others and _whole(weight):
            self._restore(weight, others)
        self._ordered.pop(name, None)
        self.bases[name] = _gather(sharding.whole(weight), self.indices[name], self.in_order(name))
        self.indices.replaced.discard(name)
        self.forget()

    def _restore(self, weight: Tensor, names: Sequence[str]) -> None:
        for name in names:
            self._settle(weight, name)
        single = len(names) == 1 and self.in_order(names[0])
        indices, base = (self.indices[names[0]], self.bases[names[0]]) if single else self._union(tuple(names))[:2]
        ops.patch_(weight.data, indices, base.to(weight.dtype), None)

    def _union(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
        if names not in self._unions:
            union, positions = union_of([self.indices[name] for name in names])
            base = torch.empty(union.shape, dtype=self.bases[names[0]].dtype, device=union.device)
            for name, position in zip(names, positions, strict=True):
                base[position] = self.bases[name]
            self._unions[names] = union, base, positions
        return self._unions[names]

    def _schedules_of(self, weight: Tensor, names: tuple[str, ...], indices: Tensor) -> Schedules | None:
        key = names, weight.device
        if key not in self._schedules and not torch.compiler.is_compiling():
            self._schedules[key] = Schedules.on_gpu(weight, indices)
        return self._schedules.get(key)


class HostedModule(SparseModule):
    """A sparse module that registers no tensor of its own: its entries are those of its `AdapterTarget`s."""

    _sprand_hosted: dict[str, AdapterTarget]

    @property
    def _sprand_targets(self) -> dict[str, AdapterTarget]:
        return {name: target for name, target in self._sprand_hosted.items() if target.active}

    @property
    def _sprand_active(self) -> bool:
        return any(target.active for target in self._sprand_hosted.values())

    def sparse_entries(self, parameter: str = "weight") -> Entries:
        return self._sprand_hosted[parameter].entries(self._parameters[parameter])

    def sparse_sites(self, prefix: str) -> Iterator[Site]:
        """The weights with adapters in effect, by their names in the base model."""
        for parameter, target in self._sprand_hosted.items():
            if target.in_effect:
                yield site_of(target.name, self, parameter)

    def sparse_deltas(self) -> Iterator[tuple[nn.Parameter, str]]:
        """The deltas in effect; one of several, or one whose indices do not ascend, is no delta of `sparse_entries` itself."""
        return ((target.deltas[key], name) for name, target in self._sprand_hosted.items() for key in target.in_effect)

    def make_schedule(self, parameter: str) -> None:
        """Nothing: a target makes its schedules when it is used."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        for name, target in self._sprand_hosted.items():
            target.cast_base(self._parameters[name])
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A checkpoint of a PEFT model holds base weights, and the adapters beside them."""
        for name, target in self._sprand_hosted.items():
            if not target.merged:
                target.restore(self._parameters[name])
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, target in self._sprand_hosted.items():
            if not target.merged:
                target.restore(self._parameters[name])
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, target in self._sprand_hosted.items():
            if prefix + name in state_dict:
                target.forget_base()


def host(module: nn.Module, parameter: str, target: AdapterTarget) -> None:
    """Let a module use the entries of `target` wherever it uses `parameter`.

    Raises:
        ValueError: Another tool has replaced the module's forward.
    """
    if not isinstance(module, HostedModule):
        cls = sparse_class(HostedModule, type(module))
        if "forward" in module.__dict__:  # accelerate's hooks keep the method they wrap
            wrapped = module.__dict__.get("_old_forward")
            if getattr(wrapped, "__func__", None) is not type(module).forward:
                raise ValueError(
                    f"{target.name}: another tool has replaced the forward of this {type(module).__name__}, and the trained "
                    "entries would be bypassed; apply that tool after sprand"
                )
            module._old_forward = types.MethodType(cls.forward, module)
        module.__class__ = cls
        module.__dict__["_sprand_hosted"] = {}
        track(module)
    module._sprand_hosted[parameter] = target
    module._parameters[parameter].requires_grad_(False)


def unhost(module: nn.Module) -> None:
    """Give a module its class back; its weights stay as they are."""
    if isinstance(module, HostedModule):
        untrack(module)
        cls = module._sprand_class
        if "_old_forward" in module.__dict__:
            module._old_forward = types.MethodType(cls.forward, module)
        module.__class__ = cls
        del module.__dict__["_sprand_hosted"]


def union_of(lists: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The sorted union of index lists in any order, on their device, and where the entries of each list stand in it."""
    union, inverse = torch.unique(torch.cat(list(lists)), return_inverse=True)
    return union, list(inverse.split([indices.numel() for indices in lists]))


def _gather(weight: Tensor, indices: Tensor, in_order: bool) -> Tensor:
    return ops.gather(weight.contiguous(), indices) if in_order else weight.flatten()[indices.long()]


def _whole(tensor: Tensor) -> bool:
    return type(tensor.data) is Tensor and not tensor.is_meta and tensor.numel() > 0
