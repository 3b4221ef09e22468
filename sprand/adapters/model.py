"""Assembly: adapters on a model: attached and taken off, switched, combined, merged and unmerged, exactly."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ..kernels import ops
from ..layers import sharding
from ..layers.module import attach, detach, set_active, sparse_modules, write_now
from ..layers.sites import Site, sites_of
from ..selection import pattern
from ..selection.config import AS_GIVEN, SparseConfig
from ..selection.targets import sites_named
from . import optimizer_order
from .combining import Rule
from .mixing import check_weights, mix
from .state import Adapter, State, state_of, tensor_names

ELSEWHERE = (
    "write the adapter by sprand.save(model, path) on every rank, and load it into a model that is not sharded (the base model "
    "is to be had by `with sprand.disabled(model)`)"
)


def install(model: nn.Module, state: State, name: str, adapter: Adapter, sites: Mapping[str, Site]) -> None:
    """Attach an adapter, as the active one, to a model that has none attached; everything else is frozen."""
    for p in model.parameters():
        p.requires_grad_(False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key in adapter.saved:
        state.base_saved.setdefault(key, parameters[key].data.clone())
    state.adapters[name], state.active, state.mixed = adapter, name, None
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):  # its inference path reads weights without calling the layers
            state.fast_paths.append((module, module.activation_relu_or_gelu))
            module.activation_relu_or_gelu = 0
    model._sprand = state
    _attach(model, adapter, sites)
    optimizer_order.watch(model)


def _attach(model: nn.Module, adapter: Adapter, sites: Mapping[str, Site]) -> None:
    _write_frozen(model, adapter, trained=True)
    for name, indices in adapter.indices.items():
        site = sites[name]
        device, redraw, base, delta = site.device, None, None, adapter.deltas.get(name)
        if adapter.config.strategy in pattern.RANDOM_STRATEGIES and not adapter.config.preserve_zeros:
            config, nnz = adapter.config, indices.numel()
            redraw = functools.partial(pattern.draw, config.strategy, name, site.shape, nnz, config.seed, layout=config.layout)
        if delta is not None and delta.device != device:
            delta.data = delta.data.to(device)
        indices = adapter.indices[name] = indices.to(device)
        for module, parameter in site.owners:
            entries = attach(module, parameter, indices, delta, base, redraw=redraw)
            module.sparse_target(parameter).folded = name in adapter.frozen
            delta, base = entries.delta, entries.base
        adapter.deltas[name] = delta
    _set_saved(model, adapter.saved)
    for name, p in model.named_parameters():
        if name in adapter.saved:
            p.requires_grad_(True)
    _ignore_in_ddp(model)
    write(model)


def _detach(model: nn.Module, state: State, keep: bool) -> None:
    """Take the active adapter off the model and, unless kept, put the base back; its own tensors are up to date then."""
    adapter = state.current
    for site in sites_of(model):
        if site.name in adapter.indices:
            entries = site.entries
            adapter.indices[site.name], adapter.deltas[site.name] = entries.indices, entries.delta
    detach([module for _, module in sparse_modules(model)], keep)
    if adapter is not None and not keep:
        _write_frozen(model, adapter, trained=False)
        adapter.saved = {name: value for name, value in _set_saved(model, state.base_saved).items() if name in adapter.saved}
        for name, p in model.named_parameters():
            if name in state.base_saved:
                p.requires_grad_(False)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that train: the deltas, and those of `modules_to_save`.

    Raises:
        ValueError: the model trains nothing.
    """
    state_of(model)
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, for any torch optimizer.

    Args:
        model: a model with trained entries.

    Raises:
        ValueError: the model trains nothing.
    """
    return [p for _, p in named_parameters(model)]


def write(model: nn.Module) -> None:
    """Make every weight hold its trained values now, for code that reads weights without a forward.

    Of an FSDP2 model every rank must call this: the shards hold the trained values then. Under ZeRO-3 gather the parameters
    first (`deepspeed.zero.GatheredParameters`); what is in parts stays as it is.

    Args:
        model: a model with trained entries.

    Raises:
        ValueError: the model has no trained entries.
    """
    state_of(model)
    sharding.reshard(model)
    write_now([module for _, module in sparse_modules(model)])


def merge(model: nn.Module) -> nn.Module:
    """Keep the trained weights and drop all else: the model is as it was, with other values.

    Args:
        model: a model with trained entries; changed in place.

    Returns:
        The same object.

    Raises:
        ValueError: the model has no trained entries, or is sharded.
    """
    state = state_of(model)
    sharding.refuse(model, "merge", ELSEWHERE)
    _detach(model, state, keep=True)
    return _leave(model, state)


def unmerge(model: nn.Module) -> nn.Module:
    """Put the base weights back, bit for bit, and drop all else.

    Args:
        model: a model with trained entries; changed in place.

    Returns:
        The same object.

    Raises:
        ValueError: the model has no trained entries, or is sharded.
    """
    state = state_of(model)
    sharding.refuse(model, "unmerge", ELSEWHERE)
    _detach(model, state, keep=False)
    return _leave(model, state)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, exactly, inside of a `with` block.

    Of an FSDP2 or ZeRO-3 model every rank enters and leaves the block.

    Args:
        model: a model with trained entries. The block gets it, too: `with sprand.disabled(model) as base`.

    Raises:
        ValueError: the model has no trained entries, or is sharded and cannot be put back: one with folded entries of a
            redrawn mask, or with modules trained in full under ZeRO-3.
    """
    state = state_of(model)
    _refuse_to_disable(model, state)
    sharding.reshard(model)
    modules = [module for _, module in sparse_modules(model)]
    active = [module._sprand_active for module in modules]
    trained = _set_saved(model, state.base_saved)
    set_active(modules, [False] * len(modules))
    _write_frozen(model, state.current, trained=False)
    try:
        yield model
    finally:
        sharding.reshard(model)
        _set_saved(model, trained)
        _write_frozen(model, state.current, trained=any(active))
        set_active(modules, active)


