"""The table and the figure of the first look: the best learning rate of each method by dev, and its test results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from plots import figure_saved, figure_with
from quality.training import Run
from report import markdown, write_markdown

Results = Mapping[Run, Mapping[str, object]]
TABLE = {
    "label": ("method", ""), "trained": ("trained weights", ",.0f"), "tried": ("rates tried: dev", ""), "lr": ("lr", "g"),
    "dev": ("dev", ".4g"), "test": ("test, mean", ".4g"), "each": ("test of each seed", ""), "seconds": ("training, s", ".0f"),
    "calibration": ("choosing, s", ".0f"), "note": ("", ""),
}  # fmt: skip


def best(tried: Sequence[Run], done: Results) -> Run:
    """The run with the best dev result."""
    higher = done[tried[0]]["metric"] == "accuracy"
    return (max if higher else min)(tried, key=lambda run: done[run]["dev"])


def summarize(done: Results) -> list[dict[str, object]]:
    """A row per task, method and budget: the rate chosen on dev with the first seed, and the test results of all seeds."""
    rows = []
    for task, method, budget in dict.fromkeys((run.task, run.method, run.budget) for run in done):
        runs = [run for run in done if (run.task, run.method, run.budget) == (task, method, budget)]
        first = min(run.seed for run in runs)
        tried = sorted((run for run in runs if run.seed == first), key=lambda run: run.lr or 0)
        chosen = best(tried, done)
        seeds = sorted((run for run in runs if run.lr == chosen.lr), key=lambda run: run.seed)
        tests = [float(done[run]["test"]) for run in seeds]
        choosing = [done[run].get("calibration_seconds") for run in tried]
        edge = len(tried) > 1 and chosen in (tried[0], tried[-1])
        rows.append(
            {
                "task": task,
                "method": method,
                "budget": budget,
                "metric": done[chosen]["metric"],
                "trained": done[chosen]["trained"],
                "lr": chosen.lr,
                "dev": done[chosen]["dev"],
                "tried": ", ".join(f"{run.lr:g}: {done[run]['dev']:.4g}" for run in tried if run.lr),
                "test": statistics.mean(tests),
                "tests": tests,
                "each": ", ".join(f"{value:.4g}" for value in tests),
                "seconds": done[chosen]["seconds"],
                "calibration": max((float(value) for value in choosing if value), default=None),
                "note": "; ".join(filter(None, [done[chosen].get("note"), "best rate at the edge of the grid" if edge else ""])),
            }
        )
    return rows


def write(done: Results, out: Path, command: str, same_mask: Mapping[str, str]) -> None:
    """Write first_look.md and first_look.png."""
    rows = summarize(done)
    sections = []
    for task, budget in dict.fromkeys((row["task"], row["budget"]) for row in rows):
        here = [row for row in rows if (row["task"], row["budget"]) == (task, budget)]
        higher = here[0]["metric"] == "accuracy"
        here.sort(key=lambda row: row["test"], reverse=higher)
        for row in here:
            also = [name for name, other in same_mask.items() if other == row["method"]]
            row["label"] = " = ".join([str(row["method"]), *also])
        amount = f"{100 * budget:g} % of the targeted weights" if budget else "without a budget"
        heading = f"{task}: {amount}, {here[0]['metric']} ({'higher' if higher else 'lower'} is better)"
        sections.append((heading, markdown(here, TABLE)))
    write_markdown(out / "first_look.md", "A first look at quality", command, sections)
    draw(rows, out / "first_look.png")


def draw(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """A panel per task: the test result of each seed, by method, a colour per budget; lines are the methods without one."""
    tasks = list(dict.fromkeys(str(row["task"]) for row in rows))
    figure, panels = figure_with(tasks, path)
    if figure is None:
        return
    for panel, task in panels:
        here = [row for row in rows if row["task"] == task]
        names = list(dict.fromkeys(str(row["method"]) for row in here if row["budget"]))
        for budget, colour in zip(sorted({row["budget"] for row in here if row["budget"]}), ("#e08214", "#2166ac"), strict=False):
            for row in (row for row in here if row["budget"] == budget):
                x, y = row["tests"], [names.index(str(row["method"]))] * len(row["tests"])
                label = f"{100 * budget:g} %" if str(row["method"]) == names[0] else None
                panel.plot(x, y, "o-", color=colour, markersize=5, linewidth=1, label=label)
        for row, style in zip((row for row in here if not row["budget"]), (":", "--"), strict=False):
            if row["method"] != "untrained" or row["metric"] == "accuracy":
                panel.axvline(row["test"], color="grey", linestyle=style, label=str(row["method"]))
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        if here[0]["metric"] != "accuracy":
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        panel.set(title=task, xlabel=f"{here[0]['metric']} on test, a dot per seed")
        panel.grid(axis="x", alpha=0.3)
        panel.legend(fontsize=8)
    figure_saved(figure, path)
