"""Plans: which parameters of a base model an adapter trains, how many entries of each, and at which positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapters.fingerprint import check_base, fingerprints
from ..kernels import ops
from ..selection import pattern
from ..selection.targets import OUTPUT_HEADS, READ_NOT_CALLED, closest
from .config import SprandConfig
from .writable import check_writable, read_only_ranges


@dataclass
class Site:
    """A parameter of the base model.

    Attributes:
        name: its name in the base model, without anything that PEFT put in between.
        module_name, module, parameter: where it is.
        shape: what it stands for, also where it is stored packed.
        backend: how PEFT reads it if it is quantized.
        followers: further modules that share it, with its name there.
    """

    name: str
    module_name: str
    module: nn.Module
    parameter: str
    shape: tuple[int, ...]
    backend: Any = None
    followers: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def weight(self) -> Tensor | None:
        """The parameter itself; of a quantized one there may be none of that name."""
        return self.module._parameters.get(self.parameter)

    def values(self) -> Tensor:
        """The weight's values: itself, or a dense copy made from a quantized one."""
        return self.weight.data if self.backend is None else self.backend.get_base_weight(self.module)

    @property
    def device(self) -> torch.device:
        """Where its entries are kept."""
        tensors = [self.weight] if self.weight is not None else [*self.module.parameters(), *self.module.buffers()]
        return next((t.device for t in tensors), torch.device("cpu"))


@dataclass
class Part:
    """What an adapter trains of one site: `indices [nnz]`, flat."""

    site: Site
    indices: Tensor


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a base model by their own names, seen through the layers that PEFT put around them."""
    clean: dict[str, str] = {}
    met: dict[str, nn.Module] = {}
    hidden: set[str] = set()
    for key, module in model.named_modules():
        parent, _, last = key.rpartition(".")
        met[key], owner = module, met.get(parent) if key else None
        if parent in hidden:
            hidden.add(key)
            continue
        if isinstance(owner, BaseTunerLayer) and last != "base_layer":
            hidden.add(key)
            continue
        name = clean.get(parent, "")
        clean[key] = name if isinstance(owner, BaseTunerLayer) else f"{name}.{last}" if name else last
        if isinstance(module, AuxiliaryTrainingWrapper):
            hidden.add(key)
        elif not isinstance(module, BaseTunerLayer):
            yield clean[key], module


def sites_of(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Site]:
    """Every parameter of the base model by name, in its order; a tied one once, under its first name."""
    sites: dict[str, Site] = {}
    met: dict[int, Site] = {}
    for name, module in base_modules(model):
        backend = resolve_quantization_backend(module, **kwargs)
        if backend is not None:
            key = f"{name}.weight"
            sites[key] = Site(key, name, module, "weight", (module.out_features, module.in_features), backend)
            continue
        for parameter, value in module._parameters.items():
            if value is None:
                continue
            if id(value) in met:
                met[id(value)].followers.append((module, parameter))
                continue
            key = f"{name}.{parameter}" if name else parameter
            sites[key] = met[id(value)] = Site(key, name, module, parameter, tuple(getattr(value, "ds_shape", value.shape)))
    return sites


def make_plan(model: nn.Module, config: SprandConfig, adapter_name: str, kwargs: Mapping[str, Any]) -> list[Part]:
    """The parts of an adapter, in the order of the model, every one proven before the model is touched.

    Args:
        model: the base model, with or without adapters.
        config: changed: what it targets is named in full.
        adapter_name: for messages.
        kwargs: what `resolve_quantization_backend` needs.

    Raises:
        ValueError: nothing matches, a count does not fit, a weight cannot be patched, or the base is another one than the
            adapter was trained on.
    """
    sites = sites_of(model, kwargs)
    if config.targets is not None:
        parts = _saved(config, sites, adapter_name)
    elif config.indices is not None:
        parts = _given(config, sites)
    else:
        parts = _drawn(config, sites, _matching(model, config, sites))
    read_only = read_only_ranges()
    for part in parts:
        _check_usable(part.site, read_only)
    named = [part.site for part in parts]
    config.target_modules = sorted({site.module_name for site in named if site.parameter == "weight" and site.module_name})
    config.target_parameters = sorted({site.name for site in named if site.parameter != "weight"}) or None
    return parts


def _saved(config: SprandConfig, sites: Mapping[str, Site], adapter_name: str) -> list[Part]:
    for name, entry in config.targets.items():
        site = sites.get(name)
        if site is None or list(site.shape) != entry["shape"]:
            found = "has none of that name" if site is None else f"has {list(site.shape)}"
            raise ValueError(
                f"adapter {adapter_name!r} was made for another model: expected {name} of shape {entry['shape']}, but this "
                f"one {found}"
            )
    parts = []
    for name, site in sites.items():
        if name not in config.targets:
            continue
        nnz, device = config.targets[name]["nnz"], _real(site.device)
        if not config.indices_saved:
            indices = pattern.draw(config.strategy, name, site.shape, nnz, config.seed, layout=config.layout).to(device)
            check_same_base(adapter_name, site, indices, config.targets[name])
        elif config.indices is not None:
            indices = config.indices[name].to(device)
        else:  # the file brings them
            indices = torch.arange(nnz, dtype=pattern.index_dtype(math.prod(site.shape)), device=device)
        parts.append(Part(site, indices))
    return parts


def check_same_base(adapter_name: str, site: Site, indices: Tensor, entry: Mapping[str, Any]) -> None:
    """Prove that the weight holds what the adapter was trained on; one of the two being quantized cannot be told.

    Raises:
        ValueError: it holds other values at these positions.
    """
    weight = site.weight
    if (
        entry.get("quantized")
        or site.backend is not None
        or weight.is_meta
        or type(weight.data) is not Tensor
        or not weight.numel()
    ):
        return
    with pristine(site):
        check_base(f"adapter {adapter_name!r}", site.name, ops.gather(weight.data.contiguous(), indices), entry["fingerprint"])


def describe(site: Site, indices: Tensor, base: Tensor | None) -> dict[str, Any]:
    """What a saved adapter says of one target."""
    known = base is not None and not base.is_meta
    return {
        "shape": list(site.shape),
        "nnz": indices.numel(),
        "fingerprint": fingerprints(base) if known else {},
        **({"quantized": site.backend.backend_name} if site.backend is not None else {} if known else {"quantized": "unknown"}),
    }


def pristine(site: Site) -> AbstractContextManager[None]:
    """A context in which the site's weight holds its base."""
    hosted = getattr(site.module, "_sprand_hosted", {}).get(site.parameter)
    return nullcontext() if hosted is None else hosted.pristine(site.weight)