def switch(model: nn.Module, name: str | Mapping[str, float] | None) -> nn.Module:
    """Make another loaded adapter the active one, by as many writes as it has entries.

    Args:
        model: a model with loaded adapters.
        name: the adapter; or `{name: weight}` for a weighted sum of several, for inference; or None for the base.

    Returns:
        The same object. An optimizer made for one adapter goes on when that adapter is active again.

    Raises:
        ValueError: no such adapter, a mixture of adapters with modules trained in full, or a sharded model.
    """
    state = state_of(model)
    sharding.refuse(model, "switch", "make the adapter active before the model is sharded")
    wanted = {name: 1.0} if isinstance(name, str) else dict(name or {})
    if name is not None:
        check_weights("switch", state, wanted)
    mixed = None if name is None or isinstance(name, str) else mix(state, wanted)
    _detach(model, state, keep=False)
    state.active, state.mixed = (name if isinstance(name, str) else None), mixed
    if state.current is not None:
        _attach(model, state.current, sites_named(model, state.current.indices))
    return model


@contextmanager
def detached(model: nn.Module) -> Iterator[State]:
    """The model as it was before any adapter, its adapters set aside, inside of a `with` block; then the active one is back.

    Raises:
        ValueError: the model has no trained entries, or is sharded.
    """
    state = state_of(model)
    sharding.refuse(model, "apply", "choose entries before the model is sharded")
    active, mixed = state.active, state.mixed
    _detach(model, state, keep=False)
    state.active = state.mixed = None
    try:
        yield state
    finally:
        state.active, state.mixed = active, mixed
        if state.current is not None:
            _attach(model, state.current, sites_named(model, state.current.indices))


def _leave(model: nn.Module, state: State) -> nn.Module:
    del model._sprand
    if hasattr(model, "_ddp_params_and_buffers_to_ignore"):
        kept = [name for name in model._ddp_params_and_buffers_to_ignore if "sprand_" not in name]
        del model._ddp_params_and_buffers_to_ignore
        if kept:
            model._ddp_params_and_buffers_to_ignore = kept
    for module, activation in state.fast_paths:
        module.activation_relu_or_gelu = activation
    for name, p in model.named_parameters():
        p.requires_grad_(name in state.trained_before)
    return model


def _set_saved(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the parameters of `modules_to_save` other memory, and return what they had."""
    parameters = dict(model.named_parameters(remove_duplicate=False)) if values else {}
    return {name: sharding.put(parameters[name], value) for name, value in values.items()}


def _refuse_to_disable(model: nn.Module, state: State) -> None:
    kind = sharding.kind_of(model)
    what = None
    if kind is not None and state.current is not None and state.current.frozen:
        what = "folded entries of a redrawn mask"
    elif kind == "zero3" and state.base_saved:
        what = "modules trained in full"
    if what is not None:
        raise ValueError(f"disabled: {what} cannot be put back under {sharding.KINDS[kind]}; use a model that is not sharded")


def _write_frozen(model: nn.Module, adapter: Adapter | None, trained: bool) -> None:
    """Make weights hold their folded values, or what was there before any training; attached entries start from there."""
    if adapter is None or not adapter.frozen:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, frozen in adapter.frozen.items():
        frozen.write(parameters[name]) if trained else frozen.restore(parameters[name])
    changed = {id(parameters[name]) for name in adapter.frozen}
    for site in sites_of(model):
        if id(site.weight) not in changed:
            continue
        for module, parameter in site.owners:
            entries = module.sparse_entries(parameter)
            entries.base.copy_(ops.gather(site.weight.data, entries.indices))


def _ignore_in_ddp(model: nn.Module) -> None:
    """Indices and base are alike on every rank: DistributedDataParallel need not broadcast them before every forward."""
    before = [name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", ()) if "sprand_" not in name]
    model._ddp_params_and_buffers_to_ignore = before + [
        name for _, indices, base in tensor_names(model) for name in (indices, base)
    ]


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
        ValueError: no such adapter, a name that is taken, an option that does not fit, an adapter that cannot be combined, or
            a sharded model. The model is as it was then.
    """
    state, rule = state_of(model), Rule(method, density, seed, signs)
    sharding.refuse(model, "combine", "combine the adapters before the model is sharded")
    if name in state.adapters:
        raise ValueError(f"combine: adapter {name!r} is loaded already; choose another name")
    check_weights("combine", state, weights)
    made = mix(state, weights, rule, drop_heads, recorded=True)
    given = SparseConfig(target_modules=None, target_parameters=tuple(made.indices))
    made.config = SparseConfig.from_dict(given.to_dict() | AS_GIVEN)
    for delta in made.deltas.values():
        delta.requires_grad_(True)
    state.adapters[name] = made
    return switch(model, name)
