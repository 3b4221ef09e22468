"""Adapters as changes of a model's weights: those of other methods of PEFT, of peft-sparta, and sprand's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.file import CONFIG_FILE, KEY, AdapterFile
from ..adapters.file import WEIGHTS_FILE as WEIGHTS
from ..adapters.layout import PEFT_TYPE, PREFIX, modules_of
from ..files.described import contents, read_json
from ..layers.sites import Site
from .changes import Change, Settings, Sites, Tensors, site_named
from .foreign_columns import of_lora, of_paca
from .formats import heads_of
from .plan import check_same_base

SPARTA_FILE = "sparse_deltas.safetensors"  # what peft-sparta writes


@dataclass(frozen=True)
class Content:
    """What an adapter changes of its base.

    Attributes:
        changes: of single entries, one for each weight.
        modules: names of the modules that it trained in full.
        heads: their tensors, by their keys in a file of PEFT.
    """

    changes: list[Change]
    modules: list[str] | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)


def content_of(folder: Path, sites: Sites) -> Content:
    """What is in an adapter of any kind that is known here.

    Args:
        folder: where it is.
        sites: the weights of its base by name.

    Raises:
        FileNotFoundError: No adapter of a known kind is in the folder.
        ValueError: The adapter is damaged, of another kind, or for another base.
    """
    if (folder / SPARTA_FILE).is_file():
        return Content(_peft_sparta(folder, sites))
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"no adapter at {folder}; expected {WEIGHTS}, or {SPARTA_FILE} of peft-sparta")
    settings = settings_of(folder)
    if settings.get("peft_type") == PEFT_TYPE:
        return content_of_own(AdapterFile.read(folder), sites)
    header, tensors = contents(folder / WEIGHTS, "adapter")
    if KEY in header:  # another's configuration may lie beside weights of sprand
        return content_of_own(AdapterFile.read(folder), sites)
    kind = str(settings.get("peft_type")).lower()
    if kind not in READERS:
        raise ValueError(
            f"{folder}: expected an adapter of SHiRA, Super-Tuning, PaCA, peft-sparta or sprand.save, or a LoRA of columns, got "
            f"{kind.upper()}"
        )
    heads = {key: value for key, value in tensors.items() if f".{kind}_" not in key}
    return Content(READERS[kind](folder, settings, tensors, sites), settings.get("modules_to_save"), heads)


def content_of_own(file: AdapterFile, sites: Sites) -> Content:
    """What is in an adapter of sprand.

    Raises:
        ValueError: The adapter is damaged, for another base, or holds entries frozen by a redrawn mask.
    """
    if file.has_frozen:
        raise ValueError(f"{file.path}: it holds frozen entries; use sprand.load(model, path) for it")
    changes = []
    for name, entry in file.targets.items():
        site = site_named(file.path, sites, name)
        here, there = list(site.shape), entry["shape"]
        if here != there:
            raise ValueError(f"{file.path} was made for another model: {name} is {here} here and {there} there")
        indices, delta = file.entries(name)
        check_same_base(str(file.path), site, indices.to(site.device), entry)
        changes.append(Change.summed(site, indices.long(), delta))
    return Content(changes, modules_of(file.heads) or None, heads_of(file))


def settings_of(folder: Path) -> dict[str, Any]:
    """The configuration in an adapter's folder; empty if there is none."""
    file = folder / CONFIG_FILE
    return read_json(file) if file.is_file() else {}


def _shira(folder: Path, settings: Settings, tensors: Tensors, sites: Sites) -> list[Change]:
    changes = []
    for site, values, where in _stored(folder, tensors, sites, "shira", "weight"):
        rows, columns = where
        changes.append(Change.summed(site, rows * site.shape[1] + columns, values))
    return changes


def _supertuning(folder: Path, settings: Settings, tensors: Tensors, sites: Sites) -> list[Change]:
    if any("supertuning_lora" in key for key in tensors):
        raise ValueError(
            f"{folder}: this Super-Tuning adapter also has low-rank parts (r), which sprand cannot hold; use it through PEFT"
        )
    stored = _stored(folder, tensors, sites, "supertuning", "values")
    return [_rounded_like_supertuning(Change.summed(site, where, values)) for site, values, where in stored]


READERS = {"shira": _shira, "supertuning": _supertuning, "lora": of_lora, "paca": of_paca}


def _stored(folder: Path, tensors: Tensors, sites: Sites, kind: str, what: str) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Of each layer the weight, the values `[n]`, and where they are: `[2, n]`, rows and columns, for SHiRA, else `[n]`, flat."""
    suffix = f".{kind}_{what}"
    for key in sorted(name for name in tensors if name.endswith(suffix)):
        module = key.removeprefix(PREFIX).removesuffix(suffix)
        site = site_named(folder, sites, f"{module}.weight")
        values, where = tensors[key], tensors.get(f"{key.removesuffix(suffix)}.{kind}_indices")
        if where is None:
            raise ValueError(f"{folder}: the adapter stores no indices for {module}; save it with save_precomputed_indices=True")
        count = values.numel()
        if where.is_floating_point() or tuple(where.shape) != ((2, count) if kind == "shira" else (count,)):
            raise ValueError(f"{folder} is damaged: expected integer indices of {count:,} values for {module}")
        yield site, values, where.long()


def _peft_sparta(folder: Path, sites: Sites) -> list[Change]:
    _, tensors = contents(folder / SPARTA_FILE, "adapter")
    changes = []
    for key, where in tensors.items():
        if not key.startswith("indices.") or not where.numel():
            continue
        site = site_named(folder, sites, key.removeprefix("indices."))
        values = tensors.get(f"deltas.{site.name}")
        if values is None or not _are_positions(where, site.shape):
            raise ValueError(f"{folder} is damaged: expected values and positions below {list(site.shape)} for {site.name}")
        strides = torch.empty(site.shape, device="meta").stride()
        flat = (where.long() * torch.tensor(strides)).sum(1)
        changes.append(Change.summed(site, flat, values))
    return changes


def _are_positions(where: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds in each row a position in another one of that shape."""
    if where.dim() != 2 or where.shape[1] != len(shape) or where.is_floating_point():
        return False
    return bool(((where >= 0) & (where < torch.tensor(shape))).all())


def _rounded_like_supertuning(change: Change) -> Change:
    """The same merged weight as Super-Tuning has, which rounds values to the weight's dtype before it adds them."""
    if change.base is None:
        return change
    merged = change.base + change.values.to(change.base.dtype)
    return replace(change, values=merged.float() - change.base.float())
