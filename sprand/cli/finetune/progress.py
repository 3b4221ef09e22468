"""What a run shows and writes while it trains: a live bar in a terminal, a few plain lines elsewhere, and metrics.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import require
from ..table import Rows, print_table
from .methods import Method

PLAIN_LINES = 5


class Log:
    """Collects metrics, one JSON object per line.

    Args:
        path: the metrics file.
        metric: name of the metric, for display.
        to_stderr: leave standard output to others.
    """

    def __init__(self, path: Path, metric: str, to_stderr: bool = False) -> None:
        self.path, self.metric = path, metric
        self.console = require("rich.console").Console(highlight=False, soft_wrap=True, stderr=to_stderr)

    def say(self, text: str) -> None:
        """Show a line to the reader."""
        self.console.print(text, markup=False)

    def table(self, rows: Rows, title: str) -> None:
        """Show a table, whose first row is the header."""
        print_table(rows, title=title, file=self.console.file)

    def restart(self, method: str, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Begin a method with the metrics of the run it resumes; the first method begins the file anew."""
        with self.path.open("w" if method == "sprand" else "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in history)
        return list(history)

    def write(self, history: list[dict[str, Any]], **line: Any) -> None:
        """Add a line to the history and the file."""
        history.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def progress(self, method: Method, steps: int, done: int) -> Iterator[Bar | Lines]:
        """Shows steps: a live bar where a terminal is, else plain lines."""
        if not self.console.is_terminal:
            yield Lines(self, method.name, steps)
            return
        rich = require("rich.progress")
        columns = (
            rich.TextColumn("{task.description:<7}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("loss {task.fields[loss]}"),
            rich.TextColumn("{task.fields[measure]}"),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
        )
        with rich.Progress(*columns, console=self.console) as shown:
            yield Bar(self, shown, shown.add_task(method.name, total=steps, completed=done, loss="-", measure=""))


class Bar:
    """Shows a live bar, made by rich."""

    def __init__(self, log: Log, shown: Any, task: Any) -> None:
        self.log, self.shown, self.task, self.smooth = log, shown, task, None

    def advance(self, step: int) -> None:
        """Take note of a step that is done."""
        self.shown.update(self.task, completed=step)

    def loss(self, step: int, loss: float) -> None:
        """Show the loss, smoothed."""
        self.smooth = loss if self.smooth is None else 0.9 * self.smooth + 0.1 * loss
        self.shown.update(self.task, loss=f"{self.smooth:.3f}")

    def measured(self, value: float) -> None:
        """Show the metric of an evaluation."""
        self.shown.update(self.task, measure=f"{self.log.metric} {value:.4g}")


class Lines:
    """Shows a plain line every so many steps."""

    def __init__(self, log: Log, name: str, steps: int) -> None:
        self.log, self.name, self.steps, self.started, self.next = log, name, steps, time.perf_counter(), 0

    def advance(self, step: int) -> None:
        """Take note of a step that is done."""

    def loss(self, step: int, loss: float) -> None:
        """Say the loss, of the last step and a few before."""
        every = max(1, self.steps // PLAIN_LINES)
        if step == self.steps or step >= (self.next or every):
            self.next = step - step % every + every
            self.log.say(f"{self.name}: step {step}/{self.steps}, loss {loss:.3f}, {time.perf_counter() - self.started:.1f} s")

    def measured(self, value: float) -> None:
        """Show the metric of an evaluation."""
        self.log.say(f"{self.name}: {self.log.metric} {value:.4g}")
