"""Adapters of others whose entries are whole columns of weights: a LoRA with a one-hot factor, and PaCA.

A reader is given the adapter's folder, its configuration, the tensors of its file, and the weights of its base by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from peft.utils.other import get_pattern_key
from torch import Tensor

from ..adapters.layout import PREFIX
from ..layers.sites import Site
from .changes import Change, Settings, Sites, Tensors, site_named
from .lora import EMBEDDING, LINEAR, NO_FACTORS, columns_of, kind_of

CHANGED_OTHERWISE = ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication")


def of_lora(folder: Path, settings: Settings, tensors: Tensors, sites: Sites) -> list[Change]:
    """The changes that a LoRA makes whose `lora_A` chooses single inputs.

    Raises:
        ValueError: A row of `lora_A` has several entries, the adapter changes more than its factors say, or it is damaged or for
            another base.
    """
    beyond = [name for name in CHANGED_OTHERWISE if settings.get(name)]
    beyond += ["bias"] if settings.get("bias", "none") != "none" else []
    beyond += [key for key in tensors if ".lora_" in key and not key.endswith((".weight", "_A", "_B"))]
    if beyond:
        raise ValueError(
            f"{folder}: this LoRA changes more than the product of its factors ({beyond[0]}), which entries of weights cannot "
            "hold; merge it instead (model.merge_and_unload())"
        )
    return [_product(folder, settings, *pair) for pair in _pairs(folder, tensors, sites)]


def of_paca(folder: Path, settings: Settings, tensors: Tensors, sites: Sites) -> list[Change]:
    """The changes of a PaCA adapter (arXiv 2503.01905), as PEFT saves it: `paca_delta` `[out, r]` and `paca_indices` `[r]`.

    Raises:
        ValueError: The adapter is damaged, or for another base.
    """
    changes = []
    for key in sorted(name for name in tensors if name.endswith(".paca_delta")):
        site = site_named(folder, sites, f"{key.removeprefix(PREFIX).removesuffix('.paca_delta')}.weight")
        deltas, chosen = tensors[key], tensors.get(f"{key.removesuffix('_delta')}_indices")
        if kind_of(site) != LINEAR:
            raise ValueError(f"{folder} was made for another model: PaCA trains linear layers, and {site.name} is of none")
        rank = settings.get("r", 8)
        if chosen is None or chosen.is_floating_point() or chosen.numel() != rank or deltas.shape != (site.shape[0], rank):
            raise ValueError(f"{folder} is damaged: expected {rank} columns of {site.shape[0]} values for {site.name}")
        scale = settings.get("paca_alpha", 8) / rank
        changes.append(_columns(site, chosen.long(), scale * deltas.float()))
    return changes


def _pairs(folder: Path, tensors: Tensors, sites: Sites) -> Iterator[tuple[str, Site, Tensor, Tensor]]:
    """Of each weight the module's name, and both factors `[r, in]` and `[out, r]`, as those of a linear layer."""
    for key in sorted(name for name in tensors if ".lora_A." in name or name.endswith(".lora_embedding_A")):
        other = tensors.get(key.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B"))
        name = key.removeprefix(PREFIX).rpartition(".lora_")[0]
        site = site_named(folder, sites, f"{name}.weight")
        kind = kind_of(site)
        if kind is None:
            raise ValueError(f"{folder}: {site.name} {NO_FACTORS} (model.merge_and_unload())")
        if other is None or len(other.shape) < 2 or tensors[key].shape[0] != other.shape[1]:
            raise ValueError(f"{folder} is damaged: expected two factors of one rank for {site.name}")
        a, b = tensors[key].flatten(1), other.flatten(1)
        a, b = (b.t(), a.t()) if kind == EMBEDDING else (a, b)
        units = columns_of(site)
        if a.shape[1] != units.count or len(b) != units.size:
            raise ValueError(f"{folder} was made for another model: {site.name} is {list(site.shape)} here")
        yield name, site, a.float(), b.float()


def _product(folder: Path, settings: Settings, name: str, site: Site, a: Tensor, b: Tensor) -> Change:
    """What the factors of one weight change, in the order of PEFT's sums."""
    held = a != 0
    if (held.sum(1) > 1).any():
        count = int(held.sum(1).max())
        raise ValueError(
            f"{folder}: the LoRA of {name} mixes inputs ({count} of them in one row of lora_A), and its change is dense, which "
            "entries of weights cannot hold; merge it into the base instead (model.merge_and_unload())"
        )
    rows = held.any(1)
    chosen = held[rows].int().argmax(1)
    rank, alpha = _setting(settings, "rank_pattern", "r", name), _setting(settings, "alpha_pattern", "lora_alpha", name)
    if rank != len(a):
        raise ValueError(f"{folder} is damaged: expected factors of rank {rank} for {site.name}, got {len(a)}")
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return _columns(site, chosen, b[:, rows] * a[rows].gather(1, chosen[:, None]).t() * scale)


def _setting(settings: Settings, pattern: str, overall: str, name: str) -> float:
    """What a configuration says for a module: of the first pattern that fits its name, or for all."""
    patterns = settings.get(pattern) or {}
    return patterns.get(get_pattern_key(patterns, name), settings.get(overall, 8))


def _columns(site: Site, chosen: Tensor, deltas: Tensor) -> Change:
    """The change of whole columns.

    Args:
        site: the weight.
        chosen: `[c]`, the inputs, in any order.
        deltas: `[out, c]`.
    """
    units = columns_of(site)
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < units.count:
        raise ValueError(f"{site.name}: expected columns below {units.count:,}; the adapter is for another model")
    values = deltas if units.inner == 1 else deltas.t()
    return Change.summed(site, units.entries(chosen), values.flatten())
