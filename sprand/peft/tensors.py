"""The tensors of one adapter in the state of a PEFT model: taken out to be saved, proven when they are loaded."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..adapters.architecture import architecture_of
from ..adapters.layout import DRAW, PREFIX, UNITS, said_of_draw, selection_of_runs, written_versions
from ..adapters.waiting import refuse_waiting
from ..layers import sharding
from ..layers.sites import WRAPPED, Site, plain_name
from ..layers.target import DELTA, INDICES
from ..layers.units import whole_units
from ..selection import pattern
from ..selection.config import AS_GIVEN
from ..selection.old_runs import are_runs
from .adapter_target import AdapterTarget
from .config import SprandConfig
from .layer import SprandLayer, adapter_targets
from .plan import check_same_base, describe
from .waiting import waits

BY_ITSELF = (
    "load its folder under a name that the model does not have yet, and without a config, so that its own adapter_config.json is "
    "read"
)


def taken_out(model: nn.Module, config: SprandConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter by their names in the plain model; its config, which is saved after this, learns what they are.

    Of a sharded model they are gathered, for which every rank must call this, unless `state_dict` has them whole.

    Raises:
        ValueError: Values are missing, or not finite.
    """
    targets = list(adapter_targets(model, adapter_name))
    refuse_waiting(any(waits(layer, parameter, adapter_name) for _, layer, parameter, _ in targets), "save")
    names = [_names(plain_name(key), parameter, adapter_name) for key, _, parameter, _ in targets]
    own = {name for pair in names for name in pair}
    gathered = _gathered(model, {name: value for name, value in state_dict.items() if plain_name(name) in own})
    result = {plain_name(name): value for name, value in gathered.items()}
    outer = _outer_layers(model)
    heads = {name: value for name, value in state_dict.items() if f".modules_to_save.{adapter_name}." in name}
    state_dict.update(_gathered(model, heads))  # PEFT takes them from there
    described = {}
    for (delta, listed), (_, layer, parameter, target) in zip(names, targets, strict=True):
        site, indices = layer.sprand_site(parameter), target.indices[adapter_name]
        if result:  # of a sharded model all but the first rank may have none
            _check_saved(target.name, indices.numel(), result.get(delta))
        if config.drawn:
            axis = pattern.axis_of(config.layout, site)
        else:
            axis, units = whole_units(site.shape, indices) or (None, None)
            if axis is not None and result.pop(listed, None) is not None:
                result[_of_units(listed, axis)] = units
        described[target.name] = describe(site, indices, layer.sprand_base_of(parameter, adapter_name), axis)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config.saved = {name: config.saved[name] for name in ("selection",) if name in config.saved} | {
        "targets": described,
        "indices_saved": not config.drawn,
        "untrained": None,  # PEFT trains whole modules
        "versions": written_versions(described),
        "architecture": architecture_of(base, with_head=bool(heads)),
    }
    if are_runs(config.layout):
        own = None if config.sparse_config is None else config.sparse_config | AS_GIVEN
        config.saved |= {"layout": "unstructured", "selection": selection_of_runs(vars(config)), "sparse_config": own}
    saved = {_in_base(name, outer): value for name, value in result.items()}
    if saved and config.drawn:
        saved[(PREFIX if hasattr(model, "get_base_model") else "") + DRAW] = config.draw
    return saved


def put_back(
    model: nn.Module,
    config: SprandConfig,
    adapter_name: str,
    tensors: dict[str, Tensor],
    stored_as: Callable[[str, str], str],
) -> dict[str, Tensor]:
    """The tensors of a file under their names in the model, proven to fit it.

    Args:
        model: has the adapter already.
        config: learns the indices that the file brings.
        adapter_name: of the adapter.
        tensors: by their names in the file.
        stored_as: gives the name in a file, of the name in a model and the adapter's.

    Raises:
        ValueError: Values are missing or not finite, the adapter has other entries, or the base is another one.
    """
    drawn, draw = config.drawn, next((value for name, value in tensors.items() if name in (DRAW, PREFIX + DRAW)), None)
    result = {name: value for name, value in tensors.items() if value is not draw}
    stored = {plain_name(name): name for name in result}
    brings_indices = any(f".{kind}" in name for name in result for kind in (INDICES, *map("sprand_{}".format, UNITS)))
    if not brings_indices:
        _check_draw(config, adapter_name, draw)
    outer = _outer_layers(model)
    for key, layer, parameter, target in adapter_targets(model, adapter_name):
        names = _names(_name_in_state(key), parameter, adapter_name)
        of_units = [_of_units(names[1], axis) for axis in range(len(UNITS))]
        for name in (*names, *of_units):
            plain = stored_as(plain_name(name), adapter_name)
            for known in dict.fromkeys((plain, _in_base(plain, outer))):
                for full in (known, PREFIX + known):  # a model into which layers were injected has no prefix
                    if full in stored:
                        result[name] = result.pop(stored[full])
        site = layer.sprand_site(parameter)
        for axis, name in enumerate(of_units):
            if name in result:
                called = f"adapter {adapter_name!r}: {site.name}"
                result[names[1]] = pattern.from_columns(called, result.pop(name), site.shape, axis)
        delta, indices = map(result.get, names)
        _check_loaded(config, adapter_name, site, target, delta, indices)
        if indices is not None and drawn:
            _check_same_entries(adapter_name, target, result.pop(names[1]))
        elif indices is not None:
            config.indices = (config.indices or {}) | {target.name: indices}
        elif are_runs(config.layout):  # the seed drew what the state now names
            result[names[1]] = target.indices[adapter_name]
    return result


