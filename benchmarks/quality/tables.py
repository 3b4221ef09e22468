"""The tables of a grid: of each method the best rate by dev, its test results, and how they compare to LoRA and all weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from quality import figures, paired
from quality.grids import SAME_MASK, Grid
from quality.results import Results, best
from quality.training import Run
from report import markdown, write_markdown

Rows = Mapping[Run, Tensor]
Summary = dict[str, object]
TABLE = {
    "label": ("method", ""), "trained": ("trained weights", ",.0f"), "tried": ("rates tried: dev", ""), "lr": ("lr", "g"),
    "dev": ("dev", ".4g"), "test": ("test, mean", ".4g"), "sd": ("sd", ".2g"), "each": ("test of each seed", ""),
    "vs lora": ("vs LoRA", ""), "vs full": ("vs full", ""), "old": ("old text", ".4g"),
    "seconds": ("training, s", ".0f"), "calibration": ("choosing, s", ".0f"), "device": ("on", ""), "note": ("", ""),
}  # fmt: skip
OLD = "`old text` is the perplexity of text like that which the model was trained on before (untrained: as it was)."


def summarize(done: Results, rows: Rows) -> list[Summary]:
    """A row per task, method and budget: the rate chosen on dev with the first seed, and the test results of all seeds."""
    found = []
    for task, method, budget in dict.fromkeys((run.task, run.method, run.budget) for run in done):
        runs = [run for run in done if (run.task, run.method, run.budget) == (task, method, budget)]
        first = min(run.seed for run in runs)
        tried = sorted((run for run in runs if run.seed == first), key=lambda run: run.lr or 0)
        chosen = best(tried, done)
        seeds = sorted((run for run in runs if run.lr == chosen.lr), key=lambda run: run.seed)
        tests = [float(done[run]["test"]) for run in seeds]
        choosing = [done[run].get("calibration_seconds") for run in tried]
        old = [float(done[run]["old"]) for run in seeds if done[run].get("old")]
        edge = len(tried) > 1 and chosen in (tried[0], tried[-1])
        found.append(
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
                "sd": statistics.stdev(tests) if len(tests) > 1 and all(map(math.isfinite, tests)) else None,
                "tests": tests,
                "rows": {run.seed: rows[run] for run in seeds if run in rows},
                "each": ", ".join(f"{value:.4g}" for value in tests),
                "old": statistics.mean(old) if old else None,
                "seconds": done[chosen].get("seconds"),
                "device": ", ".join(sorted({str(done[run]["device"]) for run in runs if done[run].get("device")})),
                "calibration": max((float(value) for value in choosing if value), default=None),
                "note": "; ".join(filter(None, [done[chosen].get("note"), "best rate at the edge of the grid" if edge else ""])),
            }
        )
    for row in found:
        for other in ("lora", "full"):
            budget = row["budget"] if other == "lora" else None
            theirs = [r for r in found if (r["task"], r["method"], r["budget"]) == (row["task"], other, budget)]
            if theirs and theirs[0] is not row and row["method"] != "untrained":
                compared = paired.difference(row["rows"], theirs[0]["rows"], str(row["metric"]))
                row[f"vs {other}"] = str(compared) if compared else None
    return found


def write(done: Results, rows: Rows, out: Path, name: str, grid: Grid, command: str) -> None:
    """Write NAME.md and the figures."""
    summary = summarize(done, rows)
    known = {(row["task"], row["budget"]) for row in summary}
    absent = [f"{task} at {100 * budget:g} %" for task, budget in grid.blocks if (task, budget) not in known]
    caption = [f"{len(done)} runs." + (f" Not run yet: {', '.join(absent)}." if absent else "")]
    caption += [paired.CAPTION] if rows else []
    caption += [OLD] if any(row["old"] for row in summary) else []
    sections = [("", "\n\n".join(caption) + "\n")]
    order = {(task, budget): place for place, (task, budget) in enumerate(grid.blocks)}
    groups = dict.fromkeys((row["task"], row["budget"]) for row in summary)
    for task, budget in sorted(groups, key=lambda group: (list(grid.tasks).index(group[0]), order.get(group, -1))):
        here = [row for row in summary if (row["task"], row["budget"]) == (task, budget)]
        higher = here[0]["metric"] == "accuracy"
        here.sort(key=lambda row: row["test"], reverse=higher)
        for row in here:
            also = [name for name, other in SAME_MASK.items() if other == row["method"]]
            row["label"] = " = ".join([str(row["method"]), *also])
            if row["method"] != "untrained" and len(row["tests"]) < len(grid.seeds):
                row["note"] = "; ".join(filter(None, [str(row["note"]), "not finished"]))
        amount = f"{100 * budget:g} % of the targeted weights" if budget else "without a budget"
        heading = f"{task}: {amount}, {here[0]['metric']} ({'higher' if higher else 'lower'} is better)"
        columns = {key: value for key, value in TABLE.items() if any(row.get(key) not in (None, "") for row in here)}
        sections.append((heading, markdown(here, columns)))
    write_markdown(out / f"{name}.md", grid.title, command, sections)
    figures.draw(summary, out, name, grid)
