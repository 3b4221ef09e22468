"""Plans: what an adapter trains of a base model that PEFT may have wrapped, decided as `sprand.apply` decides it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapters.file import draw
from ..adapters.fingerprint import check_base, described_axis, described_target
from ..adapters.layout import targeted
from ..kernels import ops
from ..layers.sites import WRAPPED, Site, collected, distinct, joined, own_sites
from ..layers.writable import check_writable
from ..selection import pattern
from ..selection.choose import choose
from ..selection.config import SparseConfig
from ..selection.mask import Mask
from ..selection.old_runs import are_runs, draw_runs
from ..selection.targets import HEADS, View, closest, find_targets, output_of
from .config import SprandConfig

LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
CPU = torch.device("cpu")
ADDED_BY_PEFT = (*HEADS, "qa_outputs")  # to modules_to_save by a task's type, whether the model has them or not

Plan = list[tuple[Site, Tensor]]  # the indices `[nnz]` of each weight, flat


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a base model by their own names, seen through the layers that PEFT put around them."""
    clean: dict[str, str] = {}
    met: dict[str, nn.Module] = {}
    hidden: set[str] = set()
    for key, module in model.named_modules(remove_duplicate=False):
        parent, _, last = key.rpartition(".")
        met[key], owner = module, met.get(parent) if key else None
        if parent in hidden:
            hidden.add(key)
            continue
        if isinstance(owner, BaseTunerLayer) and last != "base_layer":
            hidden.add(key)
            continue
        name = clean.get(parent, "")
        clean[key] = name if isinstance(owner, BaseTunerLayer) or last in WRAPPED else joined(name, last)
        if isinstance(module, AuxiliaryTrainingWrapper):
            hidden.add(key)
        elif not isinstance(module, BaseTunerLayer):
            yield clean[key], module


def base_weights(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Site]:
    """Every weight of a base model by each of its names there, without anything that PEFT put in between.

    Args:
        model: the base model, with or without adapters.
        kwargs: what `resolve_quantization_backend` needs.
    """
    return collected(site for name, module in base_modules(model) for site in _own_sites(name, module, kwargs))


def _own_sites(name: str, module: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[Site]:
    """The weights of a module itself; of a quantized one what its packed weight stands for."""
    backend = resolve_quantization_backend(module, **kwargs)
    if backend is None:
        for site in own_sites(name, module):  # indices cannot be made again from nothing, so they stay off the meta device
            yield dataclasses.replace(site, device=CPU) if site.weight.is_meta else site
    else:
        yield packed_site(f"{name}.weight", module, backend)


def packed_site(name: str, module: nn.Module, backend: Any) -> Site:
    """What the packed weight of a quantized linear layer stands for."""
    tensors = (module._parameters.get("weight"), *module.parameters(), *module.buffers())
    device = next((tensor.device for tensor in tensors if tensor is not None and not tensor.is_meta), CPU)
    return Site(name, [(module, "weight")], (module.out_features, module.in_features), device, backend)


def make_plan(model: nn.Module, config: SprandConfig, adapter_name: str, kwargs: Mapping[str, Any]) -> Plan:
    """What an adapter trains, in the order of the model, every weight proven before the model is touched.

    Args:
        model: the base model, with or without adapters.
        config: changed: what it targets is named in full.
        adapter_name: for messages.
        kwargs: what `resolve_quantization_backend` needs.

    Raises:
        ValueError: Nothing matches, a count does not fit, a weight cannot be patched, or the base is another one than the
            adapter was trained on.
    """
    weights = base_weights(model, kwargs)
    plan = _chosen(model, config, weights) if config.targets is None else _saved(config, distinct(weights), adapter_name)
    sites = [site for site, _ in plan]
    for site in sites:
        if not site.module_name:
            raise ValueError(
                f"{site.name}: PEFT replaces the module that holds a weight, and the model itself holds this one; use "
                "sprand.apply, or put the model into another module"
            )
    check_writable({site.name: site.weight for site in sites if site.backend is None})
    vars(config).update(targeted(site.name for site in sites))
    return plan


def _chosen(model: nn.Module, config: SprandConfig, weights: Mapping[str, Site]) -> Plan:
    """The entries of a new adapter."""
    output = output_of(model)
    if isinstance(output, BaseTunerLayer):
        output = output.get_base_layer()
    view = View(model, dict(base_modules(model)), weights, output)
    sparse, in_full = as_of_apply(config), _in_full(model, config, view)
    if config.layers_to_transform not in (None, []):
        sparse = _in_layers(config, view, sparse, in_full)
    targets = find_targets(view, sparse, in_full)
    chosen = choose(sparse, targets, may_wait=config.waits)
    return [(site, chosen[site.name]) for site in targets.sites if chosen[site.name].numel()]


def as_of_apply(config: SprandConfig) -> SparseConfig:
    """The same choice in the terms of `sprand.apply`, which knows no numbers of layers."""
    fields = {name: getattr(config, name) for name in ("density", "budget", "strategy", "score_steps")}
    if config.indices is not None:
        fields = {"strategy": Mask(config.indices, config.shapes) if config.shapes else config.indices}
    return SparseConfig(
        **fields,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        target_parameters=config.target_parameters,
        layout=config.layout,
        seed=config.seed,
    )


def _in_layers(config: SprandConfig, view: View, sparse: SparseConfig, in_full: set[str]) -> SparseConfig:
    """The same choice with the targeted modules named that are in the layers to transform."""
    given, pattern_of = config.layers_to_transform, config.layers_pattern or r"[^.]*"
    patterns = [pattern_of] if isinstance(pattern_of, str) else pattern_of
    layers: dict[int, list[str]] = {}
    for site in find_targets(view, dataclasses.replace(sparse, target_parameters=None), in_full).sites:
        for number in _numbers(patterns, site.module_name)[:1]:
            layers.setdefault(number, []).append(site.module_name)
    wanted = [given] if isinstance(given, int) else given
    missing = [number for number in wanted if number not in layers]
    if missing:
        listed = f"some are in the layers {', '.join(map(str, sorted(layers)))}" if layers else "they are in no numbered layers"
        of = f" of {' or '.join(patterns)} (layers_pattern)" if config.layers_pattern else ""
        raise ValueError(f"layers_to_transform: none of the target_modules is in a layer {missing[0]}{of}; {listed}")
    names = [name for number in wanted for name in layers[number]]
    return dataclasses.replace(sparse, target_modules="|".join(map(re.escape, names)))


def _numbers(patterns: Sequence[str], name: str) -> list[int]:
    """The numbers of the layers that a module is in, by the first of the patterns that has any; the outermost comes first."""
    matches = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)(?:\.|$)", name) for pattern in patterns)
    return [int(match.group(1)) for match in matches if match]


