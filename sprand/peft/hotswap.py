"""Hot swap: the values of a saved adapter replace those of a live one, in place, by as many writes as it has entries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..selection import pattern
from .config import SprandConfig
from .hosted import AdapterTarget
from .interchange import tensors_of
from .layer import SprandLayer
from .plan import check_same_base


def hotswap(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Load the values of another adapter with the same positions into a live one; optimizers and compiled graphs stay valid.

    PEFT's own `hotswap_adapter` knows only LoRA.

    Args:
        model: a PEFT model, or one that PEFT layers were injected into.
        path: folder written by `save_pretrained`.
        adapter_name: the live adapter. It may be merged.

    Raises:
        FileNotFoundError: No adapter is at that path.
        ValueError: The adapter trains other entries, was trained on another base, or also holds whole modules. Nothing has
            changed then.
    """
    folder = Path(path)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"hotswap: no adapter at {path}; expected a folder written by save_pretrained")
    config = SprandConfig.from_pretrained(str(folder))
    if not isinstance(config, SprandConfig) or config.targets is None:
        raise ValueError(f"hotswap: {path} holds an adapter of type {config.peft_type}, expected one of sprand")
    if adapter_name not in model.peft_config:
        raise ValueError(f"hotswap: no adapter {adapter_name!r}; there are {', '.join(model.peft_config)}")
    tensors = tensors_of(file)
    found = {
        target.name: (layer, parameter, target)
        for layer in model.modules()
        if isinstance(layer, SprandLayer)
        for parameter, _, target in layer.weights()
        if adapter_name in target.deltas
    }
    if found.keys() != config.targets.keys():
        other = sorted(found.keys() ^ config.targets.keys())[0]
        raise ValueError(f"hotswap: {path} trains other weights than {adapter_name!r} ({other}); load it under a name of its own")
    if len(tensors) > len(found) * (1 + config.indices_saved):
        raise ValueError(f"hotswap: {path} also holds whole modules (modules_to_save); load it under a name of its own")
    values = {name: _proven(path, adapter_name, config, tensors, name, *places) for name, places in found.items()}
    for name, (layer, parameter, target) in found.items():
        delta = target.deltas[adapter_name]
        delta.data.copy_(values[name])
        target.written.forget()
        weight = layer.get_base_layer()._parameters.get(parameter)
        if weight is not None and layer.quantization_backend is None:
            target.write(weight)


def _proven(
    path: str | os.PathLike[str],
    adapter_name: str,
    config: SprandConfig,
    tensors: Mapping[str, Tensor],
    name: str,
    layer: SprandLayer,
    parameter: str,
    target: AdapterTarget,
) -> Tensor:
    entry, live = config.targets[name], target.indices[adapter_name].cpu()
    suffix = "" if parameter == "weight" else f"_{parameter}"
    key = f"base_model.model.{name.rpartition('.')[0]}.sprand_"
    delta = tensors.get(f"{key}delta{suffix}.weight")
    site = layer.site(parameter)
    if config.indices_saved:
        indices = tensors.get(f"{key}indices{suffix}")
    else:
        indices = pattern.draw(config.strategy, name, site.shape, entry["nnz"], config.seed, layout=config.layout)
    if indices is None or not torch.equal(indices.to(live), live):
        raise ValueError(f"hotswap: {path} trains other entries of {name} than {adapter_name!r}; load it under a name of its own")
    if delta is None or delta.shape != live.shape or not torch.isfinite(delta).all():
        raise ValueError(f"hotswap: {path} is damaged: expected {live.numel():,} finite values for {name}")
    check_same_base(str(path), site, target.indices[adapter_name], entry)
    return delta
