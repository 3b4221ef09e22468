"""Several adapters of a model as one: the union of their entries, combined by a rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..layers.units import Pattern
from .combining import SUM, Origin, Part, Rule, combined, content_checksum, record, shared_counts
from .in_full import changed
from .state import Adapter, State


def check_weights(what: str, state: State, weights: Mapping[str, float]) -> None:
    """Prove that weights are those of loaded adapters.

    Raises:
        ValueError: No weight is given, one is not finite, or one is that of an adapter that is not loaded.
    """
    if not weights:
        raise ValueError(f"{what}: expected a name, {{name: weight}} of at least one adapter, or None for the base, got {{}}")
    unknown = sorted(set(weights) - set(state.adapters))
    if unknown:
        raise ValueError(f"{what}: no adapter {unknown[0]!r} is loaded; there are {', '.join(sorted(state.adapters))}")
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise ValueError(f"{what}: expected finite weights, got {dict(weights)}")


def mix(
    state: State, weights: Mapping[str, float], rule: Rule = SUM, drop_heads: bool = False, recorded: bool = False
) -> Adapter:
    """Several adapters as one, whose config is that of the first: combined in float32, rounded once with the base.

    Args:
        state: holds the adapters; they stay as they are.
        weights: `{name: weight}`, in the order in which they are summed.
        rule: how.
        drop_heads: leave out modules trained in full.
        recorded: let the result say what it was made of.

    Raises:
        ValueError: An adapter holds more than entries: modules trained in full, or entries frozen by a redrawn mask.
    """
    for name in weights:
        _check_mixable(name, state, drop_heads)
    adapters = [state.adapters[name] for name in weights]
    targets = _parts(adapters, list(weights.values()))
    wholes = combined(rule, len(adapters), targets)
    result = Adapter(adapters[0].config)
    for target, whole in wholes.items():
        result.patterns[target] = Pattern(whole.indices)
        result.deltas[target] = nn.Parameter(whole.delta, requires_grad=False)
    if recorded:
        checksums = [content_checksum(adapter.indices, adapter.deltas) for adapter in adapters]
        places = (([part.number for part in parts], wholes[target].positions) for target, parts in targets.items())
        shared = shared_counts(len(adapters), places)
        origins = [Origin(*fields) for fields in zip(weights, weights.values(), checksums, shared, strict=True)]
        result.selection = record(rule, origins)
    return result


def _check_mixable(name: str, state: State, drop_heads: bool) -> None:
    adapter = state.adapters[name]
    whole = [*adapter.saved, *changed(adapter.buffers, state.base_buffers)]
    if whole and not drop_heads:
        raise ValueError(
            f"switch: adapter {name!r} trained whole modules or buffers ({', '.join(whole)}), which cannot be "
            "mixed; sprand.combine(model, weights, drop_heads=True) leaves them out"
        )
    if adapter.frozen:
        raise ValueError(
            f"switch: adapter {name!r} has frozen entries (of a redrawn mask, sprand diff, or added rows), which cannot be "
            "mixed; switch to it alone"
        )


def _parts(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Part]]:
    """What each adapter changes in each weight, on the device of the first one that changes it."""
    targets: dict[str, list[Part]] = {}
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for target, indices in adapter.indices.items():
            part = Part(number, float(weight), indices, adapter.deltas[target].detach())
            targets.setdefault(target, []).append(part)
    for parts in targets.values():
        device = parts[0].delta.device
        parts[:] = [replace(part, delta=part.delta.to(device)) for part in parts]
    return targets
