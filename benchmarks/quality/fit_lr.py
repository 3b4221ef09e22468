"""Fits the default learning rate to the runs of the quality grids: the numbers in `sprand/training/rates.py`, and their cost.

A cell is a task, a method and a budget with its rates; goodness is the accuracy, or minus the log of the perplexity, on dev.
Its best rate is the vertex of a parabola through the best of its rates and the two beside it, on a logarithmic axis, or the
edge. The law

    log10(lr) = log10(rms) + A + B log10(density) + C log10(384 / width where that is less) + shift

(rms is the root mean square of the linear weights, the shift is for gradient and fisher masks) starts from the least squares fit
to these, full fine-tuning counting as density 1, and is then moved to the least mean of loss^2 + distance^2. The loss is what a
cell would give away at the law's rate, in points of accuracy or percent of perplexity: read off that parabola, and farther away
between the rates tried; beyond them it is that of the last. The distance to the best rate, in decades, keeps the law from the
edges of flat curves.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots import panels, plain_ticks
from quality import results
from report import RESULTS, command_line, markdown, write_markdown
from sprand.training import rates

RMS = {"shakespeare": 0.137, "sst2": 0.0614, "subj": 0.0614, "qnli": 0.0614}  # of the linear weights
WIDTHS = {"shakespeare": 64, "sst2": 384, "subj": 384, "qnli": 384}
METHODS = ("random", "uniform", *rates.SHIFTS, "full")
AXES = 4  # coefficients
POINT = {"accuracy": 0.01, "perplexity": math.log(1.01)}  # one point of accuracy; one percent of perplexity


@dataclasses.dataclass
class Cell:
    """The rates tried for one task, method and budget.

    Attributes:
        density: 1 for full fine-tuning.
        tried: (log10 of the rate, goodness) by rising rate; goodness is the accuracy, or minus the log of the perplexity, on dev.
        best: log10 of the best rate.
        edge: whether that is the lowest or highest rate tried.
    """

    task: str
    method: str
    density: float
    metric: str
    tried: list[tuple[float, float]]
    best: float
    edge: bool

    def at(self, rate: float) -> float:
        """Goodness at log10 of a rate: on the parabola beside the best, on lines elsewhere, beyond the last as there."""
        points = self.tried
        place = max(range(len(points)), key=lambda i: points[i][1])
        if 0 < place < len(points) - 1 and points[place - 1][0] <= rate <= points[place + 1][0]:
            return through(points[place - 1 : place + 2], rate)
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x0 <= rate <= x1:
                return y0 + (y1 - y0) * (rate - x0) / (x1 - x0)
        return points[0][1] if rate < points[0][0] else points[-1][1]

    def loss_at(self, rate: float) -> float:
        """How much worse than the best a rate is, in points of accuracy or percent of perplexity."""
        return (self.at(self.best) - self.at(rate)) / POINT[self.metric]


def cells(done: results.Results) -> list[Cell]:
    """The cells that have rates to choose from, of methods that the law is for."""
    found: dict[tuple[str, str, float | None], list[tuple[float, float]]] = {}
    metric = {}
    for run, outcome in done.items():
        if run.method in METHODS and run.seed == 0 and run.lr and run.task in RMS:
            good = outcome["dev"] if outcome["metric"] == "accuracy" else -math.log(outcome["dev"])
            if math.isfinite(good):
                found.setdefault((run.task, run.method, run.budget), []).append((math.log10(run.lr), good))
                metric[run.task] = outcome["metric"]
    made = []
    for (task, method, budget), tried in found.items():
        tried = sorted(tried)
        if len(tried) > 2:
            made.append(Cell(task, method, budget or 1.0, metric[task], tried, *best_of(tried)))
    return made


def best_of(tried: Sequence[tuple[float, float]]) -> tuple[float, bool]:
    """The vertex of the parabola through the best point and its neighbours, and whether the best is at an edge."""
    place = max(range(len(tried)), key=lambda i: tried[i][1])
    if place in (0, len(tried) - 1):
        return tried[place][0], True
    (x0, y0), (x1, y1), (x2, y2) = tried[place - 1 : place + 2]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curve = (right - left) / (x2 - x0)
    return ((x0 + x1) / 2 - left / (2 * curve) if curve < 0 else x1), False


def features(cell: Cell) -> list[float]:
    """What A, B, C and the shift are multiplied by."""
    narrow = max(0.0, math.log10(rates.NARROW / WIDTHS[cell.task]))
    return [1.0, math.log10(cell.density), narrow, rates.fade(cell.density) * (cell.method in rates.LARGE)]


def predicted(cell: Cell, coefficients: Sequence[float]) -> float:
    """log10 of the law's rate for a cell, with the shifts of sprand but for gradient and fisher masks."""
    rms = RMS[cell.task]
    own = rates.beyond(rms, cell.method) if cell.method in rates.LARGE else rates.SHIFTS.get(cell.method, 0.0)
    fitted = sum(f * c for f, c in zip(features(cell), coefficients, strict=True))
    return math.log10(rms) + own * rates.fade(cell.density) + fitted


