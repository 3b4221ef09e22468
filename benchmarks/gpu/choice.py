"""What the choice between the kernels of sddmm gives away: it is made anew from the times in an `ops.csv`, on any machine."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import timing  # noqa: F401  isort: skip  (puts benchmarks/ on the path)
from report import Row, command_line, markdown, read_csv, write_csv, write_markdown
from sprand.kernels import tuning
from sprand.kernels.cost_model import Costs
from sprand.kernels.schedule import Schedule

WAYS = {"sprand, row kernel": "rows", "sprand, dense chunks": "dense"}
KEYS = ("out", "in", "density", "tokens")
COLUMNS = (*KEYS, "in_fit", "chosen", "fastest", "us", "us_fastest", "lost", "measured_us", "measured_lost")
TABLE = {
    "shape": ("weight", ""), "percent": ("density", ""), "tokens": ("tokens", ",d"),
    "in_fit": ("among the fitted", ""), "chosen": ("chosen", ""), "us": ("us", ".0f"), "fastest": ("fastest", ""),
    "us_fastest": ("us", ".0f"), "lost": ("lost, %", ".1f"), "measured_lost": ("the choice of that day, %", ".1f"),
}  # fmt: skip


@dataclasses.dataclass
class Problem:
    """A pattern and a number of tokens, and what was measured of it.

    Attributes:
        shape, density, tokens: what was computed.
        schedule: of the pattern.
        taken: microseconds of each way.
        then: microseconds of what was chosen when it was measured.
    """

    shape: tuple[int, int]
    density: float
    tokens: int
    schedule: Schedule
    taken: dict[str, float]
    then: float

    @property
    def in_fit(self) -> bool:
        """Whether `tuning.measure` times a case like it."""
        of_it = (tuning.MEASURED_SHAPES, tuning.MEASURED_TOKENS, tuning.MEASURED_DENSITIES)
        return all(value in values for value, values in zip((self.shape, self.tokens, self.density), of_it, strict=True))


def problems(rows: Sequence[Row], dtype: torch.dtype) -> Iterator[Problem]:
    """The problems of an `ops.csv` that all ways were measured on."""
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["op"] == "sddmm" and row["layout"] == "unstructured" and row["us"] is not None:
            found.setdefault(tuple(row[key] for key in KEYS), {})[row["contestant"]] = row["us"]
    schedules: dict[tuple, Schedule] = {}
    for (out_features, in_features, density, tokens), taken in found.items():
        shape = out_features, in_features
        if "sprand" not in taken or not all(name in taken for name in WAYS):
            continue
        key = (shape, density)
        if key not in schedules:
            schedules[key] = tuning.drawn(shape, density, dtype, torch.device("cpu"))[0]
        measured = {way: taken[name] for name, way in WAYS.items()}
        yield Problem(shape, density, tokens, schedules[key], measured, taken["sprand"])


def replayed(problem: Problem, costs: Costs) -> Row:
    """What the costs choose, beside the fastest way."""
    schedule = costs.choose(problem.schedule, *problem.shape)
    first, last = schedule.dense_tokens
    chosen = "dense" if first <= problem.tokens < last else "rows"
    fastest = min(problem.taken, key=problem.taken.__getitem__)
    best = problem.taken[fastest]
    return {
        "out": problem.shape[0], "in": problem.shape[1], "density": problem.density,
        "tokens": problem.tokens, "in_fit": "yes" if problem.in_fit else "", "chosen": chosen, "us": problem.taken[chosen],
        "fastest": fastest, "us_fastest": best, "lost": 100 * (problem.taken[chosen] / best - 1), "measured_us": problem.then,
        "measured_lost": 100 * (problem.then / best - 1), "shape": f"{problem.shape[0]}x{problem.shape[1]}",
        "percent": f"{100 * problem.density:g} %",
    }  # fmt: skip


def mean_loss(rows: Sequence[Row], taken: str) -> float:
    """The geometric mean of the times over the fastest, in percent above it."""
    return 100 * (math.exp(sum(math.log(row[taken] / row["us_fastest"]) for row in rows) / len(rows)) - 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="results of a GPU: ops.csv in it is read, choice.csv and choice.md are written")
    options = parser.parse_args(argv)
    if not (options.folder / "ops.csv").is_file():
        parser.error(f"expected the ops.csv of benchmarks/gpu/ops.py in {options.folder}, found none")
    found = list(problems([row for row in read_csv(options.folder / "ops.csv") if row["dtype"] == "bf16"], torch.bfloat16))
    fitting = [problem for problem in found if problem.in_fit]
    if not fitting:
        parser.error(f"{options.folder / 'ops.csv'}: expected the cases that tuning.measure times, bf16, got none")
    cases = [
        (way, problem.schedule, problem.shape, problem.tokens, taken / 1e6)
        for problem in fitting
        for way, taken in problem.taken.items()
    ]
    costs = tuning.fitted(cases)
    rows = [replayed(problem, costs) for problem in found]
    others = [row for row in rows if not row["in_fit"]]
    caption = (
        f"Costs fitted to {len(fitting)} problems, the choice judged on all {len(rows)}: on the {len(others)} that the fit "
        f"did not see it takes {mean_loss(others, 'us'):.1f} % longer than the fastest way in the geometric mean, the choice "
        f"of the day of the measurement {mean_loss(others, 'measured_us'):.1f} %.\n"
    )
    write_csv(options.folder / "choice.csv", rows, COLUMNS)
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    write_markdown(options.folder / "choice.md", "The choice between kernels, replayed", command,
                   [("", caption), ("Problems", markdown(rows, TABLE))])  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
