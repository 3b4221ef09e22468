"""Adapters on a model: put on and taken off, switched, combined, merged and unmerged, exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..layers import offload, sharding, sites, untargeted
from ..layers.attached import set_active
from ..layers.module import sparse_modules
from ..selection.config import AS_GIVEN, SparseConfig
from . import first_step
from .attaching import add, exchange, put_frozen, put_saved, release, take_off, write_all
from .combining import Rule
from .in_full import collect_buffers, follow_rows, put_buffers, take_unfrozen
from .mixing import check_weights, mix
from .state import State, state_of

ELSEWHERE = (
    "write the adapter by sprand.save(model, path) on every rank, and load it into a model that is not sharded (the base model "
    "is to be had by `with sprand.disabled(model)`)"
)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that train: the deltas, those of `modules_to_save`, and what was unfrozen by hand.

    Raises:
        ValueError: The model trains nothing.
    """
    take_unfrozen(model, state_of(model))
    first_step.watch(model)
    return ((name, p) for name, p in sites.named_parameters(model) if p.requires_grad)


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, for any torch optimizer.

    Args:
        model: a model with trained entries.

    Raises:
        ValueError: The model trains nothing.
    """
    return [p for _, p in named_parameters(model)]


def write(model: nn.Module) -> None:
    """Make every weight hold its trained values now, for code that reads weights without a forward.

    Of an FSDP2 model every rank must call this: the shards hold the trained values then. Under ZeRO-3 gather the parameters
    first (`deepspeed.zero.GatheredParameters`); what is in parts stays as it is.

    Args:
        model: a model with trained entries.

    Raises:
        ValueError: The model has no trained entries.
    """
    state_of(model)
    sharding.refuse_fsdp1(model, "write")
    offload.refuse(model, "write")
    write_all(model)


def merge(model: nn.Module) -> nn.Module:
    """Keep the trained weights and drop all else: the model is as it was, with other values.

    Args:
        model: a model with trained entries; changed in place.

    Returns:
        The same object.

    Raises:
        ValueError: The model has no trained entries, or is sharded.
    """
    return _end(model, "merge", keep=True)


def unmerge(model: nn.Module) -> nn.Module:
    """Put the base weights back, bit for bit, and drop all else.

    Args:
        model: a model with trained entries; changed in place.

    Returns:
        The same object.

    Raises:
        ValueError: The model has no trained entries, or is sharded.
    """
    return _end(model, "unmerge", keep=False)


def _end(model: nn.Module, what: str, keep: bool) -> nn.Module:
    state = state_of(model)
    sharding.refuse(model, what, ELSEWHERE)
    offload.refuse(model, what)
    take_off(model, state, keep)
    release(model, state)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, exactly, inside of a `with` block.

    Of an FSDP2 or ZeRO-3 model every rank enters and leaves the block.

    Args:
        model: a model with trained entries. The block gets it, too: `with sprand.disabled(model) as base`.

    Raises:
        ValueError: The model has no trained entries, or is sharded and cannot be put back: one with frozen entries of a
            redrawn mask, or with modules trained in full under ZeRO-3.
    """
    state = state_of(model)
    _refuse_to_disable(model, state)
    sharding.reshard(model)
    follow_rows(model, state)
    modules = [module for _, module in sparse_modules(model)]
    active = [module.sparse_active for module in modules]
    trained = put_saved(model, state.base_saved)
    buffers = put_buffers(model, state.base_buffers)
    set_active(modules, [False] * len(modules))
    untargeted.follow(model)
    put_frozen(model, state.current, trained=False)
    try:
        yield model
    finally:
        sharding.reshard(model)
        put_saved(model, trained)
        put_buffers(model, buffers)
        put_frozen(model, state.current, trained=any(active))
        set_active(modules, active)
        untargeted.follow(model)


