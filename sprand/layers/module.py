"""Sparse modules: a module keeps its class (as a subclass), its weight and its names, and gains a delta to train.

`attach` turns `layer` into a sparse module that also holds, for its parameter `weight`, the trained parameter
`sprand_delta` and the buffers `sprand_indices` and `sprand_base` (for another parameter `name`: `sprand_delta_name`
and so on). `detach` turns it back.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.schedule import Schedule
from ..kernels.tuning import schedule_for
from . import functional, sharding
from .functional import Candidates, Entries, Written
from .sites import Site, joined, site_of

DELTA, INDICES, BASE = "sprand_delta", "sprand_indices", "sprand_base"

_live: weakref.WeakSet[SparseModule] = weakref.WeakSet()


@dataclass
class Target:
    """One targeted parameter of one module.

    Attributes:
        parameter: its name in the module, for example `"weight"`.
        scale: factor between delta and weight.
        redraw: makes the indices on a device; needed when a module leaves the meta device.
        written: whether the weight holds its delta already.
        schedule: how a GPU samples the gradient of a linear layer.
        candidates: sees the gradient of the whole weight while a mask looks for entries to grow.
        folded: whether an earlier mask left trained values in the weight, which a new base would lose.
        delta, indices, base: names of the module's tensors for this parameter.
    """

    parameter: str
    scale: float = 1.0
    redraw: Callable[[torch.device], Tensor] | None = None
    written: Written = field(default_factory=Written)
    schedule: Schedule | None = None
    candidates: Candidates | None = None
    folded: bool = False

    def __post_init__(self) -> None:
        suffix = "" if self.parameter == "weight" else f"_{self.parameter}"
        self.delta, self.indices, self.base = DELTA + suffix, INDICES + suffix, BASE + suffix


class SparseModule(nn.Module):
    """Mixed into the class of a module by `attach`; works for any module that reads its parameters by attribute."""

    _sprand_class: type[nn.Module]
    _sprand_targets: dict[str, Target]
    _sprand_active: bool

    def sparse_entries(self, parameter: str = "weight") -> Entries:
        """The trained entries of one targeted parameter."""
        target = self._sprand_targets[parameter]
        buffers = self._buffers
        return Entries(
            self._parameters[target.delta], buffers[target.indices], buffers[target.base], target.scale, target.written,
            target.schedule, target.candidates,
        )  # fmt: skip

    def sparse_target(self, parameter: str) -> Target:
        """What is kept of one targeted parameter beside its tensors."""
        return self._sprand_targets[parameter]

    def sparse_sites(self, prefix: str) -> Iterator[Site]:
        """The weights with trained entries, by their names in a model that calls this module `prefix`."""
        return (site_of(joined(prefix, parameter), self, parameter) for parameter in self._sprand_targets)

    def sparse_deltas(self) -> Iterator[tuple[nn.Parameter, str]]:
        """Every delta that trains, with the name of the targeted parameter."""
        return ((self._parameters[target.delta], name) for name, target in self._sprand_targets.items())

    def write_weights(self) -> None:
        """Make every targeted parameter hold its trained values now (its base values while disabled)."""
        _write([(self, parameter, self._sprand_active) for parameter in self._sprand_targets])

    def make_schedule(self, parameter: str) -> None:
        """Settle how a GPU samples the gradient of this parameter; called when its indices or its device change."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._sprand_active:
            self.write_weights()
            return super().forward(*args, **kwargs)
        with self._aliases():
            output = super().forward(*args, **kwargs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for name in self._sprand_targets:
                if sharding.is_gathered(self) or sharding.is_of_zero3(self._parameters[name]):
                    functional.written_in_backward(output, self._parameters[name], self.sparse_entries(name))
        return output

    def _value(self, parameter: str) -> Tensor | None:
        """The parameter as the forward pass must see it."""
        value = self._parameters[parameter]
        if parameter not in self._sprand_targets:
            return value
        # a compiled backward reads the memory that forward read, and nothing can write entries there in between
        copy = torch.compiler.is_compiling() and sharding.is_gathered(self)
        return functional.alias(value, self.sparse_entries(parameter), copy)

    @contextmanager
    def _aliases(self) -> Iterator[None]:
        """Let attribute access find aliases that pass gradients on to the deltas."""
        aliases = {name: self._value(name) for name in self._sprand_targets}
        outer = {name: self.__dict__[name] for name in aliases if name in self.__dict__}
        flat = self.__dict__.get("_flat_weights")  # torch.nn.RNNBase reads its parameters from this list
        self.__dict__.update(aliases)
        if flat is not None:
            self.__dict__["_flat_weights"] = [
                aliases.get(name, weight) for name, weight in zip(self._flat_weights_names, flat, strict=True)
            ]
        try:
            yield
        finally:
            for name in aliases:
                del self.__dict__[name]
            self.__dict__.update(outer)
            if flat is not None:
                self.__dict__["_flat_weights"] = flat

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts like any module; deltas stay in their accumulation dtype, indices and base stay right."""
        before = {name: getattr(self, target.delta).data for name, target in self._sprand_targets.items()}
        weights = {name: self._parameters[name] for name in self._sprand_targets}
        was = {name: (weight.device, weight.dtype) for name, weight in weights.items()}
        super()._apply(fn, recurse)
        for name, target in self._sprand_targets.items():
            weight, delta = self._parameters[name], getattr(self, target.delta)
            target.written.forget()
            dtype = ops.accumulation_dtype(weight.dtype)
            if delta.dtype != dtype:
                delta.data = before[name].to(device=delta.device, dtype=dtype)
            if was[name][0].type == "meta" and not weight.is_meta:
                delta.data.zero_()
                if target.redraw is not None:
                    getattr(self, target.indices).copy_(target.redraw(weight.device))
            if was[name] != (weight.device, weight.dtype):
                self.make_schedule(name)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.write_weights()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint with the entries is taken as it is; one without them is a new base, if nothing is folded into the old."""

        def given(name: str) -> bool:  # torch.distributed.checkpoint adds what is missing: our own tensors themselves
            value = state_dict.get(prefix + name)
            return value is not None and value is not self._parameters.get(name) and value is not self._buffers.get(name)

        new = [name for name, target in self._sprand_targets.items() if given(name) and not given(target.base)]
        lost = [name for name in new if self._sprand_targets[name].folded]
        if lost:
            args[-1].append(
                f"{prefix}{lost[0]} holds values that an earlier mask trained, and a new base would lose them: save the adapter "
                "with sprand.save, and load it into a model of that base."
            )
            return
        before = {name: getattr(self, target.indices).clone() for name, target in self._sprand_targets.items()}
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, target in self._sprand_targets.items():
            target.written.forget()
            if not torch.equal(getattr(self, target.indices), before[name]):
                target.redraw = None
                self.make_schedule(name)
            if name in new:
                weight = sharding.whole(self._parameters[name])
                setattr(self, target.base, ops.gather(weight, getattr(self, target.indices)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _live.add(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_sparse_module, (self._sprand_class,), self.__getstate__()

    def extra_repr(self) -> str:
        counts = ", ".join(
            f"{getattr(self, target.indices).numel():,} of {name}" for name, target in self._sprand_targets.items()
        )
        inherited = super().extra_repr()
        return f"{inherited}, trains {counts}" if inherited else f"trains {counts}"


class _SparseLinear(SparseModule):
    """A linear layer: the gradient of the chosen entries is sampled, no dense gradient exists."""

    _transposed = False

    def make_schedule(self, parameter: str) -> None:
        weight, target = self._parameters[parameter], self._sprand_targets[parameter]
        on_gpu = parameter == "weight" and weight.is_cuda and type(weight.data) is Tensor and weight.dim() == 2
        target.schedule = schedule_for(self._buffers[target.indices], *weight.shape, weight.dtype) if on_gpu else None

    def forward(self, input: Tensor) -> Tensor:
        if not self._sprand_active or "weight" not in self._sprand_targets:
            return super().forward(input)
        return functional.linear(input, self.weight, self._value("bias"), self.sparse_entries(), self._transposed)


class _SparseConv1D(_SparseLinear):
    """Hugging Face's `Conv1D`, a linear layer whose weight is stored transposed."""

    _transposed = True


class _SparseEmbedding(SparseModule):
    """An embedding: the gradient of the chosen entries walks the tokens, no gradient of the vocabulary exists."""

    def forward(self, input: Tensor) -> Tensor:
        plain = self.max_norm is None and not self.scale_grad_by_freq and not self.sparse
        if not self._sprand_active or not plain:
            return super().forward(input)
        return functional.embedding(input, self.weight, self.sparse_entries(), self.padding_idx)


def kind_of(cls: type[nn.Module]) -> type[SparseModule]:
    """What to mix into a module class, by how it uses its weight."""
    if cls.forward is nn.Linear.forward:
        return _SparseLinear
    if cls.forward is nn.Embedding.forward:
        return _SparseEmbedding
    if any(base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils" for base in cls.__mro__):
        return _SparseConv1D
    return SparseModule


@functools.cache
def sparse_class(cls: type[nn.Module]) -> type[SparseModule]:
    """The subclass of `cls` that `attach` gives to a module: `Linear` becomes `SparseLinear`."""
    return type(f"Sparse{cls.__name__}", (kind_of(cls), cls), {"_sprand_class": cls, "__module__": __name__})


SparseLinear = sparse_class(nn.Linear)


def _new_sparse_module(cls: type[nn.Module]) -> SparseModule:
    sparse = sparse_class(cls)
    return sparse.__new__(sparse)


def attach(
    module: nn.Module,
    parameter: str,
    indices: Tensor,
    delta: nn.Parameter | None = None,
    base: Tensor | None = None,
    scale: float = 1.0,
    redraw: Callable[[torch.device], Tensor] | None = None,
) -> Entries:
    """Freeze a parameter of `module` and let the given entries of it train.

    Args:
        module: changed in place; keeps its class as a subclass.
        parameter: name of the parameter in the module.
        indices: `[nnz]`, flat, sorted, distinct, on the parameter's device.
        delta: `[nnz]`, kept as it is; made of zeros if None.
        base: `[nnz]`, the original entries; read from the parameter if None.
        scale: factor between delta and weight.
        redraw: makes the indices anew when the module leaves the meta device.

    Returns:
        The entries now attached.

    Raises:
        ValueError: no such parameter, one that is attached already, or a weight whose memory is not contiguous.
    """
    weight = module._parameters.get(parameter)
    if weight is None:
        raise ValueError(
            f"expected a parameter {parameter!r} in {type(module).__name__}, found {', '.join(module._parameters) or 'none'}"
        )
    if isinstance(module, SparseModule) and parameter in module._sprand_targets:
        raise ValueError(
            f"{parameter!r} of this {type(module).__name__} already has trained entries; unmerge or merge them first"
        )
    if not weight.is_contiguous():
        raise ValueError(
            f"{parameter!r} of {type(module).__name__}: expected contiguous memory, got strides {weight.stride()} for shape "
            f"{list(weight.shape)}; call model.to(memory_format=torch.contiguous_format) first"
        )
    weight.requires_grad_(False)
    if base is None:
        base = ops.gather(weight.data, indices)
    if delta is None:
        delta = nn.Parameter(torch.zeros(indices.shape, dtype=ops.accumulation_dtype(weight.dtype), device=weight.device))
    if not isinstance(module, SparseModule):
        module.__class__ = sparse_class(type(module))
        module._sprand_targets, module._sprand_active = {}, True
        _live.add(module)
    target = Target(parameter, scale, redraw)
    module._sprand_targets[parameter] = target
    module.register_parameter(target.delta, delta)
    module.register_buffer(target.indices, indices)
    module.register_buffer(target.base, base)
    module.make_schedule(parameter)
    return module.sparse_entries(parameter)


def set_active(modules: Sequence[SparseModule], active: Sequence[bool]) -> None:
    """Switch the trained entries of each module on or off, and write all weights accordingly, in one pass per device.

    A sharded weight gets its base, which needs nothing from other ranks: its layer writes what it uses in any case.
    """
    for module, on in zip(modules, active, strict=True):
        module._sprand_active = on
        for target in module._sprand_targets.values():
            target.written.forget()
    items = [(module, name) for module in modules for name in module._sprand_targets]
    whole = [not sharding.is_sharded(module._parameters[name]) for module, name in items]
    _write([(*item, item[0]._sprand_active and here) for item, here in zip(items, whole, strict=True)])


def write_now(modules: Sequence[SparseModule]) -> None:
    """Make every weight hold what its layer would use; where they are sharded, every rank must call this."""
    for module in modules:
        for target in module._sprand_targets.values():
            target.written.forget()
    _write([(module, name, module._sprand_active) for module in modules for name in module._sprand_targets])


def detach(modules: Sequence[SparseModule], keep: bool) -> None:
    """Take all trained entries away from modules, which get their classes back; their weights are written in one pass.

    Args:
        modules: changed in place.
        keep: leave the trained values in the weights (merge), or put the base back bit for bit.
    """
    _write([(module, name, keep) for module in modules for name in module._sprand_targets])
    for module in modules:
        for target in module._sprand_targets.values():
            for name in (target.delta, target.indices, target.base):
                delattr(module, name)
        _live.discard(module)
        module.__class__ = module._sprand_class
        del module._sprand_targets, module._sprand_active


def _write(items: Sequence[tuple[SparseModule, str, bool]]) -> None:
    """Write the parameters `(module, name, trained)`: their trained values or, bit for bit, their base.

    One call of an operator for all parameters of a device; a parameter of several modules is written by each, in their order.
    Of a DTensor each rank writes its part; what ZeRO-3 has put away is left alone, it is written where it is used.
    """
    calls: dict[tuple[int, torch.device, bool], list[tuple[Tensor, Entries]]] = {}
    met: Counter[int] = Counter()
    for module, name, trained in items:
        weight, entries = module._parameters[name], module.sparse_entries(name)
        if sharding.is_partition(weight) or (weight.is_meta and sharding.is_dtensor(weight)):
            continue
        if sharding.is_dtensor(weight):
            delta = sharding.whole(entries.delta) if trained else None
            sharding.patch_(weight, entries.indices, entries.base, delta, entries.scale)
            continue
        if type(weight.data) is not Tensor or type(entries.delta.data) is not Tensor or weight.dtype != entries.base.dtype:
            entries.write(weight) if trained else entries.restore(weight)
            continue
        calls.setdefault((met[id(weight)], weight.device, trained), []).append((weight, entries))
        met[id(weight)] += 1
    for (_, _, trained), targets in sorted(calls.items(), key=lambda call: call[0][0]):
        functional.write_all(*zip(*targets, strict=True), trained)


def targets_by_delta() -> dict[int, tuple[SparseModule, str]]:
    """Every live delta parameter by its `id`, with the module and parameter it belongs to."""
    return {id(delta): (module, name) for module in _live for delta, name in module.sparse_deltas()}


def sparse_modules(model: nn.Module) -> Iterator[tuple[str, SparseModule]]:
    """The modules that hold trained entries, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseModule))


def track(module: nn.Module) -> None:
    """Let `targets_by_delta` find a module that `attach` did not make; it has `sparse_deltas`."""
    _live.add(module)


def untrack(module: nn.Module) -> None:
    """The inverse of `track`."""
    _live.discard(module)
