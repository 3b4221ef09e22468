"""Interchange on models at hand: saved adapters out as LoRA, SHiRA or Super-Tuning, adapters of others in as sprand's."""

from __future__ import annotations

import os
from pathlib import Path

import peft
import torch
from torch import nn

from ..adapters.file import AdapterFile
from .config import SprandConfig
from .foreign import content_of, content_of_own, settings_of
from .formats import CONFIGS, NOT_LINEAR, fields_of, write
from .layer import adapter_targets
from .lora import exact, write_lora
from .plan import base_weights

LORA = "lora"


def export_adapter(
    path_in: str | os.PathLike[str],
    path_out: str | os.PathLike[str],
    base_model: nn.Module,
    to: str,
    dtype: torch.dtype = torch.float32,
    one_rank: bool = False,
) -> Path:
    """Write a saved adapter as one that stock PEFT loads, with the same merged weights.

    Args:
        path_in: folder of the adapter.
        path_out: folder to write; made if it is not there.
        base_model: the model it was trained on; it is read, not changed.
        to: `"lora"` (of adapters that train whole columns, `layout="columns"`), `"shira"` (12 bytes per entry, and padding to the
            layer with the most) or `"supertuning"` (8, and padding to the largest density).
        dtype: of the factors of a LoRA, float32 or bfloat16; what bfloat16 rounds is warned of.
        one_rank: fill a LoRA with zeros to one rank for all weights, for SGLang and llama.cpp, which read no other.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: No adapter is at that path.
        ValueError: The base is another one, the format is unknown, or the other method cannot train such weights.
    """
    if to not in (LORA, *CONFIGS):
        raise ValueError(f"export_adapter: to: expected one of {', '.join((LORA, *CONFIGS))}, got {to!r}")
    if to != LORA and (dtype != torch.float32 or one_rank):
        raise ValueError(f"export_adapter: dtype and one_rank are of {LORA}, and {to} has one form only; leave them out")
    file, sites, folder = AdapterFile.read(path_in), base_weights(base_model, {}), Path(path_out)
    content = content_of_own(file, sites)
    fields = fields_of(file) | {"task_type": settings_of(Path(path_in)).get("task_type")}
    if to == LORA:
        write_lora(folder, exact(content.changes, file), sites, content.heads, dtype, one_rank, **fields)
        return folder
    for change in content.changes:
        site = sites[change.name]
        if site.parameter != "weight" or not isinstance(site.module, nn.Linear) or site.backend is not None:
            raise ValueError(f"export_adapter: {change.name} {NOT_LINEAR.format(to)}, model.merge_and_unload()")
    write(folder, to, content.changes, content.heads, **fields)
    return folder


def import_adapter(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> nn.Module:
    """Load an adapter of SHiRA, Super-Tuning, PaCA, peft-sparta, or `sprand.save`, or a LoRA of columns, as one of sprand.

    A LoRA is one of columns where each row of its `lora_A` has one entry, as those that `export_adapter` writes.

    Args:
        model: the base model, or a PEFT model of sprand that gains the adapter.
        path: the folder that the other wrote.
        adapter_name: what to call it.

    Returns:
        The PEFT model, with the adapter active and its values trainable.

    Raises:
        FileNotFoundError: No adapter of a known kind is at that path.
        ValueError: The adapter is for another model, or trains more than entries of weights.
    """
    folder = Path(path)
    wrapped = isinstance(model, peft.PeftModel)
    base = model.get_base_model() if wrapped else model
    content = content_of(folder, base_weights(base, {}))
    fields = {}
    if content.modules:
        fields = {"modules_to_save": content.modules, "task_type": settings_of(folder).get("task_type")}
    config = SprandConfig(mask={change.name: change.indices for change in content.changes}, **fields)
    if wrapped:
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
    else:
        model = peft.get_peft_model(model, config, adapter_name=adapter_name)
    values = {change.name: change.values for change in content.changes}
    for _, layer, parameter, target in adapter_targets(model, adapter_name):
        target.deltas[adapter_name].data.copy_(values[target.name])
        target.write(layer.get_base_layer()._parameters[parameter])
    if content.heads:
        own = peft.get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        peft.set_peft_model_state_dict(model, own | content.heads, adapter_name=adapter_name)
    return model
