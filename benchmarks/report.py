"""What every benchmark prints and writes: the machine, a progress line, CSV files and Markdown tables."""

from __future__ import annotations

import contextlib
import csv
import datetime
import importlib.metadata
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, object]


def machine() -> dict[str, str]:
    """Everything about this machine that a ratio may depend on, and nothing that names it."""
    import torch

    facts = {
        "date": datetime.date.today().isoformat(),
        "CPU": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "instruction set": instruction_sets(),
        "torch": torch.__version__,
        **_gpu(),
    }
    for package in ("transformers", "peft", "peft-sparta"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    facts["sprand"] = f"{_sprand_version()}, commit {_commit()}"
    return facts


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: runs side by side do not slow each other down, and sums round as on any other machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def end_as_by_ctrl_c() -> Iterator[None]:
    """Let `timeout` end what is inside by a KeyboardInterrupt, so that what was measured until then is written."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def instruction_sets() -> str:
    """What PyTorch's kernels and sprand's use on this CPU."""
    import torch

    return f"torch {torch.backends.cpu.get_cpu_capability()}, sprand {_sprand_instruction_set()}"


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), cuts[1], cuts[7]


def write_csv(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Write `rows` with exactly `columns`; numbers with six significant digits, missing values empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)


def read_csv(path: Path) -> list[dict[str, object]]:
    """What `write_csv` wrote: numbers as numbers, missing values as None."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def markdown(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> str:
    """A Markdown table.

    Args:
        rows: one mapping per line.
        columns: column name to (heading, format spec); strings and missing values are printed as they are.
    """
    lines = ["| " + " | ".join(heading for heading, _ in columns.values()) + " |"]
    lines.append("|" + "|".join("---:" if spec else "---" for _, spec in columns.values()) + "|")
    for row in rows:
        cells = []
        for column, (_, spec) in columns.items():
            value = row.get(column)
            cells.append("" if value is None else format(value, spec) if spec and not isinstance(value, str) else str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_markdown(path: Path, title: str, command: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write the machine, the command and the titled tables, and print the tables."""
    facts = "\n".join(f"- {name}: {value}" for name, value in machine().items())
    body = "\n".join(f"## {heading}\n\n{table}" if heading else table for heading, table in sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {title}\n\n`{command}`\n\n{facts}\n\n{body}", encoding="utf-8")
    print(f"\n{body}", flush=True)


def command_line(script: str, arguments: Sequence[str]) -> str:
    """The command to repeat a run, without the folder the results went to."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--out="):
            skip = False
            continue
        if argument == "--out":
            skip = True
            continue
        kept.append(argument)
    path = Path(script).resolve().relative_to(RESULTS.resolve().parent.parent)
    return " ".join(["python", path.as_posix(), *kept])


@contextlib.contextmanager
def progress(total: int, title: str) -> Iterator[Progress]:
    """A progress bar on a terminal, one plain line per message elsewhere."""
    bar = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            bar = RichProgress(*columns, console=Console(stderr=True))
    with bar or contextlib.nullcontext():
        yield Progress(bar, bar.add_task(title, total=total) if bar else None, title)


class Progress:
    """Counts steps; `say` adds a line that stays."""

    def __init__(self, bar, task, title: str) -> None:
        self._bar, self._task, self._title = bar, task, title

    def advance(self) -> None:
        if self._bar:
            self._bar.advance(self._task)

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(f"{self._title}: {text}", file=sys.stderr, flush=True)


def _cell(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _value(cell: str) -> object:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell)
    return cell or None


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        facts = dict(line.rstrip("\n").partition(":")[::2] for line in file if ":" in line)
        named = {key.strip(): value.strip() for key, value in facts.items()}
        if "model name" in named:
            family = f"family {named['cpu family']} model {named['model']}" if "cpu family" in named else ""
            return f"{named['model name']} {family}".strip()
    import platform

    return platform.processor() or platform.machine()


def _gpu() -> dict[str, str]:
    """Card, driver and CUDA, where torch sees a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    facts = {"GPU": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        facts["driver"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return facts


def _sprand_instruction_set() -> str:
    try:
        from sprand import native

        return native.instruction_set() if native.has_extension() else "reference (plain PyTorch)"
    except ImportError:
        return "not installed"


def _sprand_version() -> str:
    try:
        import sprand

        return getattr(sprand, "__version__", "unknown version")
    except ImportError:
        return "not installed"


def _commit() -> str:
    """The commit, or SPRAND_COMMIT where the sources came without their repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SPRAND_COMMIT", "unknown")
