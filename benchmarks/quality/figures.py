"""The figures of a grid: results by method, results against the trained count, and old text forgotten against new learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plots import panels
from quality.grids import Grid

Row = Mapping[str, object]
STYLES = {
    "random": ("#d95f02", "o-"), "uniform": ("#d95f02", "s:"), "run2": ("#e6ab02", "o-"), "run4": ("#e6ab02", "s--"),
    "run8": ("#e6ab02", "^:"), "gradient": ("#7570b3", "o-"), "snip": ("#7570b3", "s--"), "lora": ("#1b9e77", "o-"),
    "shira": ("#66a61e", "s--"), "peft-sparta": ("#666666", "^:"),
}  # fmt: skip


def draw(rows: Sequence[Row], out: Path, name: str, grid: Grid) -> None:
    """Draw what the grid asks for: NAME.png, and NAME_forgetting.png where old text was measured."""
    rows = [row for row in rows if math.isfinite(row["test"])]
    if grid.many_budgets:
        by_count(rows, out / f"{name}.png")
    else:
        by_method(rows, out / f"{name}.png")
    if any(row["old"] and row["budget"] for row in rows):
        forgetting([row for row in rows if row["old"]], out / f"{name}_forgetting.png")


def by_method(rows: Sequence[Row], path: Path) -> None:
    """A panel per task: the test result of each seed, by method, a colour per budget; lines are the methods without one."""
    for panel, here in _tasks(rows, path):
        names = list(dict.fromkeys(str(row["method"]) for row in here if row["budget"]))
        for budget, colour in zip(sorted({row["budget"] for row in here if row["budget"]}), ("#e08214", "#2166ac"), strict=False):
            for row in (row for row in here if row["budget"] == budget):
                x, y = row["tests"], [names.index(str(row["method"]))] * len(row["tests"])
                label = f"{100 * budget:g} %" if str(row["method"]) == names[0] else None
                panel.plot(x, y, "o-", color=colour, markersize=5, linewidth=1, label=label)
        for row, style in _references(here):
            panel.axvline(row["test"], color="grey", linestyle=style, label=str(row["method"]))
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        if here[0]["metric"] != "accuracy":
            panel.set_xscale("log")
            _plain(panel.xaxis)
        panel.set_xlabel(f"{here[0]['metric']} on test, a dot per seed")
        panel.grid(axis="x", alpha=0.3)
        panel.legend(fontsize=8)


def by_count(rows: Sequence[Row], path: Path) -> None:
    """A panel per task: the test mean against the trained count, bars of one standard deviation over seeds."""
    for panel, here in _tasks(rows, path):
        for method, colour, style, line in _lines(here):
            x, y = ([row[key] for row in line] for key in ("trained", "test"))
            error = [row["sd"] or 0 for row in line]
            panel.errorbar(x, y, error, fmt=style, color=colour, markersize=4, linewidth=1.2, capsize=2, label=method)
        for row, style in _references(here):
            label = f"{row['method']}, {row['test']:.3g}"
            panel.axhline(row["test"], color="grey", linestyle=style, linewidth=1, label=label)
        panel.set_xscale("log")
        if here[0]["metric"] != "accuracy":
            panel.set_yscale("log")
            _plain(panel.yaxis)
        panel.set(xlabel="trained weights (a new head apart)", ylabel=f"{here[0]['metric']} on test, mean and sd of seeds")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, ncols=2)


def forgetting(rows: Sequence[Row], path: Path) -> None:
    """A panel per task: perplexity of the old text against that of the new, a line per method through its budgets."""
    for panel, here in _tasks(rows, path):
        for method, colour, style, line in _lines(here):
            x, y = ([row[key] for row in line] for key in ("test", "old"))
            panel.plot(x, y, style, color=colour, markersize=5, linewidth=1, label=method)
        for row in here:
            if not row["budget"]:
                panel.plot(row["test"], row["old"], "kx")
                panel.annotate(str(row["method"]), (row["test"], row["old"]), (5, 3), textcoords="offset points", fontsize=8)
        panel.set_xscale("log")
        panel.set_yscale("log")
        _plain(panel.xaxis, panel.yaxis)
        panel.set(xlabel="perplexity of the new text (test)", ylabel="perplexity of the old text")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)


def _tasks(rows: Sequence[Row], path: Path) -> Iterator[tuple[Any, list[Row]]]:
    """A panel for each task, and its rows."""
    for panel, task in panels((str(row["task"]) for row in rows), path):
        panel.set_title(task)
        yield panel, [row for row in rows if row["task"] == task]


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, list[Row]]]:
    """Each method that is drawn as a line, its colour and style, and its rows by the trained count."""
    for method, (colour, style) in STYLES.items():
        line = sorted((row for row in rows if row["method"] == method), key=lambda row: row["trained"])
        if line:
            yield method, colour, style, line


def _references(rows: Sequence[Row]) -> Iterator[tuple[Row, str]]:
    """What has no budget, each with a line style; a perplexity without any training would only stretch the axis."""
    for row, style in zip((row for row in rows if not row["budget"]), (":", "--", "-."), strict=False):
        if row["method"] != "untrained" or row["metric"] == "accuracy":
            yield row, style


def _plain(*axes: object) -> None:
    for axis in axes:
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: f"{value:g}")
