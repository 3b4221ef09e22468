"""Attaching: one adapter at a time is in a model's weights. It is put in and taken off here, and what was there comes back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..layers import sharding, untargeted
from ..layers.attached import AttachedModule, attach, detach, write_now
from ..layers.first_backward import watch
from ..layers.module import sparse_modules
from ..layers.sites import Site, named_parameters, sites_of
from ..layers.units import Pattern
from ..layers.writable import check_writable
from ..selection.config import SparseConfig
from ..selection.pattern import RANDOM_STRATEGIES, axis_of, draw
from ..selection.targets import sites_named
from . import first_step, plain_states
from .in_full import buffers_of, copies, follow_rows, put_buffers
from .state import Adapter, State, known_state, tensor_names

Redraw = Callable[[torch.device], Tensor]  # draws indices anew, on a device


def add(model: nn.Module, name: str, adapter: Adapter) -> nn.Module:
    """Put an adapter on a model, beside those that it holds, as the active one; what does not belong to it is frozen.

    Args:
        model: any module whose weights are whole; changed in place.
        name: what to call the adapter.
        adapter: what trains. Deltas that it does not have yet are zeros. Its parameters trained in full have memory of their
            own where another adapter trains them as well.

    Returns:
        The same object.

    Raises:
        ValueError: A weight cannot be written, or is in a layer of PEFT. The model is as it was then, as after any other error.
    """
    sites = sites_named(model, adapter.patterns)
    _refuse_layers_of_peft(model, sites)
    check_writable({name: site.weight for name, site in sites.items()})
    is_first = known_state(model) is None
    state = _freeze(model) if is_first else known_state(model)
    state.adapters[name] = adapter
    try:
        exchange(model, state, name)
        watch(model)
    except BaseException:
        del state.adapters[name]
        if is_first:
            release(model, state)
        raise
    return model


def _refuse_layers_of_peft(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Refuse weights into which PEFT merges: entries that train would be written over what it adds to them."""
    if any(not isinstance(module, AttachedModule) for _, module in sparse_modules(model)):
        raise ValueError(
            "this model trains entries through PEFT already; call model.merge_and_unload() or model.unload() first, or add "
            "another adapter through PEFT: model.add_adapter(name, SprandConfig(...))"
        )
    layers = [module for module in model.modules() if any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__)]
    inside = {id(module) for layer in layers for module in layer.modules()}
    for name, site in sites.items():
        if any(id(module) in inside for module, _ in site.owners):
            raise ValueError(
                f"{name} is in a layer of PEFT, which merges into that weight and would lose there what it adds to entries that "
                "train; call model.merge_and_unload() first, or leave its modules out (exclude_modules)"
            )


def _freeze(model: nn.Module) -> State:
    """Let a model train nothing, and remember what it was before."""
    state = State(trained_before={name for name, p in named_parameters(model) if p.requires_grad})
    state.base_buffers = copies(buffers_of(model))
    state.shapes = {name: tuple(sharding.shape_of(p)) for name, p in named_parameters(model, remove_duplicate=False)}
    for p in model.parameters():
        p.requires_grad_(False)
    model._sprand = state
    first_step.watch(model)
    plain_states.watch(model, state)
    return state


def exchange(model: nn.Module, state: State, active: str | None, mixed: Adapter | None = None) -> None:
    """Take the active adapter off and attach another, a mixture, or nothing; where that fails, the first one is back."""
    before = state.active, state.mixed
    take_off(model, state, keep=False)
    state.active = state.mixed = None
    try:
        activate(model, state, active, mixed)
    except BaseException:
        take_off(model, state, keep=False)
        activate(model, state, *before)
        raise


def activate(model: nn.Module, state: State, active: str | None, mixed: Adapter | None = None) -> None:
    """Attach an adapter, a mixture of several, or nothing, to a model that has none attached; what is not there waits."""
    adapter = mixed or (state.adapters[active] if active is not None else None)
    _keep_base(model, state, () if adapter is None else adapter.saved)
    state.active, state.mixed = active, mixed
    if adapter is not None:
        _attach(model, adapter, sites_named(model, _named(model, adapter.patterns)))


def _keep_base(model: nn.Module, state: State, names: Collection[str]) -> None:
    """Keep what parameters hold before one of them trains in full for the first time."""
    new = set(names) - state.base_saved.keys()
    state.base_saved |= {name: p.data.clone() for name, p in _named(model, new).items()}


def _attach(model: nn.Module, adapter: Adapter, sites: Mapping[str, Site]) -> None:
    put_frozen(model, adapter, trained=True)
    for name, site in sites.items():
        _attach_entries(adapter, name, site)
    put_saved(model, adapter.saved)
    put_buffers(model, adapter.buffers)
    _require_grad(model, adapter.saved, True)
    _ignore_in_ddp(model)
    untargeted.follow(model)
    write_all(model)


def _attach_entries(adapter: Adapter, name: str, site: Site) -> None:
    """Let the adapter's entries of one weight train, in every module that holds it."""
    redraw = _redraw_of(adapter.config, name, site, adapter.patterns[name].nnz)
    _bring(adapter, site, redraw)
    pattern, first = adapter.patterns[name], site.owners[0]
    adapter.deltas[name] = attach(*first, pattern, adapter.deltas.get(name), redraw=redraw).delta
    for owner in site.owners[1:]:
        attach(*owner, pattern, redraw=redraw, leader=first)
    for module, parameter in site.owners:
        target = module.sparse_target(parameter)
        target.name, target.frozen = name, name in adapter.frozen


