"""Columns that wait for the first training forward, and are chosen there by what comes into their layers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..kernels import ops
from ..kernels.topk import largest, order_keys
from ..layers import sharding
from ..layers.sites import Site, sites_of
from ..selection.batches import call, mapped
from ..selection.flow import inputs_of
from ..selection.inputs import InputSums
from ..selection.units import Units, column_axis
from ..selection.untouched import untouched
from .state import Adapter, known_state

logger = logging.getLogger("sprand")
BY_HAND = "call sprand.choose(model, batch) first, on every rank"


@dataclass
class Waiting:
    """The entries of one weight, drawn to keep the place of those that are to be chosen.

    Attributes:
        site: the weight, with the modules that its inputs come into.
        count: how many columns to choose.
        put: gives it other entries, `[nnz]`, flat and sorted.
    """

    site: Site
    count: int
    put: Callable[[Tensor], None]

    def choose(self, sums: Tensor) -> None:
        """Take the columns with the largest sums `[inputs]`."""
        units = Units.of(self.site.shape, column_axis(self.site))
        self.put(units.entries(largest(order_keys(sums).to(self.site.device), self.count)))


@dataclass(frozen=True)
class Door:
    """How adapters that wait are found in a module of a model.

    Attributes:
        active: those of the adapters that are active in this module, not counting what is inside of it.
        any: whether anything waits there, of any adapter.
    """

    active: Callable[[nn.Module], list[Waiting]]
    any: Callable[[nn.Module], bool]


def _of_apply(model: nn.Module) -> list[Waiting]:
    """What waits of the active adapter of `sprand.apply`; what a checkpoint has brought waits no more."""
    state = known_state(model)
    adapter = None if state is None else state.current
    if adapter is None or not adapter.waiting:
        return []
    sites = [site for site in sites_of(model) if site.name in adapter.waiting]
    if not all(torch.equal(columns_at(site, site.entries.indices), adapter.waiting[site.name]) for site in sites):
        adapter.waiting.clear()
        return []
    return [Waiting(site, adapter.waiting[site.name].numel(), functools.partial(_put, adapter, site)) for site in sites]


def _any_of_apply(model: nn.Module) -> bool:
    state = known_state(model)
    return state is not None and any(adapter.waiting for adapter in state.adapters.values())


doors = [Door(_of_apply, _any_of_apply)]


def columns_at(site: Site, indices: Tensor) -> Tensor:
    """The columns `[c]` of which these are the entries, on the CPU; none where they are no whole ones."""
    columns = Units.of(site.shape, column_axis(site)).whole(indices.cpu())
    return torch.empty(0, dtype=torch.int32) if columns is None else columns


def _put(adapter: Adapter, site: Site, indices: Tensor) -> None:
    """Give a weight of `sprand.apply` its chosen entries; its delta is zero."""
    for module, parameter in site.owners:
        entries, target = module.sparse_entries(parameter), module.sparse_target(parameter)
        entries.indices.copy_(indices)
        entries.base.copy_(ops.gather(module._parameters[parameter].data, indices))
        target.written.forget()
        module.make_schedule(parameter)
    adapter.indices[site.name] = site.entries.indices
    del adapter.waiting[site.name]


def watch(model: nn.Module) -> None:
    """Let the first forward of a model in training mode, with gradients, choose what waits."""
    if _hook() not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_hook(), prepend=True, with_kwargs=True)


def refuse_waiting(waiting: bool, what: str) -> None:
    """Refuse what cannot be done with an adapter that waits.

    Raises:
        ValueError: It waits.
    """
    if waiting:
        raise ValueError(
            f"{what}: the columns of this adapter are chosen at the first training forward, and none was made; train first, or "
            "call sprand.choose(model, batch)"
        )


def choose(model: nn.Module, batch: Any) -> nn.Module:
    """Choose the columns that wait for the first training forward, by one batch, without training.

    Of several processes each calls this, with a batch of its own; they agree. It is for `torch.compile(fullgraph=True)`, for
    models that are sharded afterwards, and wherever the first batch of training is not the one to choose by.

    Args:
        model: of `sprand.apply(model, layout="columns", strategy="activation")` without data, or of PEFT with such a config.
        batch: what the model takes: a tensor, a tuple, or a mapping, whose labels play no part.

    Returns:
        The same object.

    Raises:
        ValueError: Nothing waits, the model is sharded, or a layer is not called on this batch.
    """
    waiting = found(model)
    if not waiting:
        raise ValueError("choose: no columns of this model wait to be chosen; they were chosen already, or drawn, or given")
    device = next(model.parameters()).device
    batch = mapped(batch, lambda tensor: tensor.to(device))
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    _choose(model, waiting, lambda: call(plain, inputs_of(plain, batch, has_loss=False)))
    for module in model.modules():
        _look_no_further(module)
    return model


def found(model: nn.Module) -> list[Waiting]:
    """What waits of the active adapters of a model."""
    return [waiting for module in model.modules() for door in doors for waiting in door.active(module)]


@functools.cache
def _hook() -> Callable[..., None]:
    """What looks before a forward; no compiler does."""
    return torch.compiler.disable(_look, reason=f"sprand chooses columns at the first training forward: {BY_HAND}")


def _look(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Before a forward: choose, if it is one that trains. Where nothing waits any more, look no further."""
    if not module.training or not torch.is_grad_enabled():
        return
    if getattr(module, "_is_replica", False):
        raise ValueError(f"columns cannot be chosen in a replica of nn.DataParallel; {BY_HAND}")
    waiting = found(module)
    if waiting:
        _choose(module, waiting, lambda: module(*args, **kwargs))
    _look_no_further(module)


def _look_no_further(module: nn.Module) -> None:
    """Take the hook off a module in which nothing waits any more, of any adapter."""
    keys = [key for key, hook in module._forward_pre_hooks.items() if hook is _hook()]
    if not keys or any(door.any(inner) for inner in module.modules() for door in doors):
        return
    for key in keys:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _choose(model: nn.Module, waiting: Sequence[Waiting], run: Callable[[], Any]) -> None:
    sharding.refuse(model, "the choice of columns", f"before the model is sharded {BY_HAND}")
    sums = InputSums([one.site for one in waiting], "activation")
    with untouched(model, checkpointing=False), torch.no_grad(), sums.listening():
        run()
    _agree(sums)
    sums.finish(1)
    for one in waiting:
        one.choose(sums.values[one.site.name])
    columns = sum(one.count for one in waiting)
    logger.info("%d columns of %d weights were chosen by what came into them", columns, len(waiting))


def _agree(sums: InputSums) -> None:
    """Add up the sums of all ranks; a layer is called if it is on any of them."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    values = list(sums.values.values())
    called = torch.tensor([float(name in sums.called) for name in sums.values], dtype=torch.float64, device=values[0].device)
    flat = torch.cat([called, *(value.to(called.device) for value in values)])
    distributed.all_reduce(flat)
    counts, *parts = flat.split([len(values), *map(len, values)])
    sums.called = {name for name, count in zip(sums.values, counts.tolist(), strict=True) if count}
    for value, part in zip(values, parts, strict=True):
        value.copy_(part)
