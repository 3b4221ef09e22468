"""Interchange on models at hand: saved adapters out as SHiRA or Super-Tuning, adapters of others in as sprand's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters.file import CONFIG_FILE, KEY, AdapterFile
from ..adapters.file import WEIGHTS_FILE as WEIGHTS
from ..adapters.layout import PEFT_TYPE, PREFIX, head_key, modules_of, portable
from ..files.described import contents, read_json
from ..kernels import ops
from ..layers.sites import Site
from ..selection import pattern
from .config import SprandConfig
from .formats import CONFIGS, NARROW, NOT_LINEAR, Change, write
from .layer import SprandLayer
from .plan import base_weights, check_same_base, pristine


def export_adapter(path_in: str | os.PathLike[str], path_out: str | os.PathLike[str], base_model: nn.Module, to: str) -> Path:
    """Write a saved adapter as one that stock PEFT loads, with the same merged weights.

    Args:
        path_in: folder of the adapter.
        path_out: folder to write; made if it is not there.
        base_model: the model it was trained on; it is read, not changed.
        to: `"shira"` (12 bytes per entry, and padding to the layer with the most) or `"supertuning"` (8, and padding to the
            largest density).

    Returns:
        The folder.

    Raises:
        FileNotFoundError: No adapter is at that path.
        ValueError: another base, an unknown format, or weights that the other method cannot train.
    """
    if to not in CONFIGS:
        raise ValueError(f"export_adapter: to: expected one of {', '.join(CONFIGS)}, got {to!r}")
    file, sites = AdapterFile.read(path_in), base_weights(base_model, {})
    changes, modules = _own(file, sites), modules_of(file.heads)
    heads = {head_key(name): values for name, values in file.heads.items()}
    for change in changes:
        site = sites[change.name]
        if site.parameter != "weight" or not isinstance(site.module, nn.Linear) or site.backend is not None:
            raise ValueError(f"export_adapter: {change.name} {NOT_LINEAR.format(to)}, model.merge_and_unload()")
    fields = {
        "modules_to_save": modules or None,
        "base_model_name_or_path": portable(file.base_model),
        "task_type": _settings(Path(path_in)).get("task_type"),
    }
    write(Path(path_out), to, changes, heads, **fields)
    return Path(path_out)


def import_adapter(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> nn.Module:
    """Load an adapter of SHiRA, Super-Tuning, peft-sparta, or `sprand.save` as one of sprand.

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
    changes, kept, rest = _foreign(folder, base_weights(base, {}))
    fields = {"modules_to_save": kept, "task_type": _settings(folder).get("task_type")} if kept else {}
    config = SprandConfig(mask={change.name: change.indices for change in changes}, **fields)
    if wrapped:
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
    else:
        model = peft.get_peft_model(model, config, adapter_name=adapter_name)
    values = {change.name: change.values for change in changes}
    for layer in model.modules():
        if isinstance(layer, SprandLayer):
            for _, weight, target in layer.weights():
                if adapter_name in target.deltas:
                    target.deltas[adapter_name].data.copy_(values[target.name])
                    target.write(weight)
    if rest:
        own = peft.get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        peft.set_peft_model_state_dict(model, own | rest, adapter_name=adapter_name)
    return model


def _foreign(folder: Path, sites: Mapping[str, Site]) -> tuple[list[Change], list[str] | None, dict[str, Tensor]]:
    """The changes of another's adapter; names and tensors of modules that it trained in full."""
    if (folder / "sparse_deltas.safetensors").is_file():
        return _peft_sparta(folder, sites), None, {}
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"no adapter at {folder}; expected {WEIGHTS}, or sparse_deltas.safetensors of peft-sparta")
    settings = _settings(folder)
    if _is_own(folder, settings):
        file = AdapterFile.read(folder)
        heads = {head_key(name): values for name, values in file.heads.items()}
        return _own(file, sites), modules_of(file.heads) or None, heads
    kind, tensors = str(settings.get("peft_type")).lower(), tensors_of(folder / WEIGHTS)
    if kind not in CONFIGS:
        raise ValueError(f"{folder}: expected an adapter of SHiRA, Super-Tuning, peft-sparta or sprand.save, got {kind.upper()}")
    if any("supertuning_lora" in key for key in tensors):
        raise ValueError(f"{folder}: this Super-Tuning adapter also has low-rank parts (r), which sprand cannot hold")
    values_key = ".shira_weight" if kind == "shira" else ".supertuning_values"
    changes = []
    for key in sorted(name for name in tensors if name.endswith(values_key)):
        module = key.removeprefix(PREFIX).removesuffix(values_key)
        site, where = _site(folder, sites, f"{module}.weight"), tensors.get(key.replace(values_key, f".{kind}_indices"))
        if where is None:
            raise ValueError(f"{folder}: the adapter stores no indices for {module}; save it with save_precomputed_indices=True")
        if where.is_floating_point() or list(where.shape) != [*([2] if kind == "shira" else []), tensors[key].numel()]:
            raise ValueError(f"{folder} is damaged: expected integer indices of {tensors[key].numel():,} values for {module}")
        flat = where[0].long() * site.shape[1] + where[1].long() if kind == "shira" else where.long()
        change = _collected(site, flat, tensors[key])
        changes.append(change if kind == "shira" else _rounded_like_supertuning(change))
    rest = {key: value for key, value in tensors.items() if f".{kind}_" not in key}
    return changes, settings.get("modules_to_save"), rest


