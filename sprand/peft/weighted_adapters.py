"""PEFT's `add_weighted_adapter` for sprand's adapters: the union of their entries, combined as everywhere in sprand."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..adapters.combining import SIGNS, Part, Rule
from ..adapters.combining import combined as combined_parts
from ..kernels import ops
from ..selection.config import GIVEN
from .adapter_target import AdapterTarget
from .config import SprandConfig
from .layer import adapter_targets

COMBINATIONS = {"linear": "sum", "ties": "ties", "dare_linear": "dare"}  # PEFT's names, and ours


def rule_of(combination_type: str, density: float | None, majority_sign_method: str, seed: int) -> Rule:
    """PEFT's options, in sprand's words.

    Raises:
        ValueError: An option is unknown, or does not fit the type.
    """
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type: expected one of {', '.join(COMBINATIONS)}, got {combination_type!r}")
    if (combination_type != "linear") != (density is not None) or (density is not None and not 0 < density <= 1):
        raise ValueError(
            f"density: expected a fraction in (0, 1] for 'ties' and 'dare_linear', and None for 'linear', got {density!r}"
        )
    if majority_sign_method not in SIGNS:
        raise ValueError(f"majority_sign_method: expected 'total' or 'frequency', got {majority_sign_method!r}")
    return Rule(COMBINATIONS[combination_type], density, seed, majority_sign_method)


def combined(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, rule: Rule
) -> tuple[SprandConfig, dict[str, Tensor]]:
    """The config of the combined adapter, which holds its indices, and its delta by parameter name.

    Raises:
        ValueError: An adapter is unknown or trains whole modules, the name is taken, or a weight is missing.
    """
    _check_adapters(tuner.peft_config, adapters, weights, adapter_name)
    parts: dict[str, list[Part]] = {}
    for number, (name, weight) in enumerate(zip(adapters, weights, strict=True)):
        for _, _, _, target in adapter_targets(tuner, name):
            parts.setdefault(target.name, []).append(_part(target, name, number, float(weight)))
    wholes = combined_parts(rule, len(adapters), parts)
    config = copy.deepcopy(tuner.peft_config[adapters[0]])
    config.strategy, config.mask, config.density, config.budget, config.layout = GIVEN, None, None, None, "unstructured"
    config.targets, config.indices_saved, config.shapes = None, False, {}
    config.selection = config.sparse_config = None
    config.indices = {name: whole.indices for name, whole in wholes.items()}
    return config, {name: whole.delta for name, whole in wholes.items()}


def _check_adapters(
    configs: Mapping[str, SprandConfig], adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    unknown = [name for name in adapters if name not in configs]
    if unknown or not adapters:
        raise ValueError(f"adapters: expected names among {', '.join(configs)}, got {unknown[0] if unknown else 'none'!r}")
    if len(adapters) != len(weights):
        raise ValueError(f"weights: expected one for each of {len(adapters)} adapters, got {len(weights)}")
    if adapter_name in configs:
        raise ValueError(f"adapter_name: {adapter_name!r} is there already; delete it first, or choose another name")
    heads = [name for name in adapters if configs[name].modules_to_save]
    if heads:
        raise ValueError(
            f"adapters: {heads[0]!r} also trains whole modules (modules_to_save), which cannot be combined; leave it out"
        )


def _part(target: AdapterTarget, name: str, number: int, weight: float) -> Part:
    """What an adapter changes of one weight, ascending, with its scale."""
    indices, delta = target.indices[name], target.deltas[name].detach()
    delta = delta.to(ops.accumulation_dtype(delta.dtype)) * target.scale(name)
    if not target.in_order(name):
        indices, order = indices.sort()
        delta = delta[order]
    return Part(number, weight, indices, delta.to(indices.device))
