"""A first look at quality: every strategy at two budgets on two tasks, beside LoRA and full fine-tuning. Resumable.

A run that stands in the CSV is not run again. For each task, method and budget three learning rates are tried with the first
seed; the one that is best on the dev rows is run with the other seeds, and the table shows test rows.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quality import tables
from quality.training import Run, TaskPlan, perform
from report import RESULTS, command_line, progress
from sprand.selection.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]
TASKS = {
    "sst2": TaskPlan(
        None, "sst2/train.tsv", "sst2/dev.tsv", "sst2/test.tsv",
        {
            "limit_train": 1000, "limit_eval": 600, "epochs": 1.0, "batch_size": 16, "max_length": 48,
            "calibration_examples": 256,
        },
    ),
    "shakespeare": TaskPlan(
        "stories260k-hf", "tinyshakespeare/train.txt", "tinyshakespeare/dev.txt", "tinyshakespeare/test.txt",
        {"max_steps": 300, "batch_size": 8, "max_length": 128},
    ),
}  # fmt: skip
SAME_MASK = {"taylor_fo": "snip"}  # tested in tests/test_selection.py: one order, one mask
OPTIONS = {  # an eighth of the width: from the width on, LIFT is magnitude
    ("sst2", "lift"): (("rank", 48),), ("shakespeare", "lift"): (("rank", 8),),
}  # fmt: skip
SPARSE = ("random", *(name for name in STRATEGIES if name not in SAME_MASK))
BUDGETS = (0.001, 0.01)
THIRD = 10**0.5
RATES = {  # the middle of three rates, half a decade apart; of the default of `sprand finetune` for random positions
    ("sst2", "sparse", 0.001): 1e-2, ("sst2", "sparse", 0.01): 5e-3,
    ("sst2", "lora", 0.001): 5e-3, ("sst2", "lora", 0.01): 2e-3, ("sst2", "full", None): 2e-4,
    ("shakespeare", "sparse", 0.001): 1e-1, ("shakespeare", "sparse", 0.01): 3e-2,
    ("shakespeare", "lora", 0.001): 3e-2, ("shakespeare", "lora", 0.01): 1e-2, ("shakespeare", "full", None): 2e-3,
}  # fmt: skip
COLUMNS = (
    "task", "method", "budget", "lr", "seed", "trained", "metric", "dev", "test", "train_loss", "steps", "seconds",
    "calibration_seconds", "note",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    file = options.out / "first_look.csv"
    done = read(file)
    options.masks.mkdir(parents=True, exist_ok=True)
    trained = [case for case in cases(options) if case[1] != "untrained"]
    total = len(trained) * (len(options.rates) + len(options.seeds) - 1) + len(options.tasks)
    context = multiprocessing.get_context("spawn")
    with progress(total, "first look") as bar, concurrent.futures.ProcessPoolExecutor(options.workers, context) as pool:
        running: dict[concurrent.futures.Future, Run] = {}

        def submit(run: Run) -> None:
            if run in done:
                bar.advance()
            else:
                running[pool.submit(perform, run, plan_of(run, options), options.shared, options.masks)] = run

        def repeat_best(task: str, method: str, budget: float | None) -> None:
            """Where all rates of a case have a result, run the best with the other seeds."""
            tried = [Run(task, method, budget, lr, options.seeds[0]) for lr in rates(task, method, budget, options)]
            if method != "untrained" and all(run in done for run in tried) and (task, method, budget) not in repeated:
                repeated.add((task, method, budget))
                for seed in options.seeds[1:]:
                    submit(dataclasses.replace(tables.best(tried, done), seed=seed))

        repeated: set[tuple[str, str, float | None]] = set()
        for turn in range(len(options.rates)):  # the first run of a case keeps its mask for the others
            for case in cases(options):
                tried = rates(*case, options)
                for lr in (tried[1:2] + tried[:1] + tried[2:])[turn : turn + 1]:
                    submit(Run(*case, lr, options.seeds[0]))
        for case in cases(options):
            repeat_best(*case)
        while running:
            ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                run = running.pop(future)
                done[run] = future.result()
                append(file, run, done[run])
                bar.say(f"{run.task} {run.method} {run.budget} lr {run.lr} seed {run.seed}: dev {done[run]['dev']:.4g}")
                bar.advance()
                repeat_best(run.task, run.method, run.budget)
    tables.write(done, options.out, command_line(__file__, sys.argv[1:] if argv is None else argv), SAME_MASK)
    return 0


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, float | None]]:
    """Task, method and budget of everything that is run, cheap tasks and plain methods first."""
    for task in options.tasks:
        yield task, "untrained", None
        for budget in options.budgets:
            for method in options.methods:
                if method not in ("full", "untrained"):
                    yield task, method, budget
        if "full" in options.methods:
            yield task, "full", None


def rates(task: str, method: str, budget: float | None, options: argparse.Namespace) -> list[float | None]:
    """The learning rates to try, to two digits."""
    if method == "untrained":
        return [None]
    middle = RATES[task, method if method in ("lora", "full") else "sparse", budget]
    return [float(f"{middle * THIRD**step:.1e}") for step in options.rates]


def plan_of(run: Run, options: argparse.Namespace) -> TaskPlan:
    """The task of a run, shortened where asked."""
    plan = TASKS[run.task]
    own = {"strategy_option": OPTIONS.get((run.task, run.method), ())}
    return dataclasses.replace(plan, options=plan.options | own | options.changes)


def read(file: Path) -> dict[Run, dict[str, object]]:
    """The results so far."""
    if not file.exists():
        return {}
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    numbers = ("budget", "lr", "trained", "dev", "test", "train_loss", "steps", "seconds", "calibration_seconds")
    done = {}
    for row in rows:
        values = {name: float(value) if name in numbers and value else value or None for name, value in row.items()}
        run = Run(row["task"], row["method"], values["budget"], values["lr"], int(row["seed"]))
        done[run] = {name: value for name, value in values.items() if name not in ("task", "method", "budget", "lr", "seed")}
    return done


def append(file: Path, run: Run, result: dict[str, object]) -> None:
    """Add a line; a run that is stopped meanwhile loses that line at most."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    line = {"task": run.task, "method": run.method, "budget": run.budget, "lr": run.lr, "seed": run.seed} | result
    with file.open("a", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        cells = [line.get(column) for column in COLUMNS]
        writer.writerow(["" if c is None else f"{c:.6g}" if isinstance(c, float) else c for c in cells])
        out.flush()
        os.fsync(out.fileno())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*SPARSE, "lora", "full")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=["shakespeare", "sst2"])
    parser.add_argument("--methods", nargs="+", choices=known, default=list(known))
    parser.add_argument("--budgets", nargs="+", type=float, choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each (default 2)")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/ and models/")
    parser.add_argument("--masks", type=Path, help="folder for chosen masks (default: runs/first_look_masks)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a few steps of two methods: does it run at all?")
    options = parser.parse_args(argv)
    options.rates, options.changes = (-1, 0, 1), {}
    if options.quick:
        options.rates, options.changes = (0, 1), {"max_steps": 4, "limit_train": 32, "limit_eval": 16, "calibration_examples": 16}
    if not (options.shared / "data").is_dir():
        parser.error(f"expected a folder with data/ and models/ at {options.shared}; give --shared")
    options.masks = options.masks or ROOT / "runs" / "first_look_masks"
    return options


if __name__ == "__main__":
    raise SystemExit(main())