def switch(model: nn.Module, name: str | Mapping[str, float] | None) -> nn.Module:
    """Make another loaded adapter the active one, by as many writes as it has entries.

    Args:
        model: a model with loaded adapters.
        name: the adapter; or `{name: weight}` for a weighted sum of several, for inference; or None for the base.

    Returns:
        The same object. An optimizer made for one adapter goes on when that adapter is active again.

    Raises:
        ValueError: No such adapter is loaded, a mixture is of adapters with modules trained in full, or the model is sharded.
    """
    state = state_of(model)
    sharding.refuse(model, "switch", "make the adapter active before the model is sharded")
    offload.refuse(model, "switch")
    weights = {name: 1.0} if isinstance(name, str) else name
    if weights is not None:
        check_weights("switch", state, weights)
    collect_buffers(model, state)
    mixed = mix(state, weights) if isinstance(name, Mapping) else None
    if isinstance(name, str):
        _check_shapes(model, state, name)
    exchange(model, state, name if isinstance(name, str) else None, mixed)
    return model


def _check_shapes(model: nn.Module, state: State, name: str) -> None:
    """Prove that the parameters which an adapter trained in full have their shapes still."""
    shapes = {key: tuple(sharding.shape_of(p)) for key, p in sites.named_parameters(model)}
    for key, value in state.adapters[name].saved.items():
        if key in shapes and shapes[key] != tuple(value.shape):
            raise ValueError(
                f"switch: adapter {name!r} trained {key} as {list(value.shape)}, and it is {list(shapes[key])} now; put the "
                "module back that it was trained with, or load the adapter into a model of its own"
            )


def _refuse_to_disable(model: nn.Module, state: State) -> None:
    sharding.refuse_fsdp1(model, "disabled")
    offload.refuse(model, "disabled")
    kind = sharding.kind_of(model)
    if kind is None:
        return
    if state.current is not None and state.current.frozen:
        what = "frozen entries (of a redrawn mask, or of added rows)"
    elif kind == "zero3" and state.base_saved:
        what = "modules trained in full"
    else:
        return
    raise ValueError(f"disabled: {what} cannot be put back under {sharding.KINDS[kind]}; use a model that is not sharded")


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    method: str = "sum",
    *,
    density: float | None = None,
    seed: int = 0,
    signs: str = "total",
    name: str = "combined",
    drop_heads: bool = False,
) -> nn.Module:
    """Make one adapter of several loaded ones, and make it the active one; its entries are the union of theirs.

    Args:
        model: a model with loaded adapters; they stay.
        weights: `{name: weight}`, in the order in which they are summed.
        method: `"sum"`: of weight times change. `"mean"`: the sum, over the number of adapters. `"ties"` (arXiv 2306.01708): the
            largest changes of each adapter vote on the sign of each entry, and those of that sign are averaged. `"dare"` (arXiv
            2311.03099): random changes of each adapter are kept, divided by `density`, and summed.
        density: of ties and dare: which fraction of each adapter's entries is kept, in (0, 1].
        seed: of dare's draw.
        signs: of ties: what elects a sign, `"total"`, the sum of the changes, or `"frequency"`, their number.
        name: what to call the new adapter.
        drop_heads: leave out modules trained in full (each task keeps its own head); without it they are refused.

    Returns:
        The same object.

    Raises:
        ValueError: No such adapter is loaded, the name is taken, an option does not fit, an adapter cannot be combined, or the
            model is sharded. The model is as it was then.
    """
    state, rule = state_of(model), Rule(method, density, seed, signs)
    sharding.refuse(model, "combine", "combine the adapters before the model is sharded")
    offload.refuse(model, "combine")
    if name in state.adapters:
        raise ValueError(f"combine: adapter {name!r} is loaded already; choose another name")
    check_weights("combine", state, weights)
    collect_buffers(model, state)
    made = mix(state, weights, rule, drop_heads, recorded=True)
    given = SparseConfig(target_modules=None, target_parameters=tuple(made.patterns))
    made.config = dataclasses.replace(given, **AS_GIVEN)
    for delta in made.deltas.values():
        delta.requires_grad_(True)
    return add(model, name, made)
