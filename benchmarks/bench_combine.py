"""What merging costs: adapters of three tasks, each alone, and merged into one in every way, beside PEFT's LoRA. Resumable.

Each task keeps its own head. What was trained is kept, and what stands in the CSV is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from plots import panels
from quality.merging import Case, combinations, measure, train_all
from quality.training import TaskPlan
from report import RESULTS, command_line, markdown, one_thread, progress, write_csv, write_markdown

ROOT = Path(__file__).resolve().parents[1]
SIZE = {
    "limit_train": 640, "limit_eval": 400, "epochs": 1.0, "batch_size": 16, "max_length": 48, "calibration_examples": 128,
}  # fmt: skip
LONGER = {"limit_train": 1500, "epochs": 2.0, "batch_size": 32, "max_length": 64}  # pairs of sentences are learned later
TASKS = {
    name: TaskPlan(None, f"{name}/train.tsv", f"{name}/dev.tsv", f"{name}/test.tsv", SIZE | own)
    for name, own in (("sst2", {}), ("subj", {}), ("qnli_small", LONGER))
}
KINDS = {  # highest learning rates: those that were best on the dev rows of SST-2 in the first look, for all tasks
    "random": 5e-3, "disjoint": 5e-3, "gradient": 1.6e-3, "lora": 6.3e-3,
}  # fmt: skip
LABELS = {
    "random": "sprand random", "disjoint": "sprand random, disjoint", "gradient": "sprand gradient", "lora": "PEFT LoRA"
}  # fmt: skip
COLUMNS = ("kind", "seed", "combination", "task", "test", "trained", "shared")


@one_thread()
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    file = options.out / "combine.csv"
    rows = read(file)
    write_csv(file, rows, COLUMNS)
    done = {(row["kind"], row["seed"], row["combination"]) for row in rows}
    cases = [Case(kind, seed, options.budget, KINDS[kind]) for seed in options.seeds for kind in options.kinds]
    with progress(len(cases), "combine") as bar:
        for case in cases:
            ways = ["alone", *combinations(case.kind)]
            missing = [way for way in ways if (case.kind, case.seed, way) not in done]
            if missing:
                folders = train_all(case, options.plans, options.shared, options.kept)
                bar.say(f"{case.kind}, seed {case.seed}: trained")
            found = measure(case, options.plans, folders, options.shared, missing) if missing else ()
            for group in grouped(found, len(options.plans)):
                group = [{"kind": case.kind, "seed": case.seed} | line for line in group]
                rows += group
                append(file, group)
                mean = statistics.mean(line["test"] for line in group)
                bar.say(f"{case.kind}, seed {case.seed}, {group[0]['combination']}: {100 * mean:.1f}")
            bar.advance()
    write(rows, options.out, command_line(__file__, sys.argv[1:] if argv is None else argv))
    return 0


def grouped(lines: Iterator[dict[str, object]], size: int) -> Iterator[list[dict[str, object]]]:
    """Lines as they come, those of one combination together."""
    group = []
    for line in lines:
        group.append(line)
        if len(group) == size:
            yield group
            group = []


def summarize(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """A row per kind and combination: accuracy in percent, and points lost against each adapter alone, over tasks and seeds."""
    table = []
    for kind, combination in dict.fromkeys((row["kind"], row["combination"]) for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        here = [row for row in own if row["combination"] == combination]
        alone = {(row["seed"], row["task"]): row["test"] for row in own if row["combination"] == "alone"}
        drops = [100 * (alone[row["seed"], row["task"]] - row["test"]) for row in here]
        means = {task: 100 * statistics.mean(row["test"] for row in here if row["task"] == task) for task in TASKS}
        table.append(
            {
                "kind": LABELS[kind],
                "combination": combination,
                "trained": here[0]["trained"],
                "shared": None if here[0]["shared"] is None else 100 * statistics.mean(row["shared"] for row in here),
                **means,
                "mean": 100 * statistics.mean(row["test"] for row in here),
                "drop": None if combination == "alone" else statistics.mean(drops),
                "each": None if combination == "alone" else ", ".join(f"{value:.1f}" for value in by_seed(here, drops)),
            }
        )
    return table


def by_seed(rows: Sequence[dict[str, object]], values: Sequence[float]) -> list[float]:
    """The mean of the rows' values, for each seed."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    return [statistics.mean(value for row, value in zip(rows, values, strict=True) if row["seed"] == seed) for seed in seeds]


def write(rows: Sequence[dict[str, object]], out: Path, command: str) -> None:
    """Write combine.md and combine.png."""
    table = summarize(rows)
    columns = {
        "kind": ("adapters", ""), "combination": ("merged by", ""), "trained": ("trained weights, each", ",.0f"),
        "shared": ("entries in another as well, %", ".1f"), **{task: (task, ".1f") for task in TASKS},
        "mean": ("mean accuracy, %", ".1f"), "drop": ("points lost", ".1f"), "each": ("of each seed", ""),
    }  # fmt: skip
    heading = "Test accuracy of three tasks, each with its own head, mean of the seeds"
    write_markdown(out / "combine.md", "What merging adapters costs", command, [(heading, markdown(table, columns))])
    merged = [row for row in table if row["drop"] is not None]
    for panel, _ in panels(["points"], out / "combine.png"):
        labels = [f"{row['kind']}: {row['combination']}" for row in merged]
        colours = ["#b2182b" if row["kind"] == LABELS["lora"] else "#2166ac" for row in merged]
        panel.barh(range(len(merged)), [row["drop"] for row in merged], color=colours)
        panel.set_yticks(range(len(merged)), labels)
        panel.invert_yaxis()
        panel.set(xlabel="points of accuracy lost by merging three tasks", title="mean of three tasks and all seeds")
        panel.grid(axis="x", alpha=0.3)


def read(file: Path) -> list[dict[str, object]]:
    """The results so far, but for those of a combination that was not measured to its end."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        rows = [
            row | {"seed": int(row["seed"]), "test": float(row["test"]), "trained": int(row["trained"]),
                   "shared": float(row["shared"]) if row["shared"] else None}
            for row in csv.DictReader(lines)
        ]  # fmt: skip
    counts: dict[tuple[object, ...], int] = {}
    for row in rows:
        key = row["kind"], row["seed"], row["combination"]
        counts[key] = counts.get(key, 0) + 1
    return [row for row in rows if counts[row["kind"], row["seed"], row["combination"]] == len(TASKS)]


def append(file: Path, rows: Sequence[dict[str, object]]) -> None:
    """Add lines; a run that is stopped meanwhile loses these at most."""
    with file.open("a", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        for row in rows:
            writer.writerow(["" if row[c] is None else f"{row[c]:.6g}" if isinstance(row[c], float) else row[c] for c in COLUMNS])
        out.flush()
        os.fsync(out.fileno())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--budget", type=float, default=0.01, help="share of the targeted weights' entries (default 0.01)")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/")
    parser.add_argument("--kept", type=Path, default=ROOT / "runs" / "combine_adapters", help="folder for trained adapters")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run at all?")
    options = parser.parse_args(argv)
    if not (options.shared / "data").is_dir():
        parser.error(f"expected a folder with data/ at {options.shared}; give --shared")
    changes = {"max_steps": 2, "limit_train": 32, "limit_eval": 16, "calibration_examples": 16} if options.quick else {}
    options.plans = {name: dataclasses.replace(plan, options=plan.options | changes) for name, plan in TASKS.items()}
    return options


if __name__ == "__main__":
    raise SystemExit(main())
