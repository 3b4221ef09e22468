"""Pictures: where the chosen entries of a model lie, and how much two choices have in common."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..selection.mask import Mask, chosen_by
from .state import mask_of

Cells = dict[tuple[str, str], float]
ALIKE = 0.1  # values that differ by no more than this share are about the same
MOST_WRITTEN = 16  # columns whose values are written into their fields


def plot_selection(
    chosen: nn.Module | Mask, path: str | os.PathLike[str] = "selection.png", *, other: nn.Module | Mask | None = None
) -> Path:
    """Draw the density of the trained entries, a row per layer and a column per kind of module.

    With `other`, a second panel shows the overlap: the share of the smaller choice's entries, of each weight, that both chose.
    Two independent random draws overlap by the density of the larger one.

    Args:
        chosen: a model with trained entries, or a mask.
        path: of the PNG (or SVG, PDF, by its suffix).
        other: a second model or mask, of weights with the same names and shapes.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
        ValueError: The model trains nothing, or the two have no weight in common or one of another shape.
    """
    mask = chosen if isinstance(chosen, Mask) else mask_of(chosen)
    sizes = {name: math.prod(shape) for name, shape in mask.shapes.items()}
    panels = [(averaged(densities(mask), sizes), f"density: {mask.nnz:,} entries{_named(mask)}", "density", ".2%")]
    if other is not None:
        second = other if isinstance(other, Mask) else mask_of(other)
        shared, chance = overlaps(mask, second)
        title = f"overlap with {second.nnz:,} entries{_named(second)}\n(independent draws: {chance:.2%})"
        panels.append((averaged(shared, sizes), title, "share of the smaller choice in both", ".2%"))
    return draw(panels, path)


def draw(panels: Sequence[tuple[Cells, str, str, str]], path: str | os.PathLike[str]) -> Path:
    """Draw values of layers and kinds of module side by side, with the rows and columns of the first.

    Each value is written into its field, up to `MOST_WRITTEN` columns. Where all are alike, as the densities of a random draw,
    the title says so, and the colour is the middle one.

    Args:
        panels: values, title, unit and number format of each panel.
        path: of the PNG (or SVG, PDF, by its suffix).

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
    """
    pyplot = _pyplot()
    first = panels[0][0]
    rows = list(dict.fromkeys(row for row, _ in first))
    columns = list(dict.fromkeys(column for _, column in first))
    width, height = 1.6 + (0.62 * len(columns) + 2.0) * len(panels), 2.4 + 0.3 * len(rows)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(width, height), squeeze=False, layout="constrained")
    for axis, (cells, title, unit, spec) in zip(axes.flat, panels, strict=True):
        grid = [[cells.get((row, column), math.nan) for column in columns] for row in rows]
        highest = max(cells.values(), default=0)
        alike = len(cells) > 1 and min(cells.values()) > (1 - ALIKE) * highest
        image = axis.imshow(grid, aspect="auto", cmap="Oranges", vmin=0, vmax=2 * highest if alike else highest)
        for y, line in enumerate(grid if len(columns) <= MOST_WRITTEN else ()):
            for x, value in enumerate(line):
                if not math.isnan(value):
                    colour = "white" if not alike and value > 0.6 * highest else "black"
                    axis.text(x, y, format(value, spec), ha="center", va="center", fontsize=6, color=colour)
        axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set_ylabel("layer")
        axis.set_title(title + ("\nabout the same everywhere" if alike else ""), fontsize=10)
        figure.colorbar(image, ax=axis, label=unit, format=lambda value, _, spec=spec: format(value, spec))
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file


def _pyplot() -> Any:
    try:
        importlib.import_module("matplotlib").use("Agg", force=False)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a plot needs matplotlib; install it: pip install matplotlib", name="matplotlib") from error
    return importlib.import_module("matplotlib.pyplot")


def densities(mask: Mask) -> dict[str, float]:
    """Chosen entries over all entries, of each weight."""
    return {name: indices.numel() / max(1, math.prod(mask.shapes[name])) for name, indices in mask.items()}


def overlaps(one: Mask, two: Mask) -> tuple[dict[str, float], float]:
    """The share of the smaller choice that both chose, of each common weight; and what independent draws would have in all.

    Raises:
        ValueError: The two choices have no weight in common, or one of another shape.
    """
    least = {name: min(one[name].numel(), two[name].numel()) for name in one if name in two}
    common = [name for name, count in least.items() if count]
    if not common:
        raise ValueError(f"plot_selection: the two choices have no weight in common ({next(iter(one))}, {next(iter(two))}, ...)")
    shares, expected = {}, 0.0
    for name in common:
        shape = one.shapes[name]
        if shape != two.shapes[name]:
            raise ValueError(f"plot_selection: {name} is {list(shape)} in one choice and {list(two.shapes[name])} in the other")
        both = torch.isin(one[name].cpu().long(), two[name].cpu().long())
        shares[name] = int(both.sum()) / least[name]
        expected += one[name].numel() * two[name].numel() / math.prod(shape)
    return shares, expected / sum(least[name] for name in common)


def place_of(name: str) -> tuple[str, str]:
    """The layer of a parameter (its first number, or "-") and its kind (the module's last name)."""
    parts = name.removesuffix(".weight").split(".")
    layer = next((part for part in parts if part.isdigit()), "-")
    own = [part for part in parts if not part.isdigit()]
    if not own:
        return layer, name
    says_little = own[-1] in ("dense", "proj", "linear")
    return layer, ".".join(own[-2:]) if says_little else own[-1]


def averaged(values: Mapping[str, float], sizes: Mapping[str, int]) -> Cells:
    """One value for each layer and kind; where several weights share them, their mean, each with the weight of its size."""
    totals: dict[tuple[str, str], float] = {}
    weights: dict[tuple[str, str], int] = {}
    for name, value in values.items():
        place = place_of(name)
        totals[place] = totals.get(place, 0.0) + value * sizes[name]
        weights[place] = weights.get(place, 0) + sizes[name]
    return {place: total / max(weights[place], 1) for place, total in totals.items()}


def _named(mask: Mask) -> str:
    return f", {chosen_by(mask.selection)}" if mask.selection else ""