def _given(config: SprandConfig, sites: Mapping[str, Site]) -> list[Part]:
    unknown = [name for name in config.indices if name not in sites]
    if unknown:
        raise ValueError(f"mask: the model has no parameter {unknown[0]!r}; {closest(unknown[0], list(sites))}")
    parts = []
    for name, site in sites.items():
        if name in config.indices:
            if config.shapes.get(name, site.shape) != site.shape:
                raise ValueError(f"mask: {name} is {list(config.shapes[name])} there and {list(site.shape)} in this model")
            indices = pattern.from_user(name, config.indices[name], site.shape)
            if indices.numel():
                parts.append(Part(site, indices.to(_real(site.device))))
    if not parts:
        raise ValueError("mask: it chooses no entry at all")
    return parts


def _drawn(config: SprandConfig, sites: Mapping[str, Site], wanted: Sequence[Site]) -> list[Part]:
    sizes = [math.prod(site.shape) for site in wanted]
    total = config.budget
    if total is None:
        total = round(config.density * sum(sizes))
    elif isinstance(total, float):
        total = round(total * sum(math.prod(site.shape) for site in sites.values()))
    runs = [math.prod(pattern.run_of(config.layout, site.shape)) for site in wanted]
    counts = pattern.shares(sizes, total, runs)
    if not any(counts):
        raise ValueError(
            f"density {config.density or config.budget} of the {sum(sizes):,} targeted entries rounds to no entry; raise it, or "
            "target more"
        )
    return [
        Part(site, pattern.draw(config.strategy, site.name, site.shape, count, config.seed, _real(site.device), config.layout))
        for site, count in zip(wanted, counts, strict=True)
        if count
    ]


def _matching(model: nn.Module, config: SprandConfig, sites: Mapping[str, Site]) -> list[Site]:
    modules = dict(base_modules(model))
    if config.target_modules == "all-linear":
        config.target_modules = [name for name, module in modules.items() if _is_body_linear(model, name, module, sites)]
    by_module = {site.module_name: site for site in sites.values() if site.parameter == "weight"}
    names, unfit = set(), []
    for name, module in modules.items():
        if name and check_target_module_exists(config, name):
            if name in by_module:
                names.add(by_module[name].name)
            elif any(module is other for site in sites.values() for other, _ in site.followers):
                names |= {site.name for site in sites.values() if any(module is other for other, _ in site.followers)}
            elif not isinstance(config.target_modules, str):
                unfit.append((name, module))
    for name, module in unfit:
        _refuse(name, module)
    for wanted in config.target_parameters or ():
        found = {name for name in sites if name == wanted or name.endswith(f".{wanted}")}
        if not found:
            raise ValueError(f"target_parameters: {wanted!r} matches nothing in this model; {closest(wanted, list(sites))}")
        names |= found
    if not names:
        asked = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules or ["None"])
        raise ValueError(
            f'target_modules={asked!r} matches no module of this model; {closest(asked, list(by_module))}, or "all-linear"'
        )
    return [site for name, site in sites.items() if name in names]


def _is_body_linear(model: nn.Module, name: str, module: nn.Module, sites: Mapping[str, Site]) -> bool:
    linear = isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "SparseConv1D")
    linear = linear or getattr(sites.get(f"{name}.weight"), "backend", None) is not None
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    output = output.get_base_layer() if isinstance(output, BaseTunerLayer) else output
    return (
        linear
        and not isinstance(module, READ_NOT_CALLED)
        and module is not output
        and name.rpartition(".")[2] not in OUTPUT_HEADS
    )


def _refuse(name: str, module: nn.Module) -> None:
    own = [parameter for parameter, value in module._parameters.items() if value is not None]
    if own:
        listed = ", ".join(f"'{name.rpartition('.')[2]}.{parameter}'" for parameter in own)
        raise ValueError(
            f"target_modules: {name} ({type(module).__name__}) has no `weight`, it holds {', '.join(own)}; "
            f"name them as target_parameters=[{listed}] instead"
        )
    raise ValueError(
        f"target_modules: {name} ({type(module).__name__}) has no weight of its own; name the layers inside of it instead"
    )


def _check_usable(site: Site, read_only: list[tuple[int, int]]) -> None:
    if not site.module_name:
        raise ValueError(
            f"{site.name}: PEFT replaces the module that holds a weight, and the model itself holds this one; use sprand.apply, "
            "or put the model into another module"
        )
    if any(isinstance(module, READ_NOT_CALLED) for module in (site.module, *(other for other, _ in site.followers))):
        raise ValueError(
            f"{site.name}: torch.nn.MultiheadAttention reads this weight without calling its layer; target the attention's "
            "in_proj_weight by target_parameters instead"
        )
    if site.backend is None:
        check_writable(site.name, site.weight, read_only)


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device
