"""Assembly: adapters on a model: attached and taken off, switched, combined, merged and unmerged, exactly."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from . import ops, optimizer_order, pattern, sharding
from .combining import SUM, Origin, Part, Rule, combined, content_checksum, record, shared_counts
from .config import SparseConfig
from .frozen import Frozen
from .layers import SparseModule, attach, detach, set_active, write_now
from .targets import Place, places_of

ELSEWHERE = (
    "write the adapter by sprand.save(model, path) on every rank, and load it into a model that is not sharded (the base model "
    "is to be had by `with sprand.disabled(model)`)"
)


@dataclass
class Adapter:
    """A set of trained entries, attached to the model or set aside.

    Attributes:
        config: what it was made from.
        indices: flat positions by parameter name.
        deltas: trained changes by parameter name.
        saved: values of the parameters of `modules_to_save` by name.
        frozen: entries that trained under an earlier mask, by parameter name.
        selection: how the entries were chosen, where not by a random draw: fields of `SparseConfig` as JSON types.
    """

    config: SparseConfig
    indices: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, nn.Parameter] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Frozen] = field(default_factory=dict)
    selection: dict[str, Any] | None = None


@dataclass
class State:
    """What sprand keeps with a model: its adapters, which one is active, and what the model was before."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    mixed: Adapter | None = None
    trained_before: set[str] = field(default_factory=set)
    base_saved: dict[str, Tensor] = field(default_factory=dict)
    fast_paths: list[tuple[nn.Module, int]] = field(default_factory=list)

    @property
    def current(self) -> Adapter | None:
        """The adapter whose entries are attached now."""
        return self.mixed or (self.adapters[self.active] if self.active is not None else None)


def install(model: nn.Module, state: State, name: str, adapter: Adapter, places: Mapping[str, Place]) -> None:
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
    _attach(model, adapter, places)
    optimizer_order.watch(model)


def _attach(model: nn.Module, adapter: Adapter, places: Mapping[str, Place]) -> None:
    _write_frozen(model, adapter, trained=True)
    for name, indices in adapter.indices.items():
        place = places[name]
        device, redraw, base, delta = place.parameter.device, None, None, adapter.deltas.get(name)
        if adapter.config.strategy in pattern.RANDOM_STRATEGIES and not adapter.config.preserve_zeros:
            shape = tuple(place.parameter.shape)
            config, nnz = adapter.config, indices.numel()
            redraw = functools.partial(pattern.draw, config.strategy, name, shape, nnz, config.seed, layout=config.layout)
        if delta is not None and delta.device != device:
            delta.data = delta.data.to(device)
        indices = adapter.indices[name] = indices.to(device)
        for module, parameter in place.owners:
            entries = attach(module, parameter, indices, delta, base, redraw=redraw)
            module._sprand_targets[parameter].folded = name in adapter.frozen
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
    modules = list(sparse_modules(model))
    for prefix, module in modules:
        for parameter in module._sprand_targets:
            name = f"{prefix}.{parameter}" if prefix else parameter
            if name in adapter.indices:
                entries = module.sparse_entries(parameter)
                adapter.indices[name], adapter.deltas[name] = entries.indices, entries.delta
    detach([module for _, module in modules], keep)
    if adapter is not None and not keep:
        _write_frozen(model, adapter, trained=False)
        adapter.saved = {name: value for name, value in _set_saved(model, state.base_saved).items() if name in adapter.saved}
        for name, p in model.named_parameters():
            if name in state.base_saved:
                p.requires_grad_(False)


def state_of(model: nn.Module) -> State:
    """What sprand keeps with a model.

    Raises:
        ValueError: nothing was applied to or loaded into this model.
    """
    state = getattr(model, "_sprand", None)
    if state is None:
        raise ValueError(
            "this model has no trained entries; call sprand.apply(model, ...) or sprand.load(model, path) first (and pass the "
            "model itself, not its DataParallel wrapper)"
        )
    return state


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


def sparse_modules(model: nn.Module) -> Iterator[tuple[str, SparseModule]]:
    """The modules that hold trained entries, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseModule))


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
        _attach(model, state.current, {place.name: place for place in places_of(model, set(state.current.indices))})
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
            _attach(model, state.current, {place.name: place for place in places_of(model, set(state.current.indices))})


def mix(
    state: State, weights: Mapping[str, float], rule: Rule = SUM, drop_heads: bool = False, recorded: bool = False
) -> Adapter:
    """Several adapters as one, whose config is that of the first: combined in float32, rounded once with the base."""
    for name in weights:
        if state.adapters[name].saved and not drop_heads:
            raise ValueError(
                f"switch: adapter {name!r} trained whole modules ({', '.join(state.adapters[name].saved)}), which cannot be "
                "mixed; sprand.combine(model, weights, drop_heads=True) leaves them out"
            )
        if state.adapters[name].frozen:
            raise ValueError(f"switch: adapter {name!r} has entries folded by a redrawn mask, which cannot be mixed")
    chosen = [(state.adapters[name], float(weight)) for name, weight in weights.items()]
    targets: dict[str, list[Part]] = {}
    for number, (adapter, weight) in enumerate(chosen):
        for target, indices in adapter.indices.items():
            targets.setdefault(target, []).append(Part(number, weight, indices, adapter.deltas[target].detach()))
    for parts in targets.values():
        device = parts[0].delta.device
        parts[:] = [replace(part, delta=part.delta.to(device)) for part in parts]
    wholes = combined(rule, len(chosen), targets)
    result = Adapter(chosen[0][0].config)
    if recorded:
        places = (([part.number for part in parts], wholes[target].positions) for target, parts in targets.items())
        shared = shared_counts(len(chosen), places)
        checksums = [content_checksum(adapter.indices, adapter.deltas) for adapter, _ in chosen]
        origins = [Origin(*fields) for fields in zip(weights, weights.values(), checksums, shared, strict=True)]
        result.selection = record(rule, origins)
    for target, whole in wholes.items():
        result.indices[target], result.deltas[target] = whole.indices, nn.Parameter(whole.delta, requires_grad=False)
    return result


def check_weights(what: str, state: State, weights: Mapping[str, float]) -> None:
    """Prove that weights are those of loaded adapters.

    Raises:
        ValueError: they are not.
    """
    if not weights:
        raise ValueError(f"{what}: expected a name, {{name: weight}} of at least one adapter, or None for the base, got {{}}")
    unknown = sorted(set(weights) - set(state.adapters))
    if unknown:
        raise ValueError(f"{what}: no adapter {unknown[0]!r} is loaded; there are {', '.join(sorted(state.adapters))}")
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise ValueError(f"{what}: expected finite weights, got {dict(weights)}")


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
    for _, module in sparse_modules(model):
        for parameter in module._sprand_targets:
            if id(module._parameters[parameter]) in changed:
                entries = module.sparse_entries(parameter)
                entries.base.copy_(ops.gather(module._parameters[parameter].data, entries.indices))


def _ignore_in_ddp(model: nn.Module) -> None:
    """Indices and base are alike on every rank: DistributedDataParallel need not broadcast them before every forward."""
    before = [name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", ()) if "sprand_" not in name]
    model._ddp_params_and_buffers_to_ignore = before + [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in sparse_modules(model)
        for target in module._sprand_targets.values()
        for name in (target.indices, target.base)
    ]
