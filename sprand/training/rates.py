"""The learning rate to start with, from the size of the weights that train, and from how many of their entries do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from ..adapters.state import active_sites, known_state, state_of
from ..layers import sharding
from ..layers.sites import Site
from .magnitude import root_mean_square

# rate = FACTOR rms / density^EXPONENT; chosen beside the fit of benchmarks/quality/fit_lr.py, which prints both
FACTOR, EXPONENT = 0.0043, 0.6
LEAST_DENSITY = 3e-4
NARROW, STEEPNESS = 384, 1.17  # below that width the rate rises by this power of it
LEAST_WIDTH = 64
SHIFTS = {"gradient": -0.5, "fisher": -0.5, "snip": -0.15, "force": -0.15, "grasp": -0.15}  # decades
LARGE = {"gradient": 0.1, "fisher": 0.1}  # beyond that root mean square their rate rises no further


def suggest_lr(
    model: nn.Module | None = None,
    *,
    density: float | None = None,
    rms: float | None = None,
    strategy: str | None = None,
    width: int | None = None,
) -> float:
    """A learning rate for AdamW on a sparse model with a schedule down to 0, where none is known to be better.

    It is what `sprand finetune` takes by default: a share of the root mean square of the weights that train, since Adam moves
    each entry by about the rate. Fewer entries have to move farther, so it rises as the density falls; entries with the largest
    gradients ("gradient", "fisher") need a third or less; and models narrower than 384 want more. docs/learning_rate.md shows
    what it was fitted to and what it costs against tuned rates.

    The weights are read without what their entries have learned, so that the rate is the same at any time of a training.
    Linear weights count, and embeddings, biases and norms where nothing else is targeted. Of a quantized weight a dense copy is
    made, one weight at a time. Where a model is sharded, every rank must call this.

    Args:
        model: prepared by `sprand.apply`, or by PEFT with `sprand.peft.SprandConfig`: gives what is not given here.
        density: trained entries over entries of the targeted weights, in (0, 1].
        rms: the root mean square of the targeted weights; where it is given, none is read.
        strategy: how the entries were chosen, as in `SparseConfig`; one without a name here counts as "random".
        width: the model's hidden size; from 384 on it plays no part, and where neither it nor a model is given, none does.

    Returns:
        The rate, to two digits.

    Raises:
        ValueError: Density and root mean square are neither given nor known by the model, or out of range.
    """
    if model is not None:
        with sharding.gathered(model, "suggest_lr"):
            sites = active_sites(model)
            density = _density_of(sites) if density is None else density
            rms = _rms_of(model, sites) if rms is None else rms
        width = _width_of(sites) if width is None else width
        strategy = _strategy_of(model) if strategy is None else strategy
    if density is None or rms is None:
        raise ValueError(
            "suggest_lr: expected a model of sprand.apply, or density and rms, the root mean square of the targeted weights; "
            "give density=0.01, rms=0.02 say"
        )
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a fraction in (0, 1], got {density!r}")
    if not 0 < rms < math.inf:
        raise ValueError(
            f"rms: expected the root mean square of the targeted weights, a positive number, got {rms!r}; load the model's "
            "weights first, or choose a learning rate yourself"
        )
    if width is not None and not width >= 1:
        raise ValueError(f"width: expected the hidden size, at least 1, got {width!r}")
    return two_digits(rate(rms, density, strategy, width))


def rate(rms: float, density: float, strategy: str | None = None, width: int | None = None) -> float:
    """The law itself: every number in it stands at the top of this file.

    Args:
        rms: the root mean square of the targeted weights.
        density: trained entries over entries of the targeted weights, in (0, 1].
        strategy: how the entries were chosen; any without a name above counts as "random", and None does.
        width: the hidden size; None counts as `NARROW`.
    """
    shift = (SHIFTS.get(strategy, 0.0) + beyond(rms, strategy)) * fade(density)
    return FACTOR * rms / max(density, LEAST_DENSITY) ** EXPONENT * of_narrow(width or NARROW) * 10**shift


def of_narrow(width: int) -> float:
    """How many times the rate of a model of `NARROW` a narrower one wants."""
    return (NARROW / min(max(width, LEAST_WIDTH), NARROW)) ** STEEPNESS


def beyond(rms: float, strategy: str | None) -> float:
    """The shift that undoes, for some strategies, what weights above `LARGE` would add; decades."""
    return min(0.0, math.log10(LARGE[strategy] / rms)) if strategy in LARGE else 0.0


def fade(density: float) -> float:
    """How much of a shift counts: all up to 10 %, none at 100 %, where every strategy trains the same entries."""
    return min(1.0, -math.log10(density))


def two_digits(value: float) -> float:
    """A rate as people write one."""
    return float(f"{value:.1e}")


def _density_of(sites: Sequence[Site]) -> float:
    """Trained entries over entries of the weights that they are in."""
    deltas = {id(delta): math.prod(sharding.shape_of(delta)) for site in sites for delta in site.deltas}
    return sum(deltas.values()) / sum(site.numel for site in sites)


def _rms_of(model: nn.Module, sites: Sequence[Site]) -> float:
    """The root mean square of the targeted weights, without what trains or trained in them."""
    state = known_state(model)
    return root_mean_square(sites, {} if state is None or state.current is None else state.current.frozen)


def _width_of(sites: Sequence[Site]) -> int | None:
    """The most frequent shorter side of the targeted matrices: the hidden size of a transformer; None without a matrix."""
    sides = [min(site.shape[0], site.numel // site.shape[0]) for site in sites if len(site.shape) > 1]
    return max(set(sides), key=sides.count) if sides else None


def _strategy_of(model: nn.Module) -> str | None:
    """How the active entries were chosen; None where nothing says so, or active adapters differ in it."""
    if not hasattr(model, "peft_config"):
        return (state_of(model).current.selection or {}).get("strategy")
    active = getattr(model, "active_adapters", model.peft_config)  # a method of models of transformers; plain modules have none
    strategies = {getattr(model.peft_config[name], "strategy", None) for name in (active() if callable(active) else active)}
    return strategies.pop() if len(strategies) == 1 else None