def through(points: Sequence[tuple[float, float]], x: float) -> float:
    """The parabola through three points, at `x`."""
    (x0, y0), (x1, y1), (x2, y2) = points
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    return y0 + (x - x0) * (left + (x - x1) * (right - left) / (x2 - x0))


def fit(of: Sequence[Cell]) -> list[float]:
    """The coefficients A, B, C and the shift."""
    goal = [cell.best - predicted(cell, [0.0] * AXES) for cell in of]
    matrix = torch.tensor([features(cell) for cell in of], dtype=torch.float64)
    start = torch.linalg.lstsq(matrix, torch.tensor(goal, dtype=torch.float64)[:, None], driver="gelsd").solution[:, 0]
    return descend(start.tolist(), lambda coefficients: cost(of, coefficients))


def cost(of: Sequence[Cell], coefficients: Sequence[float]) -> float:
    """Mean over cells of loss^2 + distance^2."""
    rate = [predicted(cell, coefficients) for cell in of]
    return sum(cell.loss_at(r) ** 2 + (r - cell.best) ** 2 for cell, r in zip(of, rate, strict=True)) / len(of)


def descend(point: list[float], height: Callable[[Sequence[float]], float]) -> list[float]:
    """A minimum by steps along one or two axes, halved where none goes down: the losses have corners."""
    axes = [[axis] for axis in range(AXES)] + [list(pair) for pair in itertools.combinations(range(AXES), 2)]
    moves = [dict(zip(pair, signs, strict=True)) for pair in axes for signs in itertools.product((-1, 1), repeat=len(pair))]
    size, low = 0.2, height(point)
    while size > 1e-3:
        near = [[p + size * move.get(axis, 0) for axis, p in enumerate(point)] for move in moves]
        heights = [height(other) for other in near]
        least = min(range(len(near)), key=heights.__getitem__)
        if heights[least] < low - 1e-9:
            point, low = near[least], heights[least]
        else:
            size /= 2
    return point


