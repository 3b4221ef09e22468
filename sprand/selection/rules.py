"""The rules of a `SparseConfig`: what each field may hold, which fields go together, and how they are stored."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from .old_runs import RUNS
from .pattern import COLUMNS, GIVEN, LAYOUTS, RANDOM_STRATEGIES
from .strategies import STRATEGIES

DEFAULT_DENSITY = 0.01
SCOPES = ("local", "global")
NAMES = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")  # the fields that hold names


def normalized(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Prove that the fields of a configuration are sound.

    Returns:
        Those that are stored in another form than the user may give them in.

    Raises:
        ValueError: A field is outside of what is allowed, or two fields exclude each other.
    """
    _check_types(fields)
    kind = _kind_of(fields["strategy"])
    _check_layout(fields["layout"], kind, fields["preserve_zeros"])
    if kind == "scored" and STRATEGIES[fields["strategy"]].columns and fields["layout"] != COLUMNS:
        raise ValueError(
            f"strategy: {fields['strategy']!r} scores whole columns; give layout='columns' with it, got {fields['layout']!r}"
        )
    _check_steps(fields["score_steps"], fields["strategy"])
    _check_scope(fields["scope"], kind, fields["min_density"], fields["max_density"])
    stored = {
        "strategy_options": _options(fields["strategy"], fields["strategy_options"], kind),
        "seed": seed_of(fields["seed"]),
        **_amount(fields["density"], fields["budget"], kind),
        **{field: _names(field, fields[field]) for field in NAMES},
    }
    if isinstance(fields["target_parameters"], str):
        stored["target_parameters"] = (fields["target_parameters"],)
    return stored


def _check_types(fields: Mapping[str, Any]) -> None:
    for field in ("layout", "scope"):
        if not isinstance(fields[field], str):
            raise ValueError(f"{field}: expected a name, got {fields[field]!r}")
    zeros, options = fields["preserve_zeros"], fields["strategy_options"]
    if not isinstance(zeros, bool):
        raise ValueError(f"preserve_zeros: expected True or False, got {zeros!r}")
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"strategy_options: expected names and values, got {options!r}")


def _kind_of(strategy: Any) -> str:
    """A strategy is given, random, scored, or a callable."""
    if isinstance(strategy, Mapping) or strategy == GIVEN:
        return "given"
    if callable(strategy):
        return "callable"
    if strategy in RANDOM_STRATEGIES:
        return "random"
    names = (*RANDOM_STRATEGIES, *STRATEGIES)
    if strategy not in names:
        raise ValueError(
            f"strategy: expected one of {', '.join(names)}, a callable, or a dict of masks or indices, got {strategy!r}"
        )
    return "scored"


def _check_layout(layout: str, kind: str, preserve_zeros: bool) -> None:
    if layout in RUNS:
        raise ValueError(
            f"layout: runs of adjacent entries ({layout!r}) are drawn no more; give layout='columns', whole input columns, which "
            "keep no inputs for backward"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "unstructured":
        return
    if kind == "given":
        raise ValueError(f"layout: a dict of masks or indices fixes the positions; leave out layout={layout!r}")
    if preserve_zeros:
        raise ValueError(
            "preserve_zeros: a whole column trains, and the zeros in it with it; leave out preserve_zeros, or layout='columns'"
        )


def _check_steps(steps: Any, strategy: Any) -> None:
    if steps is None:
        return
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"score_steps: expected at least 1 step, got {steps!r}")
    if strategy != "token_fisher":
        raise ValueError(
            "score_steps: it is of strategy 'token_fisher' without data, whose gradients are summed while the model "
            "trains; leave it out"
        )


def _check_scope(scope: str, kind: str, low: Any, high: Any) -> None:
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if scope == "global" and kind in ("given", "random"):
        raise ValueError("scope: expected 'local' (random draws have no scores to compare over layers), got 'global'")
    fractions = all(isinstance(value, numbers.Real) and 0 <= value <= 1 for value in (low, high))
    if not fractions or low > high or high == 0:
        raise ValueError(f"min_density and max_density: expected 0 <= min <= max <= 1 and max > 0, got {low!r} and {high!r}")
    if (low, high) != (0, 1) and scope == "local":
        raise ValueError("min_density and max_density: expected scope='global' (locally each target gets the same density)")


def _options(strategy: Any, given: Mapping[str, Any] | None, kind: str) -> dict[str, Any] | None:
    """The options as a dict of their own; those of a callable are its own business."""
    if given is None:
        return None
    options = dict(given)
    if kind == "callable":
        return options
    known = STRATEGIES[strategy].options if kind == "scored" else {}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"strategy_options: expected {', '.join(known) or 'none'} for this strategy, got {', '.join(unknown)}")
    return options


def seed_of(seed: Any) -> int:
    """The seed of a draw.

    Raises:
        ValueError: The seed is not an int.
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise ValueError(f"seed: expected an int, got {seed!r}")
    return int(seed)


def _amount(density: Any, budget: Any, kind: str) -> dict[str, int | float]:
    """The density or the budget, whichever says how many entries train; given entries need neither."""
    if kind == "given":
        if density is not None or budget is not None:
            raise ValueError("strategy: a dict of masks or indices fixes the count; leave out density and budget")
        return {}
    if budget is None:
        return {"density": DEFAULT_DENSITY if density is None else fraction("density", density)}
    if density is not None:
        raise ValueError("give density or budget, not both")
    if isinstance(budget, bool) or not isinstance(budget, numbers.Integral):
        return {"budget": fraction("budget", budget)}
    if budget < 1:
        raise ValueError(f"budget: expected at least 1 entry, got {budget}")
    return {"budget": int(budget)}


def _names(field: str, value: Any) -> str | tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Iterable) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"{field}: expected names, got {value!r}")
    return tuple(value)


def fraction(name: str, value: Any) -> float:
    """The value of an option that says which part of something.

    Raises:
        ValueError: The value is no number in (0, 1].
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or math.isnan(value) or not 0 < value <= 1:
        hint = "; write 0.01 for 1 %" if isinstance(value, str) else ""
        raise ValueError(f"{name}: expected a fraction in (0, 1], got {value!r}{hint}")
    return float(value)
