"""The learning rate to start with: rising as density and width fall, lower for entries that were chosen by their gradients."""

from __future__ import annotations

import math

from torch import nn

from ..adapters.state import active_sites, mask_of

# log10(lr) = A + B log10(density) + C log10(density)^2 + shift at MEASURED_WIDTH; fitted by benchmarks/quality/fit_lr.py
A, B, C = -3.70, -0.94, -0.125
BELOW = 0.63  # what the exponent of 1/width grows by below MEASURED_WIDTH
MEASURED_WIDTH, LEAST_WIDTH = 384, 64
LEAST_DENSITY = 3e-4
SHIFTS = {"gradient": -0.47, "fisher": -0.47}


def suggest_lr(
    model: nn.Module | None = None,
    *,
    density: float | None = None,
    width: int | None = None,
    strategy: str | None = None,
) -> float:
    """A learning rate for AdamW on a sparse model with a schedule down to 0, where none is known to be better.

    It is what `sprand finetune` takes by default. Fewer entries have to move farther, so the rate rises as the density falls. It
    falls as 1/width, and entries with the largest gradients ("gradient", "fisher") need a third. docs/learning_rate.md shows
    what it was fitted to and what it costs against tuned rates; wider than 384 it is an extrapolation.

    Args:
        model: prepared by `sprand.apply`, or by PEFT with `sprand.peft.SprandConfig`: gives the three that are not given here.
        density: trained entries over entries of the targeted weights, in (0, 1].
        width: the model's hidden size.
        strategy: how the entries were chosen, as in `SparseConfig`; one without a name here counts as "random".

    Returns:
        The rate, to two digits.

    Raises:
        ValueError: Density and width are neither given nor known by the model, or out of range.
    """
    if model is not None:
        known, chosen = _known_of(model)
        density = known if density is None else density
        width = width_of(model) if width is None else width
        strategy = chosen if strategy is None else strategy
    if density is None or width is None:
        raise ValueError("suggest_lr: expected a model of sprand.apply, or density and width; give density=0.01, width=768 say")
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a fraction in (0, 1], got {density!r}")
    if not width >= 1:
        raise ValueError(f"width: expected the hidden size, at least 1, got {width!r}")
    x = math.log10(max(density, LEAST_DENSITY))
    shift = SHIFTS.get(strategy or "random", 0.0) * fade(density)
    return two_digits(10 ** (A + B * x + C * x * x + shift) * width_factor(width))


def _known_of(model: nn.Module) -> tuple[float, str | None]:
    """Density and strategy of the entries that a model trains now."""
    sites = active_sites(model)
    deltas = {id(delta): delta.numel() for site in sites for delta in site.deltas}
    return sum(deltas.values()) / sum(site.numel for site in sites), _strategy_of(model)


def _strategy_of(model: nn.Module) -> str | None:
    """How the active entries were chosen; None where nothing says so, or active adapters differ in it."""
    if not hasattr(model, "peft_config"):
        return (mask_of(model).selection or {}).get("strategy")
    active = getattr(model, "active_adapters", model.peft_config)  # a method of models of transformers; plain modules have none
    strategies = {getattr(model.peft_config[name], "strategy", None) for name in (active() if callable(active) else active)}
    return strategies.pop() if len(strategies) == 1 else None


def width_of(model: nn.Module) -> int:
    """The hidden size of a Hugging Face model; of another, the most frequent width of its linears' inputs.

    Raises:
        ValueError: The model has neither a hidden size nor a linear layer.
    """
    config = getattr(model, "config", None)
    named = getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0) or getattr(config, "d_model", 0)
    if named:
        return int(named)
    widths = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    if not widths:
        raise ValueError("suggest_lr: the model has no hidden_size in its config and no linear layer; give width")
    return max(set(widths), key=widths.count)


def width_factor(width: float) -> float:
    """What a rate at `MEASURED_WIDTH` is multiplied by: falling as 1/width, faster below it, and the same from 64 down."""
    ratio = MEASURED_WIDTH / max(width, LEAST_WIDTH)
    return ratio * max(ratio, 1.0) ** BELOW


def fade(density: float) -> float:
    """How much of a strategy's shift counts: all up to 10 %, none at 100 %, where every strategy trains the same entries."""
    return min(1.0, -math.log10(density))


def two_digits(value: float) -> float:
    """A rate as people write one."""
    return float(f"{value:.1e}")