def shipped(cell: Cell) -> float:
    """log10 of what `sprand.suggest_lr` gives."""
    return math.log10(rates.rate(RMS[cell.task], cell.density, cell.method, WIDTHS[cell.task]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="CSV files of quality/suite.py (default: those in results/)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    files = options.files or [file for name in ("suite", "first_look") if (file := RESULTS / f"{name}.csv").exists()]
    done: dict = {}
    for file in files:
        done = results.read(file) | done
    of = cells(done)
    if not of:
        parser.error(f"expected runs at three rates or more in {', '.join(map(str, files))}, got none")
    coefficients = fit(of)
    names = ["A", "B", "C", "shift of gradient and fisher"]
    in_use = [math.log10(rates.FACTOR), -rates.EXPONENT, rates.STEEPNESS, rates.SHIFTS["gradient"]]
    law = [{"name": n, "fit": c, "now": u} for n, c, u in zip(names, coefficients, in_use, strict=True)]
    without = {task: fit([cell for cell in of if cell.task != task]) for task in dict.fromkeys(cell.task for cell in of)}
    rows = [
        {
            "task": cell.task, "method": cell.method, "density": f"{100 * cell.density:g} %",
            "best": f"{10**cell.best:.2g}{' (edge)' if cell.edge else ''}", "law": 10 ** shipped(cell),
            "off": shipped(cell) - cell.best, "loss": cell.loss_at(shipped(cell)),
            "fit loss": cell.loss_at(predicted(cell, coefficients)),
            "left out": predicted(cell, without[cell.task]) - cell.best if len(without) > 1 else None,
            "left out loss": cell.loss_at(predicted(cell, without[cell.task])) if len(without) > 1 else None,
        }
        for cell in sorted(of, key=lambda cell: (cell.task, cell.method, cell.density))
    ]  # fmt: skip
    total = [summary_of(name, [row for row in rows if name in (row["task"], "all")]) for name in (*without, "all")]
    sections = [
        ("Coefficients", markdown(law, {"name": ("", ""), "fit": ("fitted to these runs", ".3f"), "now": ("in sprand", ".3f")})),
        ("Errors", markdown(total, TOTALS)),
        ("Cells", markdown(rows, CELLS)),
    ]
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    write_markdown(options.out / "learning_rate.md", "The default learning rate", command, sections)
    draw(of, options.out / "learning_rate.png")
    return 0


TOTALS = {
    "name": ("task", ""), "cells": ("cells", "d"), "rms": ("rms, decades", ".2f"), "worst": ("worst loss", ".1f"),
    "mean": ("mean loss", ".2f"), "within": ("cells within one point", ""), "fit worst": ("worst loss, fit", ".1f"),
    "out rms": ("rms, task left out", ".2f"), "out worst": ("worst loss, task left out", ".1f"),
}  # fmt: skip
CELLS = {
    "task": ("task", ""), "method": ("method", ""), "density": ("density", ""), "best": ("best rate", ""), "law": ("law", ".2g"),
    "off": ("decades off", "+.2f"), "loss": ("loss: points, or % of perplexity", ".1f"), "fit loss": ("of the fit", ".1f"),
    "left out": ("decades off, task left out", "+.2f"), "left out loss": ("loss, task left out", ".1f"),
}  # fmt: skip


def summary_of(name: str, rows: Sequence[dict]) -> dict[str, object]:
    """The errors over some cells."""

    def rms(key: str) -> float | None:
        values = [row[key] for row in rows if row[key] is not None]
        return math.sqrt(sum(value**2 for value in values) / len(values)) if values else None

    losses = [row["loss"] for row in rows]
    return {
        "name": name, "cells": len(rows), "rms": rms("off"), "worst": max(losses), "mean": sum(losses) / len(losses),
        "within": f"{sum(loss <= 1 for loss in losses)} of {len(losses)}", "fit worst": max(row["fit loss"] for row in rows),
        "out rms": rms("left out"),
        "out worst": max((row["left out loss"] for row in rows if row["left out loss"] is not None), default=None),
    }  # fmt: skip


def draw(of: Sequence[Cell], path: Path) -> None:
    """A panel per size of weights: the best rates against density, arrows at edges, and the law for each group of strategies."""
    groups = {"gradient and fisher": ("#7570b3", True), "all others": ("#d95f02", False)}
    for panel, title in panels([f"rms {rms}" for rms in sorted({RMS[cell.task] for cell in of})], path):
        rms = float(title.split()[1])
        width = next(WIDTHS[task] for task in WIDTHS if RMS[task] == rms)
        densities = [10 ** (-4 + i / 20) for i in range(81)]
        for name, (colour, shifted) in groups.items():
            line = [rates.rate(rms, d, "gradient" if shifted else "random", width) for d in densities]
            panel.plot(densities, line, color=colour, label=f"law, {name}")
            mine = [cell for cell in of if RMS[cell.task] == rms and (cell.method in rates.LARGE) == shifted]
            for edge, mark in ((False, "o"), (True, "x")):
                dots = [cell for cell in mine if cell.edge == edge]
                panel.plot([c.density for c in dots], [10**c.best for c in dots], mark, color=colour, alpha=0.7, markersize=5)
        panel.set_xscale("log")
        panel.set_yscale("log")
        plain_ticks(panel.xaxis, panel.yaxis)
        panel.set(title=title, xlabel="density", ylabel="learning rate (x: best at an edge of those tried)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)


if __name__ == "__main__":
    raise SystemExit(main())