def _bring(adapter: Adapter, site: Site, redraw: Redraw | None) -> None:
    """Bring the adapter's tensors of one weight to its device; those on the meta device are made anew, deltas as zeros."""
    name, device = site.name, site.device
    pattern, delta = adapter.patterns[name], adapter.deltas.get(name)
    if device.type != "meta":
        pattern = Pattern(redraw(device)) if pattern.chosen.is_meta else pattern.to(device)
        adapter.patterns[name] = Pattern.of(pattern.chosen, site.units) if pattern.columns is None else pattern
        if delta is not None and delta.is_meta:
            del adapter.deltas[name]
            return
    if delta is not None and delta.device != device:
        delta.data = delta.data.to(device)


def _redraw_of(config: SparseConfig, name: str, site: Site, nnz: int) -> Redraw | None:
    """What draws the entries anew on another device, where they follow from the seed."""
    if config.strategy not in RANDOM_STRATEGIES or config.preserve_zeros:
        return None
    axis = axis_of(config.layout, site)
    return functools.partial(draw, config.strategy, name, site.shape, nnz, config.seed, axis=axis)


def take_off(model: nn.Module, state: State, keep: bool) -> None:
    """Take the active adapter off the model and, unless kept, put the base back; its own tensors are up to date then."""
    adapter = state.current
    if adapter is None:
        return
    for site in sites_of(model):
        if site.name in adapter.patterns:
            entries = site.entries
            adapter.deltas[site.name] = entries.delta
            if not entries.base.is_meta:
                adapter.patterns[site.name] = entries.pattern
    detach([module for _, module in sparse_modules(model)], keep)
    untargeted.follow(model)
    if keep:
        return
    put_frozen(model, adapter, trained=False)
    follow_rows(model, state)
    trained = put_saved(model, state.base_saved)
    adapter.saved = {name: trained.get(name, value) for name, value in adapter.saved.items()}
    adapter.buffers = put_buffers(model, state.base_buffers)
    _require_grad(model, state.base_saved, False)


def write_all(model: nn.Module) -> None:
    """Make every weight hold its trained values."""
    sharding.reshard(model)
    write_now([module for _, module in sparse_modules(model)])


def _require_grad(model: nn.Module, names: Collection[str], flag: bool) -> None:
    for name, p in named_parameters(model, remove_duplicate=False) if names else ():
        if name in names:
            p.requires_grad_(flag)


@contextmanager
def detached(model: nn.Module) -> Iterator[None]:
    """The model as it was before any adapter, inside of a `with` block; then the active one, if there is one, is back.

    Raises:
        ValueError: The model has adapters and is sharded.
    """
    state = known_state(model)
    if state is None:
        yield
        return
    sharding.refuse(model, "apply", "choose entries before the model is sharded")
    active, mixed = state.active, state.mixed
    take_off(model, state, keep=False)
    state.active = state.mixed = None
    try:
        yield
    finally:
        activate(model, state, active, mixed)


def release(model: nn.Module, state: State) -> None:
    """Make a model that has no adapter attached what it was before the first one."""
    del model._sprand
    for handle in state.handles:
        handle.remove()
    kept = _others_ignored_in_ddp(model)
    if hasattr(model, "_ddp_params_and_buffers_to_ignore"):
        del model._ddp_params_and_buffers_to_ignore
        if kept:
            model._ddp_params_and_buffers_to_ignore = kept
    for name, p in named_parameters(model):
        if name in state.shapes:
            p.requires_grad_(name in state.trained_before)


def put_saved(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give parameters trained in full other memory, and return what they had. One that is not in the model is left out."""
    return {name: sharding.put(p, values[name]) for name, p in _named(model, values).items()}


def _named(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """The parameters of these names that are in the model."""
    every = dict(named_parameters(model, remove_duplicate=False)) if names else {}
    return {name: every[name] for name in names if name in every}


def put_frozen(model: nn.Module, adapter: Adapter | None, trained: bool) -> None:
    """Make weights hold their frozen values, or what was there before any training; attached entries start from there."""
    if adapter is None or not adapter.frozen:
        return
    parameters = dict(named_parameters(model, remove_duplicate=False))
    there = {name: frozen for name, frozen in adapter.frozen.items() if name in parameters}
    for name, frozen in there.items():
        if trained:
            frozen.write(parameters[name])
        else:
            frozen.restore(parameters[name])
    changed = {id(parameters[name]) for name in there}
    for site in sites_of(model):
        if id(site.weight) not in changed:
            continue
        for module, parameter in site.owners:
            entries = module.sparse_entries(parameter)
            entries.base.copy_(entries.pattern.gather(site.weight.data))


def _ignore_in_ddp(model: nn.Module) -> None:
    """Indices and base are alike on every rank: DistributedDataParallel need not broadcast them before every forward."""
    own = [name for _, indices, base in tensor_names(model) for name in (indices, base)]
    model._ddp_params_and_buffers_to_ignore = _others_ignored_in_ddp(model) + own


def _others_ignored_in_ddp(model: nn.Module) -> list[str]:
    return [name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", ()) if "sprand_" not in name]