def _in_full(model: nn.Module, config: SprandConfig, view: View) -> set[str]:
    """The modules that PEFT will train in full: it goes by how a name ends, in the middle of a word, too."""
    names = [name for name, _ in model.named_modules()]
    for wanted in config.modules_to_save or ():
        if wanted not in ADDED_BY_PEFT and not any(name.endswith(wanted) for name in names):
            known = [name for name in view.modules if name]
            raise ValueError(f"modules_to_save: {wanted!r} matches nothing in this model; {closest(wanted, known)}")
    in_full = {name for name in view.modules if name.endswith(tuple(config.modules_to_save or ()))}
    for name in in_full:
        if isinstance(view.modules[name], LISTS):
            raise ValueError(
                f"modules_to_save: {name} is a {type(view.modules[name]).__name__}, which PEFT cannot train in full; name what "
                "is in it"
            )
    return in_full


def _saved(config: SprandConfig, sites: Sequence[Site], adapter_name: str) -> Plan:
    """The entries of an adapter that was saved."""
    named = {site.name: site for site in sites}
    for name, entry in config.targets.items():
        site = named.get(name)
        if site is None or list(site.shape) != entry["shape"]:
            found = "has none of that name" if site is None else f"has {list(site.shape)}"
            raise ValueError(
                f"adapter {adapter_name!r} was made for another model: expected {name} of shape {entry['shape']}, but this "
                f"one {found}"
            )
    plan = []
    for name, site in named.items():
        if name not in config.targets:
            continue
        nnz = config.targets[name]["nnz"]
        if not config.indices_saved:
            if are_runs(config.layout):
                indices = draw_runs(config.strategy, name, site.shape, nnz, config.seed, config.layout).to(site.device)
            else:
                indices = draw(config, name, config.targets[name], nnz).to(site.device)
            check_same_base(adapter_name, site, indices, config.targets[name])
        elif config.indices is not None:
            indices = config.indices[name].to(site.device)
        else:  # the file brings them
            indices = torch.arange(nnz, dtype=pattern.index_dtype(site.numel), device=site.device)
        plan.append((site, indices))
    return plan


def check_same_base(adapter_name: str, site: Site, indices: Tensor, entry: Mapping[str, Any]) -> None:
    """Prove that the weight holds what the adapter was trained on; one of the two being quantized cannot be told.

    Raises:
        ValueError: The weight holds other values at these positions.
    """
    weight = site.weight
    if entry.get("quantized") or site.backend is not None:
        return
    if weight.is_meta or type(weight.data) is not Tensor or not weight.numel():
        return
    with pristine(site):
        held = ops.gather(weight.data.contiguous(), indices)
    check_base(f"adapter {adapter_name!r}", site.name, held, entry["fingerprint"])


def describe(site: Site, indices: Tensor, base: Tensor | None, axis: int | None) -> dict[str, Any]:
    """What a saved adapter says of one target."""
    if site.backend is None and base is not None and not base.is_meta:
        return described_target(site.shape, base, axis=axis)
    backend = "unknown" if site.backend is None else site.backend.backend_name
    said = {"shape": list(site.shape), "nnz": indices.numel(), "fingerprint": {}, "quantized": backend}
    return said | described_axis(axis)


def pristine(site: Site) -> AbstractContextManager[None]:
    """A context in which the site's weight holds its base."""
    hosted = getattr(site.module, "_sprand_hosted", {}).get(site.parameter)
    return nullcontext() if hosted is None else hosted.pristine(site.weight)
