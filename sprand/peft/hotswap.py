"""Hot swap: the values of a saved adapter replace those of a live one, in place, by as many writes as it has entries."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from ..adapters.file import AdapterFile
from .adapter_target import AdapterTarget
from .layer import SprandLayer, adapter_targets
from .plan import check_same_base


def hotswap(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Load the values of another adapter with the same positions into a live one; optimizers and compiled graphs stay valid.

    PEFT's own `hotswap_adapter` knows only LoRA.

    Args:
        model: a PEFT model, or one that PEFT layers were injected into.
        path: folder of the other adapter.
        adapter_name: the live adapter. It may be merged.

    Raises:
        FileNotFoundError: No adapter is at that path.
        ValueError: The adapter trains other entries, was trained on another base, or also holds whole modules. Nothing has
            changed then.
    """
    file = AdapterFile.read(path)
    if adapter_name not in model.peft_config:
        raise ValueError(f"hotswap: no adapter {adapter_name!r}; there are {', '.join(model.peft_config)}")
    live = {target.name: (layer, parameter, target) for _, layer, parameter, target in adapter_targets(model, adapter_name)}
    if live.keys() != file.targets.keys():
        other = sorted(live.keys() ^ file.targets.keys())[0]
        raise ValueError(f"hotswap: {path} trains other weights than {adapter_name!r} ({other}); load it under a name of its own")
    if file.heads or file.has_frozen:
        raise ValueError(
            f"hotswap: {path} also holds whole modules or frozen entries; load it under a name of its own, or by sprand.load"
        )
    values = {name: _proven(file, adapter_name, *place) for name, place in live.items()}
    for name, (layer, parameter, target) in live.items():
        delta = target.deltas[adapter_name]
        delta.data.copy_(values[name])
        target.written.forget()
        weight = layer.get_base_layer()._parameters.get(parameter)
        if weight is not None and layer.quantization_backend is None:
            target.write(weight)


def _proven(file: AdapterFile, adapter_name: str, layer: SprandLayer, parameter: str, target: AdapterTarget) -> Tensor:
    """The new values of one weight, whose positions and base are those of the live ones."""
    name, live = target.name, target.indices[adapter_name]
    indices, delta = file.entries(name)
    if not torch.equal(indices.to(live), live):
        raise ValueError(
            f"hotswap: {file.path} trains other entries of {name} than {adapter_name!r}; load it under a name of its own"
        )
    check_same_base(str(file.path), layer.sprand_site(parameter), live, file.targets[name])
    return delta
