"""Several adapters of a model as one more adapter of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from . import sharding
from .combining import Rule
from .config import AS_GIVEN, SparseConfig
from .model import check_weights, mix, state_of, switch


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    method: str = "sum",
    *,
    density: float | None = None,
    seed: int = 0,
    signs: str = "total",
    name: str = "combined",
    drop_heads: bool = False,
) -> nn.Module:
    """Make one adapter of several loaded ones, and make it the active one; its entries are the union of theirs.

    Args:
        model: a model with loaded adapters; they stay.
        weights: `{name: weight}`, in the order in which they are summed.
        method: `"sum"`: of weight times change. `"mean"`: the sum, over the number of adapters. `"ties"` (arXiv 2306.01708): the
            largest changes of each adapter vote on the sign of each entry, and those of that sign are averaged. `"dare"` (arXiv
            2311.03099): random changes of each adapter are kept, divided by `density`, and summed.
        density: of ties and dare: which fraction of each adapter's entries is kept, in (0, 1].
        seed: of dare's draw.
        signs: of ties: what elects a sign, `"total"`, the sum of the changes, or `"frequency"`, their number.
        name: what to call the new adapter.
        drop_heads: leave out modules trained in full (each task keeps its own head); without it they are refused.

    Returns:
        The same object.

    Raises:
        ValueError: no such adapter, a name that is taken, an option that does not fit, an adapter that cannot be combined, or
            a sharded model. The model is as it was then.
    """
    state, rule = state_of(model), Rule(method, density, seed, signs)
    sharding.refuse(model, "combine", "combine the adapters before the model is sharded")
    if name in state.adapters:
        raise ValueError(f"combine: adapter {name!r} is loaded already; choose another name")
    check_weights("combine", state, weights)
    made = mix(state, weights, rule, drop_heads, recorded=True)
    given = SparseConfig(target_modules=None, target_parameters=tuple(made.indices))
    made.config = SparseConfig.from_dict(given.to_dict() | AS_GIVEN)
    for delta in made.deltas.values():
        delta.requires_grad_(True)
    state.adapters[name] = made
    return switch(model, name)
