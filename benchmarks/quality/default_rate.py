"""What a user who sets nothing but the density gives away: test results at `suggest_lr`'s rate, beside those of the tuned one.

The tuned rate is the suite's, chosen on dev rows of the first seed; tasks, methods and seeds are those that have finished there.
Resumable: a run that stands in the CSV is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sprand
from quality import results, tables
from quality.fit_lr import RMS, WIDTHS
from quality.grids import SUITE
from quality.training import Run, perform
from report import RESULTS, command_line, markdown, progress, write_markdown

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("random", "gradient")
TABLE = {
    "task": ("task", ""), "method": ("method", ""), "density": ("density", ""), "tuned_lr": ("tuned rate", "g"),
    "lr": ("default", "g"), "tuned": ("test at the tuned rate", ".4g"), "test": ("at the default", ".4g"),
    "sd": ("sd of seeds, tuned", ".2g"), "lost": ("lost: points, or % of perplexity", "+.1f"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(SUITE.tasks), default=list(SUITE.tasks))
    parser.add_argument("--budgets", nargs="+", type=float, help="default: all that have finished")
    parser.add_argument("--suite", type=Path, default=RESULTS / "suite.csv")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/ and models/")
    parser.add_argument("--masks", type=Path, default=ROOT / "runs" / "suite_masks", help="folder for chosen masks")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    tuned = [
        row
        for row in tables.summarize(results.read(options.suite), {})
        if row["method"] in METHODS and row["task"] in options.tasks and len(row["tests"]) >= len(SUITE.seeds)
        and (options.budgets is None or row["budget"] in options.budgets)
    ]  # fmt: skip
    if not tuned:
        parser.error(f"{options.suite}: no {' or '.join(METHODS)} cell has finished; run quality/suite.py first")
    file = options.out / "default_rate.csv"
    done = results.read(file)
    wanted = {run: row for row in tuned for run in runs_of(row)}
    options.masks.mkdir(parents=True, exist_ok=True)
    with progress(len(wanted), "at the default rate") as bar:
        for run in wanted:
            if run not in done:
                plan = SUITE.tasks[run.task]
                device = dataclasses.replace(plan, options=plan.options | {"device": "cpu"})
                done[run], rows = perform(run, device, options.shared, options.masks)
                results.append(file, run, done[run], rows[:0])
                bar.say(f"{run.task} {run.method} {run.budget} lr {run.lr} seed {run.seed}: test {done[run]['test']:.4g}")
            bar.advance()
    lines = [line_of(row, [float(done[run]["test"]) for run in runs_of(row)]) for row in tuned]
    within = sum(line["lost"] <= 1 for line in lines)
    caption = f"{within} of {len(lines)} cells lose no more than one point of accuracy or one percent of perplexity.\n"
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    write_markdown(options.out / "default_rate.md", "The default rate, from one end to the other", command,
                   [("", caption), ("Means over seeds", markdown(lines, TABLE))])  # fmt: skip
    return 0


def runs_of(row: tables.Summary) -> list[Run]:
    """A cell's runs at the default rate, one for each seed."""
    task = row["task"]
    lr = sprand.suggest_lr(density=row["budget"], rms=RMS[task], strategy=row["method"], width=WIDTHS[task])
    return [Run(row["task"], row["method"], row["budget"], lr, seed) for seed in SUITE.seeds]


def line_of(row: tables.Summary, tests: Sequence[float]) -> dict[str, object]:
    """A cell's line; `lost` is how much worse the default is than the tuned rate."""
    mean = statistics.mean(tests)
    accuracy = row["metric"] == "accuracy"
    lost = 100 * (row["test"] - mean) if accuracy else 100 * (mean / row["test"] - 1)
    return {
        **{key: row[key] for key in ("task", "method", "sd")}, "density": f"{100 * row['budget']:g} %", "tuned_lr": row["lr"],
        "lr": runs_of(row)[0].lr, "tuned": row["test"], "test": mean, "lost": lost if math.isfinite(lost) else math.inf,
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
