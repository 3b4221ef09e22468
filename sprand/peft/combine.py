"""Several adapters as one: the union of their entries, as a weighted sum or by the vote of TIES."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune
from torch import Tensor

from ..config import GIVEN
from .config import SprandConfig
from .hosted import union_of

COMBINATIONS = ("linear", "ties")


def combined(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> tuple[SprandConfig, dict[str, Tensor]]:
    """The config of the combined adapter, which holds its indices, and its delta by parameter name.

    Raises:
        ValueError: an unknown adapter, a name that is taken, or options that do not fit.
    """
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown or not adapters:
        there = ", ".join(tuner.peft_config)
        raise ValueError(f"adapters: expected names among {there}, got {unknown[0] if unknown else 'none'!r}")
    if len(adapters) != len(weights):
        raise ValueError(f"weights: expected one for each of {len(adapters)} adapters, got {len(weights)}")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"adapter_name: {adapter_name!r} is there already; delete it first, or choose another name")
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type: expected one of {', '.join(COMBINATIONS)}, got {combination_type!r}")
    if (combination_type == "ties") != (density is not None) or (density is not None and not 0 < density <= 1):
        raise ValueError(f"density: expected a fraction in (0, 1] for 'ties' and None for 'linear', got {density!r}")
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method: expected 'total' or 'frequency', got {majority_sign_method!r}")
    heads = [name for name in adapters if tuner.peft_config[name].modules_to_save]
    if heads:
        raise ValueError(f"adapters: {heads[0]!r} also trains whole modules (modules_to_save), which cannot be combined")
    indices, values = {}, {}
    for layer in tuner.layers():
        for _, _, target in layer.weights():
            chosen = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in target.deltas]
            if not chosen:
                continue
            union, positions = union_of([target.indices[name] for name, _ in chosen])
            factors = torch.tensor([weight for _, weight in chosen], dtype=torch.float32, device=union.device)
            changes = torch.zeros(len(chosen), union.numel(), dtype=torch.float32, device=union.device)
            for row, (name, _), position in zip(changes, chosen, positions, strict=True):
                delta = target.deltas[name].detach().float() * float(target.scales.get(name, 1.0))
                row[position] = delta if density is None else prune(delta, density, "magnitude")
            indices[target.name] = union
            values[target.name] = _sum(changes, factors) if density is None else _vote(changes, factors, majority_sign_method)
    config = copy.deepcopy(tuner.peft_config[adapters[0]])
    config.strategy, config.mask, config.density, config.budget, config.layout = GIVEN, None, None, None, "unstructured"
    config.targets, config.indices_saved, config.indices, config.shapes = None, False, indices, {}
    return config, values


def _sum(changes: Tensor, factors: Tensor) -> Tensor:
    total = torch.zeros_like(changes[0])
    for change, factor in zip(changes, factors, strict=True):
        total += factor * change
    return total


def _vote(changes: Tensor, factors: Tensor, method: str) -> Tensor:
    mask = calculate_majority_sign_mask(changes, method=method)
    return disjoint_merge(changes * factors[:, None], mask)
