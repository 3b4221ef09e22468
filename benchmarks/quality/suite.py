"""How well each method trains at equal counts: a grid of tasks, methods, budgets, learning rates and seeds. Resumable.

A run that stands in the CSV is not run again. For each task, method and budget the learning rates are tried with the first
seed (one more where the best is at an edge, in the grid `suite`); the one that is best on the dev rows is run with the other
seeds, and the table shows test rows. `own` is the suite on a model and files that are given.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sprand
from quality import results, tables
from quality.chat import write_reasoning
from quality.grids import GRIDS, HALF_DECADE, Cell, Grid, chat, own
from quality.results import Results
from quality.training import Run, TaskPlan, perform
from report import RESULTS, command_line, progress
from sprand.adapters.state import active_sites
from sprand.cli.finetune.methods import width_of
from sprand.cli.finetune.settings import Settings
from sprand.training.magnitude import root_mean_square

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"max_steps": 4, "limit_train": 32, "limit_eval": 16, "calibration_examples": 16}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    grid: Grid = options.found
    file = options.out / f"{options.name}.csv"
    done = results.read(file)
    cells = list(grid.cells(options.tasks, options.methods, options.budgets))
    if not options.tables:
        options.masks.mkdir(parents=True, exist_ok=True)
        work(cells, grid, options, done, file)
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    tables.write(done, results.read_rows(file), options.out, options.name, grid, command)
    return 0


def work(cells: list[Cell], grid: Grid, options: argparse.Namespace, done: dict[Run, results.Outcome], file: Path) -> None:
    """Run what is missing, cell by cell in their order, one run of a cell at a time (it keeps its mask for the others)."""
    total = sum(runs_of(cell, grid, options) for cell in cells)
    context = multiprocessing.get_context("spawn")
    with progress(total, grid.title) as bar, concurrent.futures.ProcessPoolExecutor(options.workers, context) as pool:
        running: dict[concurrent.futures.Future, Run] = {}
        for cell in cells:
            for _ in range(runs_of(cell, grid, options) - len(missing(cell, grid, options, done))):
                bar.advance()
        while True:
            busy = {(run.task, run.method, run.budget) for run in running.values()}
            for cell in cells:
                if len(running) >= options.workers:
                    break
                wanted = [] if cell in busy else missing(cell, grid, options, done)
                if wanted:
                    plan = plan_of(wanted[0], grid, options)
                    running[pool.submit(perform, wanted[0], plan, options.shared, options.masks)] = wanted[0]
            if not running:
                return
            ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                run = running.pop(future)
                done[run], rows = future.result()
                results.append(file, run, done[run], rows)
                bar.say(f"{run.task} {run.method} {run.budget} lr {run.lr} seed {run.seed}: dev {done[run]['dev']:.4g}")
                bar.advance()


def runs_of(cell: Cell, grid: Grid, options: argparse.Namespace) -> int:
    """How many runs a cell takes, without those beyond its grid of rates."""
    return 1 if cell[1] == "untrained" else len(rates(cell, grid, options)) + len(options.seeds) - 1


def missing(cell: Cell, grid: Grid, options: argparse.Namespace, done: Results) -> list[Run]:
    """The runs of a cell that can be done now: the rates with the first seed, one past an edge, then the best with the others."""
    if cell[1] == "untrained":
        return [run for run in [Run(*cell, None, options.seeds[0])] if run not in done]
    tried = [Run(*cell, lr, options.seeds[0]) for lr in rates(cell, grid, options)]
    open_ = [run for run in tried if run not in done]
    if open_:
        return open_
    best = results.best(tried, done)
    if grid.extend and not options.rates and best in (tried[0], tried[-1]) and len(tried) > 1:
        lr = best.lr / HALF_DECADE if best is tried[0] else best.lr * HALF_DECADE
        beyond = dataclasses.replace(best, lr=float(f"{lr:.1e}"))
        if beyond not in done:
            return [beyond]
        best = results.best([best, beyond], done)
    others = [dataclasses.replace(best, seed=seed) for seed in options.seeds[1:]]
    return [run for run in others if run not in done]


def rates(cell: Cell, grid: Grid, options: argparse.Namespace) -> list[float]:
    """The learning rates that a cell tries at first, rising."""
    tried = sorted(options.rates) if options.rates else grid.rates(*cell)
    return tried[1:3] if options.quick else tried


def plan_of(run: Run, grid: Grid, options: argparse.Namespace) -> TaskPlan:
    """The task of a run, on the device and shortened where asked."""
    plan = grid.tasks[run.task]
    own = grid.own_options.get((run.task, run.method), {})
    return dataclasses.replace(
        plan, options=plan.options | own | {"device": options.device} | options.set | (QUICK if options.quick else {})
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="?", choices=(*GRIDS, "chat", "own"), default="suite")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all of the grid")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: those that the grid plans for each task")
    parser.add_argument("--budgets", nargs="+", type=float, help="fractions of the targeted weights (default: as planned)")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to try instead of the grid's, none beyond them")
    parser.add_argument("--seeds", nargs="+", type=int, help="the first tries the rates (default: those of the grid)")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each (default 2)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default cpu)")
    parser.add_argument("--model", help="own, chat: a directory, or a name on the Hub")
    for part in ("train", "dev", "test"):
        parser.add_argument(f"--{part}", type=Path, help=f"own: {part} rows, a file as for sprand finetune")
    parser.add_argument("--old", type=Path, help="own: a text to measure forgetting on")
    parser.add_argument(
        "--set",
        nargs="+",
        type=_setting,
        default=[],
        metavar="FIELD=VALUE",
        help="larger or other: max_steps=2000 limit_train=50000 dtype=bfloat16, fields as of sprand finetune; needs --name",
    )
    parser.add_argument("--name", help="of the CSV and its table (default: the grid)")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/ and models/")
    parser.add_argument("--masks", type=Path, help="folder for chosen masks (default: runs/GRID_masks)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="run nothing: draw table and figures of the runs that are there")
    parser.add_argument("--quick", action="store_true", help="a few steps at two rates: does it run at all?")
    options = parser.parse_args(argv)
    options.set, options.name = dict(options.set), options.name or options.grid
    if options.set and options.name in GRIDS:
        parser.error("--set: give a --name, so that runs of another size do not stand among those of the grid")
    options.found = grid = GRIDS[options.grid] if options.grid in GRIDS else KINDS[options.grid](options, parser)
    for name, known in {
        "tasks": tuple(grid.tasks),
        "methods": grid.methods,
        "budgets": tuple(dict.fromkeys(budget for _, budget in grid.blocks)),
    }.items():
        unknown = [value for value in getattr(options, name) or () if value not in known]
        if unknown:
            parser.error(f"--{name}: expected some of {', '.join(map(str, known))}, got {unknown[0]}")
    options.tasks = options.tasks or list(grid.tasks)
    options.seeds = options.seeds or list(grid.seeds)
    if options.grid in GRIDS and not (options.shared / "data").is_dir() and not options.tables:
        parser.error(f"expected a folder with data/ and models/ at {options.shared}; give --shared")
    options.masks = options.masks or ROOT / "runs" / f"{options.name}_masks"
    return options


def _own(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Grid:
    from transformers import AutoModel

    absent = [name for name in ("model", "train", "dev", "test") if getattr(options, name) is None]
    if absent:
        parser.error(f"own: give --{absent[0]}")
    files = [str(getattr(options, name).resolve()) for name in ("train", "dev", "test")]
    plan = TaskPlan(options.model, *files, {}, old=str(options.old.resolve()) if options.old else None)
    model = sprand.apply(AutoModel.from_pretrained(options.model), density=0.01)
    return own(plan, width_of(model), root_mean_square(active_sites(model), {}))


def _chat(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Grid:
    if options.model is None or not (Path(options.model) / "chat_template.jinja").is_file():
        parser.error(
            f"chat: expected --model with the folder of a language model that has a chat template, got {options.model}; "
            f"`python {options.shared}/models/smollm2/make.py FOLDER` makes one (its README says what it needs)"
        )
    folder = ROOT / "runs" / "reasoning"
    grid = chat(Path(options.model), options.shared / "data", folder)
    for task in options.tasks or grid.tasks:
        if task in grid.tasks and not Path(grid.tasks[task].train).is_file():
            write_reasoning(task, folder / task)
    return grid


KINDS = {"own": _own, "chat": _chat}


def _setting(text: str) -> tuple[str, object]:
    """A field of `Settings` and its value."""
    name, _, value = text.partition("=")
    fields = {field.name: str(field.type) for field in dataclasses.fields(Settings)}
    if name not in fields:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE with a field of sprand finetune, got {text!r}")
    kind = next((kind for kind in (int, float) if kind.__name__ in fields[name]), str)
    return name, kind(value)


if __name__ == "__main__":
    raise SystemExit(main())
