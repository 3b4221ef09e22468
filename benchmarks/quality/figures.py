"""The figures of a grid: results by method, results in each cell, and old text forgotten against new learned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plots import panels, plain_ticks
from quality.grids import Grid

Row = Mapping[str, object]
PEERS = ("shira", "peft-sparta", "supertuning", "paca", "dora")
ACROSS = 4
FAMILIES = {
    "#d95f02": "sprand, drawn at random", "#5e4fa2": "sprand, chosen or moved by gradients",
    "#000000": "LoRA (dotted line)", "#8a8a8a": "other packages",
}  # fmt: skip
MARKS = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:")


def draw(rows: Sequence[Row], out: Path, name: str, grid: Grid) -> None:
    """Draw what the grid asks for: NAME.png, and NAME_forgetting.png where old text was measured."""
    rows = [row for row in rows if math.isfinite(row["test"])]
    if grid.many_budgets:
        by_cell(rows, out / f"{name}.png")
    else:
        by_method(rows, out / f"{name}.png")
    if any(row["old"] and row["budget"] for row in rows):
        forgetting([row for row in rows if row["old"]], out / f"{name}_forgetting.png")


def by_method(rows: Sequence[Row], path: Path) -> None:
    """A panel per task: the test result of each seed, by method, a colour per budget; those without one in the title."""
    for panel, here in _tasks(rows, path):
        names = list(dict.fromkeys(str(row["method"]) for row in here if row["budget"]))
        for budget, colour in zip(sorted({row["budget"] for row in here if row["budget"]}), ("#e08214", "#2166ac"), strict=False):
            for row in (row for row in here if row["budget"] == budget):
                x, y = row["tests"], [names.index(str(row["method"]))] * len(row["tests"])
                label = f"{100 * budget:g} %" if str(row["method"]) == names[0] else None
                panel.plot(x, y, "o-", color=colour, markersize=5, linewidth=1, label=label)
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        if here[0]["metric"] != "accuracy":
            panel.set_xscale("log")
            plain_ticks(panel.xaxis)
        panel.set(title=f"{here[0]['task']}: {references(here)}", xlabel=f"{here[0]['metric']} on test, a dot per seed")
        panel.grid(axis="x", alpha=0.3)
        panel.legend(fontsize=8)


def by_cell(rows: Sequence[Row], path: Path) -> None:
    """A panel per task and budget: the methods from best to worst, each with one standard deviation over seeds."""
    tasks = list(dict.fromkeys(str(row["task"]) for row in rows))
    cells = sorted({(tasks.index(str(row["task"])), row["budget"]) for row in rows if row["budget"]})
    names = {f"{tasks[task]}, {100 * budget:g} %": (tasks[task], budget) for task, budget in cells}
    counts = [sum((row["task"], row["budget"]) == cell for row in rows) for cell in names.values()]
    most = [max(counts[first : first + ACROSS]) for first in range(0, len(counts), ACROSS)]  # in each row of panels
    for number, (panel, name) in enumerate(panels(names, path, across=ACROSS)):
        here = [row for row in rows if (row["task"], row["budget"]) == names[name]]
        accuracy = here[0]["metric"] == "accuracy"
        here.sort(key=lambda row: row["test"], reverse=accuracy)
        for y, row in enumerate(here):
            colour = family(str(row["method"]))
            panel.errorbar(row["test"], y, xerr=row["sd"] or 0, fmt="o", color=colour, markersize=6, capsize=2)
            if row["method"] == "lora":
                panel.axvline(row["test"], color=colour, linestyle=":", linewidth=1, zorder=0)
        panel.set_yticks(range(len(here)), [str(row["method"]) for row in here])
        for label, row in zip(panel.get_yticklabels(), here, strict=True):
            label.set_color(family(str(row["method"])))
        panel.set_ylim(most[number // ACROSS] - 0.5, -0.5)
        if not accuracy and max(row["test"] for row in here) > 2 * min(row["test"] for row in here):
            panel.set_xscale("log")
            plain_ticks(panel.xaxis)
        panel.set_title(f"{name}\n{references([row for row in rows if row['task'] == names[name][0]])}", fontsize=9)
        panel.set_xlabel(f"{here[0]['metric']}, {'more' if accuracy else 'less'} is better", fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if number == len(names) - 1:
            panel.figure.set_size_inches(3.9 * min(ACROSS, len(names)), sum(0.21 * count + 1 for count in most) + 0.4)
            panel.get_gridspec().set_height_ratios([0.21 * count + 1 for count in most])
            for colour, label in FAMILIES.items():
                panel.plot([], [], "o", color=colour, label=label)
            panel.figure.legend(loc="outside lower left", ncols=len(FAMILIES), frameon=False, fontsize=10)


def family(method: str) -> str:
    """Its colour, a key of FAMILIES."""
    drawn, chosen, lora, other = FAMILIES
    if method.startswith(("random", "uniform", "run", "columns random")):
        return drawn
    return lora if method.startswith("lora") else other if method in PEERS else chosen


def references(rows: Sequence[Row]) -> str:
    """What has no budget, in words: on the axis it would take the place of what is compared."""
    return ", ".join(f"{row['method']} {row['test']:.3g}" for row in rows if not row["budget"])


def forgetting(rows: Sequence[Row], path: Path) -> None:
    """A panel per task: perplexity of the old text against that of the new, a line per method through its budgets."""
    for panel, here in _tasks(rows, path):
        for colour, methods in by_family(here).items():
            for method, mark in zip(methods, itertools.cycle(MARKS), strict=False):
                line = sorted((row for row in here if row["method"] == method), key=lambda row: row["trained"])
                x, y = ([row[key] for row in line] for key in ("test", "old"))
                panel.plot(x, y, mark, color=colour, markersize=5, linewidth=1, label=method)
        for row in here:
            if not row["budget"]:
                panel.plot(row["test"], row["old"], "kx")
                panel.annotate(str(row["method"]), (row["test"], row["old"]), (5, 3), textcoords="offset points", fontsize=8)
        panel.set_xscale("log")
        panel.set_yscale("log")
        plain_ticks(panel.xaxis, panel.yaxis)
        panel.set(xlabel="perplexity of the new text (test)", ylabel="perplexity of the old text")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)


def _tasks(rows: Sequence[Row], path: Path) -> Iterator[tuple[Any, list[Row]]]:
    """A panel for each task, and its rows."""
    for panel, task in panels((str(row["task"]) for row in rows), path):
        panel.set_title(task)
        yield panel, [row for row in rows if row["task"] == task]


def by_family(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The methods of each colour."""
    families: dict[str, list[str]] = {}
    for method in dict.fromkeys(str(row["method"]) for row in rows if row["budget"]):
        families.setdefault(family(method), []).append(method)
    return families