def _peft_sparta(folder: Path, sites: Mapping[str, Site]) -> list[Change]:
    tensors = tensors_of(folder / "sparse_deltas.safetensors")
    changes = []
    for key, where in tensors.items():
        if key.startswith("indices.") and where.numel():
            site = _site(folder, sites, key.removeprefix("indices."))
            deltas, sizes = tensors.get(f"deltas.{site.name}"), torch.tensor(site.shape)
            fits = where.dim() == 2 and where.shape[1] == len(site.shape) and not where.is_floating_point()
            if deltas is None or not fits or not ((where >= 0) & (where < sizes)).all():
                raise ValueError(f"{folder} is damaged: expected values and positions below {list(site.shape)} for {site.name}")
            flat = torch.zeros(where.shape[0], dtype=torch.long)
            for size, column in zip(site.shape, where.long().unbind(1), strict=True):
                flat = flat * size + column
            changes.append(_collected(site, flat, deltas))
    return changes


def _own(file: AdapterFile, sites: Mapping[str, Site]) -> list[Change]:
    """The changes of an adapter of sprand."""
    if file.has_frozen:
        raise ValueError(f"{file.path}: it holds folded entries; use sprand.load(model, path) for it")
    changes = []
    for name, entry in file.targets.items():
        site = _site(file.path, sites, name)
        if list(site.shape) != entry["shape"]:
            raise ValueError(
                f"{file.path} was made for another model: {name} is {list(site.shape)} here and {entry['shape']} there"
            )
        indices, delta = file.entries(name)
        check_same_base(str(file.path), site, indices.to(site.device), entry)
        changes.append(_collected(site, indices.long(), delta))
    return changes


def _site(folder: Path, sites: Mapping[str, Site], name: str) -> Site:
    if name not in sites:
        raise ValueError(f"{folder} was made for another model: this one has no parameter {name!r}")
    return sites[name]


def _collected(site: Site, flat: Tensor, values: Tensor) -> Change:
    """Ascending indices, each once, with the sum of what was stored for it, and what a 16-bit weight holds there."""
    size = site.numel
    if flat.numel() != values.numel() or (flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < size):
        raise ValueError(f"{site.name}: expected as many values as indices, below {size:,}; the adapter is for another model")
    if not torch.isfinite(values).all():
        raise ValueError(f"{site.name}: the values of the adapter are not finite")
    union, inverse = torch.unique(flat, return_inverse=True)
    total, base = torch.zeros(union.shape).index_add_(0, inverse, values.float()), None
    if site.weight is not None and site.weight.dtype in NARROW:
        with pristine(site):
            base = ops.gather(site.weight.data.contiguous(), union.to(site.weight.device)).cpu()
    return Change(site.name, site.shape, union.to(pattern.index_dtype(size)), total, base)


def _rounded_like_supertuning(change: Change) -> Change:
    if change.base is None:
        return change
    merged = change.base + change.values.to(change.base.dtype)
    return replace(change, values=merged.float() - change.base.float())


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    return read_json(file) if file.is_file() else {}


def _is_own(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether an adapter is one of sprand; the header of its weights tells, beside which another's configuration may lie."""
    return settings.get("peft_type") == PEFT_TYPE or KEY in contents(folder / WEIGHTS, "adapter")[0]


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of another program."""
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error})") from error
