"""What a run leaves: the table, results.json, and the training curve as a PNG."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.polynomial import Polynomial

from .. import require
from ..table import size_text
from .measures import CONFUSION, SHOWN_CLASSES, SHOWN_SAMPLES, Measures, confusion_rows, sample_lines
from .methods import Method
from .peak_memory import HOW
from .progress import Log
from .settings import Settings
from .tasks import Task
from .training import Outcome

SMOOTHED_SHARE = 0.1  # of the steps, on each side of a step, by which the curve is smoothed
SHARES = ("accuracy", "exact_match")
COLOURS = {"sprand": "#c0392b", "lora": "#2471a3", "full": "#1e8449", "head": "#7d6608"}


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table."""

    method: str
    note: str
    lr: float
    before: dict[str, float]
    after: dict[str, float]
    shown: dict[str, Any]
    trained_weights: int
    adapter_bytes: int
    seconds_per_step: float
    peak_bytes: int | None
    steps: int

    @classmethod
    def of(cls, method: Method, outcome: Outcome, adapter_bytes: int, before: Measures, after: Measures) -> Result:
        """The row of a trained method."""
        shown = {"before": before.shown(), "after": after.shown()}
        return cls(
            method.name, method.note, method.lr, before.numbers, after.numbers, shown, method.count, adapter_bytes,
            round(outcome.seconds_per_step, 5), outcome.peak_bytes, outcome.steps,
        )  # fmt: skip


def content(
    settings: Settings, task: Task, results: Sequence[Result], versions: dict[str, str], checks: list[str]
) -> dict[str, Any]:
    """What results.json holds: options, versions, data sizes, the rows of the table, the checks that held."""
    return {
        "settings": settings.to_json(),
        "versions": versions,
        "rows": {"train": len(task.train), "eval": len(task.eval)},
        "metric": task.metric,
        "results": [dataclasses.asdict(result) for result in results],
        "checked": checks,
    }


def print_table(log: Log, task: Task, results: Sequence[Result], device: str) -> None:
    """One table of all methods, and how its numbers were measured."""
    header = ("method", "before", "after", "trained weights", "adapter", "s/step", "peak memory", "lr")
    rows = [header, *(_row(task, result) for result in results)]
    metric, count = headline(task, results[0])
    log.table(rows, f"{metric} on {count} held-out rows, after {results[0].steps} steps")
    head = "Trained weights include a new head's. " if task.metric == "accuracy" else ""
    log.say(f"{head}s/step: mean, evaluation left out. Peak memory: {HOW[device]}.")
    if metric in SHARES:
        shares = [result.after[metric] for result in results]
        worst = max((share * (1 - share) / count) ** 0.5 for share in shares)
        log.say(f"One seed; the standard error of {metric} here is up to {100 * worst:.1f} points.")


def headline(task: Task, result: Result) -> tuple[str, int]:
    """What the table of methods shows, the score of generated text where one was asked for, and of how many rows."""
    scores = [name for name in ("exact_match", "score") if name in result.after]
    return (scores[0], len(result.shown["after"]["samples"])) if scores else (task.metric, len(task.eval))


def print_measures(log: Log, result: Result) -> None:
    """All that was measured of a method before and after, the confusion matrix, and a few samples."""
    rows = [(name, *(f"{part[name]:.4g}" for part in (result.before, result.after))) for name in result.after]
    log.table([("", "before", "after"), *rows], f"{result.method}, on held-out rows")
    shown_before, shown = result.shown["before"], result.shown["after"]
    if 0 < len(shown.get("classes", ())) <= SHOWN_CLASSES:
        log.table(confusion_rows(shown["classes"], shown["confusion"]), CONFUSION)
    samples = list(zip(shown_before.get("samples", ()), shown.get("samples", ()), strict=True))[:SHOWN_SAMPLES]
    for number, (before, after) in enumerate(samples, 1):
        log.say(f"held-out sample {number}")
        parts = {"prompt": after["prompt"], "reference": after["reference"]}
        parts |= {"before": before["generated"], "after": after["generated"]}
        log.say("\n".join(sample_lines(parts)))


def plot(path: Path, histories: Sequence[list[dict[str, Any]]], task: Task) -> None:
    """The training curve: smoothed training loss, and the metric on held-out rows, by step."""
    require("matplotlib").use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for history in histories:
        name = history[0]["method"]
        colour = COLOURS.get(name, "black")
        steps, losses = _series(history, "loss")
        left.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        left.plot(steps, _smooth(losses), color=colour, label=name)
        right.plot(*_series(history, f"eval_{task.metric}"), color=colour, marker="o", markersize=4, label=name)
    left.set(xlabel="step", ylabel="training loss", title="Training loss (smoothed; pale: each step)")
    right.set(xlabel="step", ylabel=task.metric, title=f"{task.metric.capitalize()} on {len(task.eval)} held-out rows")
    measured = [value for history in histories for value in _series(history, f"eval_{task.metric}")[1]]
    if not task.higher_is_better and measured and max(measured) > 10 * min(measured) > 0:
        right.set_yscale("log")
        right.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter("")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _row(task: Task, result: Result) -> tuple[str, ...]:
    metric, _ = headline(task, result)
    return (
        f"{result.method} ({result.note})" if result.note else result.method,
        _shown(metric, result.before[metric]),
        _shown(metric, result.after[metric]),
        f"{result.trained_weights:,}",
        size_text(result.adapter_bytes),
        f"{result.seconds_per_step:.3f}",
        size_text(result.peak_bytes),
        f"{result.lr:g}",
    )


def _series(history: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps at which a history has a number, and the numbers."""
    lines = [line for line in history if key in line]
    return [line["step"] for line in lines], [line[key] for line in lines]


def _smooth(values: Sequence[float]) -> list[float]:
    """At each step the value there of the line that fits the steps around it best: unlike a mean of the past it does not lag."""
    reach = max(1, round(SMOOTHED_SHARE * len(values)))
    windows = [(max(0, here - reach), min(len(values), here + reach + 1)) for here in range(len(values))]
    fits = [Polynomial.fit(range(first, end), values[first:end], min(1, end - first - 1)) for first, end in windows]
    return [float(fit(here)) for here, fit in enumerate(fits)]


def _shown(metric: str, value: float) -> str:
    return f"{100 * value:.1f} %" if metric in SHARES else f"{value:.4g}"
