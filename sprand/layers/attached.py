"""Entries kept on the module itself: attached to it and taken off, moved, saved and loaded with it.

`attach` turns `layer` into a sparse module that also holds, for its parameter `weight`, the trained parameter
`sprand_delta` and the buffers `sprand_indices` (flat, or the numbers of whole columns) and `sprand_base` (for another parameter
`name`: `sprand_delta_name` and so on). `detach` turns it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ops
from . import offload, sharding
from .entries import Entries, Schedules, Sealed
from .module import SparseModule, change_class, sparse_class, track, untrack, write_parameters
from .sites import Owner, Site, joined, site_of
from .target import Target
from .units import Pattern, Units


class AttachedModule(SparseModule):
    """A sparse module that holds the tensors of its entries."""

    _sprand_targets: dict[str, Target]

    def sparse_entries(self, parameter: str = "weight") -> Entries:
        target = self._sprand_targets[parameter]
        chosen = self._buffers[target.indices]
        if not torch.compiler.is_compiling() and not target.sealed.holds(chosen):
            self._draw_anew(target, chosen)
        return self._entries(parameter)

    def _draw_anew(self, target: Target, chosen: Tensor) -> None:
        """Put right what is chosen, which others have changed in place.

        Raises:
            ValueError: No seed draws it.
        """
        if target.redraw is not None:
            drawn = Pattern.of(target.redraw(chosen.device), self._columns(target.parameter)).chosen
            if target.sealed.holds(drawn):
                chosen.copy_(drawn)
                return
        raise ValueError(
            f"{target.name or type(self).__name__}: the positions of its trained entries were changed in place, as by an average "
            "over buffers; average parameters alone (AveragedModel without use_buffers, or sprand.parameters(model)), and call "
            "update_bn for batch norms"
        )

    def _entries(self, parameter: str) -> Entries:
        target, buffers = self._sprand_targets[parameter], self._buffers
        delta = self._parameters[target.delta]
        if "_hf_hook" in self.__dict__ and offload.is_offloaded(self):
            offload.refuse_gradient(delta)
        return Entries(
            delta,
            Pattern(buffers[target.indices], target.columns),
            buffers[target.base],
            target.scale,
            target.written,
            target.schedules,
            target.candidates,
            target.scores,
        )

    def sparse_sites(self, prefix: str) -> Iterator[Site]:
        return (site_of(joined(prefix, parameter), self, parameter) for parameter in self._sprand_targets)

    def sparse_tensors(self) -> Iterator[tuple[str, str, str]]:
        """The names of the delta, the indices and the base of every targeted parameter."""
        return (target.tensors for target in self._sprand_targets.values())

    def sparse_deltas(self) -> Iterator[tuple[nn.Parameter, str]]:
        return ((self._parameters[target.delta], name) for name, target in self._sprand_targets.items())

    def put_entries(self, parameter: str, pattern: Pattern, base: Tensor) -> None:
        """Let other entries of a parameter train, with their base `[nnz]`; its delta, as many, is left to the caller.

        Tensors of the same sizes are kept, and written: a graph may hold them.
        """
        target = self._sprand_targets[parameter]
        target.columns = pattern.columns
        for name, value in ((target.indices, pattern.chosen), (target.base, base)):
            if self._buffers[name].shape == value.shape and not self._buffers[name].is_meta:
                self._buffers[name].copy_(value)
            else:
                self._buffers[name] = value
        target.written.forget()
        self.make_schedule(parameter)

    def _columns(self, parameter: str) -> Units:
        """The columns of a parameter; of one that has none, its entries."""
        return site_of("", self, parameter).units

    def make_schedule(self, parameter: str) -> None:
        """Settle how the gradient of this parameter is sampled; called when its indices or its device change."""
        weight = self._parameters[parameter]
        target = self._sprand_targets[parameter]
        target.sealed = Sealed(self._buffers[target.indices])
        target.schedules = None
        if self._is_sampled and parameter == "weight":
            target.schedules = Schedules.on_gpu(weight, Pattern(self._buffers[target.indices], target.columns))
        if target.schedules is not None:
            target.schedules.of(weight.dtype)  # a graph that is compiled before any forward can make none

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts like any module; deltas stay in their accumulation dtype, indices and base stay right."""
        places = {name: _place(self._parameters[name]) for name in self._sprand_targets}
        entries = {name: self._entries(name) for name in self._sprand_targets}
        before = {name: (own.delta.data, own.pattern) for name, own in entries.items()}
        super()._apply(fn, recurse)
        for name in self._sprand_targets:
            self._follow(name, places[name], *before[name])
        return self

    def _follow(self, parameter: str, place: tuple[torch.device, torch.dtype], delta: Tensor, pattern: Pattern) -> None:
        """Let the entries of a parameter, which had this delta and pattern, follow it from where it was."""
        weight = self._parameters[parameter]
        target = self._sprand_targets[parameter]
        entries = self._entries(parameter)
        target.written.forget()
        dtype = ops.accumulation_dtype(weight.dtype)
        if entries.delta.dtype != dtype:
            entries.delta.data = delta.to(device=entries.delta.device, dtype=dtype)
        if entries.base.is_meta:
            target.enter_meta(pattern)
        elif pattern.chosen.is_meta:
            entries.delta.data.zero_()
            self.put_entries(parameter, target.leave_meta(entries.base.device, self._columns(parameter)), entries.base)
        if place != _place(weight):
            self.make_schedule(parameter)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Entries are saved once, also those of a weight that several modules share: files hold no tensor twice."""
        self.write_weights()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for target in self._sprand_targets.values():
            for name in target.tensors if target.leader is not None else ():
                del destination[prefix + name]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint with the entries is taken as it is; one without them is a new base, if nothing is frozen in the old."""
        on_meta = [name for name in self._sprand_targets if self._entries(name).base.is_meta]
        if on_meta:
            args[-1].append(
                f"{prefix}{on_meta[0]} is on the meta device, with entries that train; call model.to_empty(device=...) first, "
                "and load the checkpoint without assign."
            )
            return
        with_new_base = self.without_entries(state_dict, prefix)
        lost = [name for name in with_new_base if self._sprand_targets[name].frozen]
        if lost:
            args[-1].append(
                f"{prefix}{lost[0]} holds values that an earlier mask trained, and a new base would lose them: save the adapter "
                "with sprand.save, and load it into a model of that base."
            )
            return
        for name, target in self._sprand_targets.items():
            if prefix + target.indices in state_dict:
                self._fit_buffer(name, state_dict, prefix + target.indices)
        before = {name: self._entries(name).pattern.chosen.clone() for name in self._sprand_targets}
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, target in self._sprand_targets.items():
            if target.leader is not None:
                self._follow_leader(name, prefix, args[2])
                continue
            pattern = self._entries(name).pattern
            target.written.forget()
            # torch.distributed.checkpoint has filled our own tensors before it calls
            if not torch.equal(pattern.chosen, before[name]) or not target.sealed.holds(pattern.chosen):
                target.redraw = None
                self.make_schedule(name)
            if name in with_new_base:
                setattr(self, target.base, pattern.gather(sharding.whole(self._parameters[name])))

    def _fit_buffer(self, parameter: str, state_dict: dict[str, Any], key: str) -> None:
        """Have a buffer for what a checkpoint says is chosen: flat indices or columns, and ours may be of the other kind."""
        target = self._sprand_targets[parameter]
        own, nnz = self._buffers[target.indices], self._buffers[target.base].numel()
        pattern = Pattern.stored(state_dict[key], nnz, self._columns(parameter))
        if pattern is not None:
            state_dict[key], target.columns = pattern
            if own.shape != pattern.chosen.shape:
                self._buffers[target.indices] = torch.empty_like(pattern.chosen, device=own.device)

    def without_entries(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """The parameters that a checkpoint, which calls this module by `prefix`, has without their entries."""

        def is_given(name: str) -> bool:
            value = state_dict.get(prefix + name)
            own = self._parameters.get(name), self._buffers.get(name)
            # torch.distributed.checkpoint adds what is missing: our own tensors themselves
            return value is not None and all(value is not tensor for tensor in own)

        targets = self._sprand_targets.items()
        return [name for name, target in targets if target.leader is None and is_given(name) and not is_given(target.base)]

    def _follow_leader(self, parameter: str, prefix: str, missing: list[str]) -> None:
        """Share what the leader was given; what is saved with it is not `missing` here."""
        target = self._sprand_targets[parameter]
        leader, its_parameter = target.leader
        its = leader.sparse_target(its_parameter)
        self._parameters[target.delta] = leader._parameters[its.delta]
        self._buffers[target.indices], self._buffers[target.base] = leader._buffers[its.indices], leader._buffers[its.base]
        target.redraw, target.columns = its.redraw, its.columns
        target.written.forget()
        self.make_schedule(parameter)
        own = {prefix + name for name in target.tensors}
        missing[:] = [name for name in missing if name not in own]

    def extra_repr(self) -> str:
        counts = [f"{self.sparse_entries(name).pattern.nnz:,} of {name}" for name in self._sprand_targets]
        inherited = super().extra_repr()
        return ", ".join([*([inherited] if inherited else []), f"trains {', '.join(counts)}"])


SparseLinear = sparse_class(AttachedModule, nn.Linear)


def attach(
    module: nn.Module,
    parameter: str,
    pattern: Pattern,
    delta: nn.Parameter | None = None,
    scale: float = 1.0,
    redraw: Callable[[torch.device], Tensor] | None = None,
    leader: Owner | None = None,
) -> Entries:
    """Freeze a parameter of `module` and let the given entries of it train.

    Args:
        module: changed in place; keeps its class as a subclass.
        parameter: name of the parameter in the module.
        pattern: the entries, on the parameter's device; of one on the meta device they may be at hand.
        delta: `[nnz]`, kept as it is; made of zeros if None.
        scale: factor between delta and weight.
        redraw: makes the indices anew when the module leaves the meta device.
        leader: a module that holds the same parameter, by its name there, with the same entries: all share its memory.

    Returns:
        The entries now attached.

    Raises:
        ValueError: The module has no such parameter, it is attached already, its memory is not contiguous, or its indices are
            on the meta device and nothing can redraw them.
    """
    weight = _checked_weight(module, parameter)
    target = Target(parameter, scale, pattern.columns, redraw, leader=leader)
    if weight.is_meta:
        target.enter_meta(pattern)
        pattern = pattern.to(weight.device)
    if pattern.chosen.is_meta and redraw is None and target.kept is None:
        raise ValueError(
            f"{parameter!r} of {type(module).__name__}: its indices are on the meta device, where they have no values; give them "
            "on another one"
        )
    cls = None if isinstance(module, SparseModule) else sparse_class(AttachedModule, type(module))
    if leader is not None:
        entries = leader[0].sparse_entries(leader[1])
        delta, base, target.written = entries.delta, entries.base, entries.written
    else:
        base = pattern.gather(weight.data)
    if delta is None:
        delta = nn.Parameter(torch.zeros(base.shape, dtype=ops.accumulation_dtype(weight.dtype), device=weight.device))
    weight.requires_grad_(False)
    if cls is not None:
        change_class(module, cls)
        module._sprand_targets, module._sprand_active = {}, True
        track(module)
    module._sprand_targets[parameter] = target
    module.register_parameter(target.delta, delta)
    module.register_buffer(target.indices, pattern.chosen)
    module.register_buffer(target.base, base)
    module.make_schedule(parameter)
    return module.sparse_entries(parameter)


def _checked_weight(module: nn.Module, parameter: str) -> nn.Parameter:
    """The parameter of a module, to which entries can be attached."""
    weight = module._parameters.get(parameter)
    if weight is None:
        raise ValueError(
            f"expected a parameter {parameter!r} in {type(module).__name__}, found {', '.join(module._parameters) or 'none'}"
        )
    if isinstance(module, SparseModule) and parameter in module._sprand_targets:
        raise ValueError(
            f"{parameter!r} of this {type(module).__name__} already has trained entries; unmerge or merge them first"
        )
    taken = [name for name in Target(parameter).tensors if hasattr(module, name)]
    if taken:
        raise ValueError(
            f"this {type(module).__name__} has an attribute {taken[0]!r} of its own, where entries of {parameter!r} would be "
            "kept; rename it, or leave the module out (exclude_modules)"
        )
    if not weight.is_contiguous():
        raise ValueError(
            f"{parameter!r} of {type(module).__name__}: expected contiguous memory, got strides {weight.stride()} for shape "
            f"{list(weight.shape)}; call model.to(memory_format=torch.contiguous_format) first"
        )
    return weight


def set_active(modules: Sequence[SparseModule], active: Sequence[bool]) -> None:
    """Switch the trained entries of each module on or off, and write all weights accordingly, in one pass per device.

    A sharded weight gets its base, which needs nothing from other ranks: its layer writes what it uses in any case.
    """
    items = []
    for module, on in zip(modules, active, strict=True):
        module._sprand_active = on
        for name, target in module._sprand_targets.items():
            target.written.forget()
            items.append((module, name, on and not sharding.is_sharded(module._parameters[name])))
    write_parameters(items)


def write_now(modules: Sequence[SparseModule]) -> None:
    """Make every weight hold what its layer would use; where they are sharded, every rank must call this."""
    for module in modules:
        for target in module._sprand_targets.values():
            target.written.forget()
    write_parameters([(module, name, module._sprand_active) for module in modules for name in module._sprand_targets])


def detach(modules: Sequence[SparseModule], keep: bool) -> None:
    """Take all trained entries away from modules, which get their classes back; their weights are written in one pass.

    Args:
        modules: changed in place.
        keep: leave the trained values in the weights (merge), or put the base back bit for bit.
    """
    write_parameters([(module, name, keep) for module in modules for name in module._sprand_targets])
    for module in modules:
        for target in module._sprand_targets.values():
            for name in target.tensors:
                delattr(module, name)
        untrack(module)
        change_class(module, module.plain_class)
        del module._sprand_targets, module._sprand_active


def _place(weight: Tensor) -> tuple[torch.device, torch.dtype]:
    return weight.device, weight.dtype