def _outer_layers(model: nn.Module) -> list[str]:
    """The names of our layers that have others inside of them, from the inside out."""
    names = [plain_name(key) for key, module in model.named_modules() if isinstance(module, SprandLayer)]
    return [name for name, following in itertools.pairwise(names) if following.startswith(f"{name}.base_layer.")][::-1]


def _in_base(name: str, outer: Iterable[str]) -> str:
    """A name as it is without our layers around it, as other readers of the file know it."""
    for layer in outer:
        if name.startswith(f"{layer}.base_layer."):
            name = layer + name.removeprefix(f"{layer}.base_layer")
    return name


def _name_in_state(key: str) -> str:
    """What `state_dict` calls a module: of the wrappers in its name torch.compile's alone is named."""
    return ".".join(part for part in key.split(".") if part == "_orig_mod" or part not in WRAPPED)


def _names(key: str, parameter: str, adapter_name: str) -> tuple[str, str]:
    """What a state calls an adapter's delta and indices of one parameter of a layer."""
    suffix = "" if parameter == "weight" else f"_{parameter}"
    return f"{key}.{DELTA}{suffix}.{adapter_name}.weight", f"{key}.{INDICES}{suffix}.{adapter_name}"


def _of_units(name: str, axis: int) -> str:
    """What a state calls whole rows or columns in place of the indices of this name."""
    return name.replace(f".{INDICES}", f".sprand_{UNITS[axis]}")


def _check_saved(name: str, count: int, delta: Tensor | None) -> None:
    if delta is None or delta.numel() != count:
        raise ValueError(
            f"save: expected {count:,} values of {name}, got {'none' if delta is None else list(delta.shape)} in the state_dict; "
            "leave out state_dict, or under FSDP1 give state_dict=wrapper.state_dict(), and call save_pretrained on every rank "
            "with is_main_process=rank == 0"
        )
    if not torch.isfinite(delta).all():
        raise ValueError(f"save: the values of {name} are not finite; load the last good checkpoint")


def _check_loaded(
    config: SprandConfig, adapter_name: str, site: Site, target: AdapterTarget, delta: Tensor | None, indices: Tensor | None
) -> None:
    count = target.deltas[adapter_name].numel()
    if delta is None or delta.numel() != count or not torch.isfinite(delta).all():
        raise ValueError(
            f"adapter {adapter_name!r}: expected {count:,} finite values for {site.name}, got "
            f"{'none' if delta is None else list(delta.shape)}; its files do not belong together, or are damaged"
        )
    if indices is not None:
        pattern.check_indices(f"adapter {adapter_name!r}: {site.name}", indices, site.numel)
        if config.targets and site.name in config.targets:
            check_same_base(adapter_name, site, indices.to(site.device), config.targets[site.name])


def _check_draw(config: SprandConfig, adapter_name: str, draw: Tensor | None) -> None:
    """Prove that values without indices belong to the entries that the adapter has."""
    if draw is None and config.drawn and config.targets is None:
        warnings.warn(
            f"adapter {adapter_name!r}: the tensors do not say of which entries they are, since an older sprand saved them; they "
            f"are taken for those of {said_of_draw(config.draw)}; {BY_ITSELF}",
            stacklevel=5,
        )
    here = None if config.draw is None else said_of_draw(config.draw)
    if draw is not None and said_of_draw(draw) != here:
        raise ValueError(
            f"adapter {adapter_name!r}: expected values of the entries that it has ({here or 'given by a mask'}), got those of "
            f"{said_of_draw(draw)}; {BY_ITSELF}"
        )


def _check_same_entries(adapter_name: str, target: AdapterTarget, indices: Tensor) -> None:
    live = target.indices[adapter_name]
    if not torch.equal(indices.to(live), live):
        raise ValueError(
            f"adapter {adapter_name!r}: expected values of the entries of {target.name} that its seed draws, got those of other "
            f"ones; {BY_ITSELF}"
        )


def _gathered(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, whole: those of which a rank has a part are asked of all ranks."""
    parameters = dict(model.named_parameters()) if sharding.kind_of(model) == "zero3" else {}
    result = {}
    for name, value in tensors.items():
        p = parameters.get(name)
        in_parts = p is not None and sharding.is_partition(p) and value.shape != sharding.shape_of(p)
        result[name] = sharding.whole(p if in_parts else value)
    return result
