"""Where a peer beats sprand, read from the CSVs of the results: what the results page says first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quality import results, tables
from report import Row, read_csv

PEERS = ("lora", "lora-bf16", "shira", "peft-sparta", "supertuning", "full")
Compare = Callable[[Path], "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """What comparing the rows of one CSV says.

    Attributes:
        what: is compared, as a clause: "a training step is shorter".
        lost: each comparison that a peer wins, with both numbers.
        compared: how many comparisons there are.
    """

    what: str
    lost: list[str]
    compared: int


def training_step(file: Path) -> Verdict:
    """Each peer against sprand with as many weights, in the same model."""
    keys = ("width", "layers", "dtype", "tokens")
    return less_is_better(file, keys, "ratio", "a peer's training step is shorter", "{:.3f} of the frozen step")


def peak(file: Path) -> Verdict:
    keys = ("width", "layers", "dtype", "tokens", "checkpointing")
    return less_is_better(file, keys, "above_mib", "a peer needs less memory", "{:.1f} MiB above the frozen model's peak")


def growth(file: Path) -> Verdict:
    return less_is_better(file, ("axis", "x"), "seconds", "a peer's training step is shorter", "{:.4f} s")


def less_is_better(file: Path, keys: Sequence[str], quantity: str, what: str, shown: str) -> Verdict:
    """Each peer against sprand where `keys` are equal: lost is what has less of a quantity, shown by a format."""
    lost, compared = [], 0
    for ours, theirs, place in pairs(read_csv(file), keys, quantity):
        compared += 1
        if theirs[quantity] < ours[quantity]:
            mine, other = (f"{row['label']} {shown.format(row[quantity])}" for row in (ours, theirs))
            lost.append(f"{place}: {other}, {mine}")
    return Verdict(what, lost, compared)


def life(file: Path) -> Verdict:
    lost, compared = [], 0
    for quantity, name, scale in (
        ("set_up", "set-up, ms", 1e3),
        ("merge", "merging, ms", 1e3),
        ("bytes_per_weight", "bytes per weight", 1),
    ):
        for ours, theirs, place in pairs(read_csv(file), ("unit",), quantity):
            if theirs["method"] == "full":
                continue
            compared += 1
            if theirs[quantity] < ours[quantity]:
                mine, other = (f"{row['label']} {scale * row[quantity]:.3g}" for row in (ours, theirs))
                lost.append(f"{place}, {name}: {other}, {mine}")
    return Verdict("a peer is set up or merged sooner, or takes fewer bytes on disk", lost, compared)


def pairs(rows: Sequence[Row], keys: Sequence[str], value: str):
    """Ours, theirs, and their common place, for every peer that stands beside sprand at its density (full AdamW: at 1 %)."""
    rows = [row for row in rows if row.get(value) is not None]
    for theirs in rows:
        name = str(theirs["method"]).partition("@")[0]
        if name not in PEERS:
            continue
        density = 0.01 if name == "full" else theirs["density"]
        for ours in rows:
            same = all(ours[key] == theirs[key] for key in keys)
            if same and str(ours["method"]).startswith("sprand@") and ours["density"] == density:
                yield ours, theirs, ", ".join(f"{key} {theirs[key]}" for key in keys)


def operators(file: Path) -> Verdict:
    """Against the fastest way of plain PyTorch."""
    rows = [row for row in read_csv(file) if row.get("speedup") is not None]
    lost = [f"{problem(row)}: {row['speedup']:.2f} times as fast" for row in rows if row["speedup"] < 1]
    return Verdict("plain PyTorch is faster", lost, len(rows))


def problem(row: Row) -> str:
    """An operator's problem, in words."""
    size = f"{row['out']}x{row['in']}" if row.get("out") else f"{row['nnz']:,} entries"
    tokens = f"{row['tokens']} tokens" if row.get("tokens") else None
    facts = (row["op"], row.get("layout"), size, f"{100 * row['density']:g} %", row["dtype"], tokens)
    return ", ".join(str(fact) for fact in facts if fact)


def gpu_operators(file: Path) -> Verdict:
    """Each operator as sprand runs it against the fastest other contestant on its problem; one product serves all layouts."""
    rows = [row for row in read_csv(file) if row.get("us") is not None and row["op"] != "cuBLAS"]
    keys = ("op", "out", "in", "tokens", "dtype", "density", "targets")
    lost, compared = [], 0
    for ours in rows:
        if ours["contestant"] != "sprand":  # a kernel by name is not what a user gets
            continue
        others = [r for r in rows if all(r[k] == ours[k] for k in keys) and not str(r["contestant"]).startswith("sprand")]
        if not others:
            continue
        compared += 1
        best = min(others, key=lambda row: row["us"])
        if best["us"] < ours["us"]:
            lost.append(f"{problem(ours)}: {best['contestant']} {best['us']:.1f} us, sprand {ours['us']:.1f} us")
    return Verdict("another way is faster", lost, compared)


def gpu_step(file: Path) -> Verdict:
    """Every density and layout of sprand against every peer at the same tokens."""
    rows = [row for row in read_csv(file) if row.get("ratio") is not None]
    lost, compared = [], 0
    for ours in (row for row in rows if row["method"] == "sprand"):
        for theirs in rows:
            if theirs["method"] in ("sprand", "frozen") or (theirs["tokens"], theirs["layers"]) != (
                ours["tokens"],
                ours["layers"],
            ):
                continue
            compared += 1
            if theirs["ratio"] < ours["ratio"]:
                numbers = f"{theirs['label']} {theirs['ratio']:.3f} of the frozen step, {ours['label']} {ours['ratio']:.3f}"
                lost.append(f"{ours['tokens']} tokens: {numbers}")
    return Verdict("a peer's training step is shorter", lost, compared)


def predicted(file: Path) -> Verdict:
    """The step against what the cost model promised before."""
    rows = [row for row in read_csv(file) if row["method"] == "sprand" and None not in (row["ratio"], row["predicted_ratio"])]
    lost = [
        f"{row['tokens']} tokens: {row['label']} {row['ratio']:.3f} of the frozen step, predicted {row['predicted_ratio']:.3f}"
        for row in rows
        if row["ratio"] > row["predicted_ratio"]
    ]
    return Verdict("the step is longer than predicted before it was measured", lost, len(rows))


def switching(file: Path) -> Verdict:
    rows = [row for row in read_csv(file) if row.get("ratio") is not None and row["method"] in ("lora", "lora-unmerged", "shira")]
    lost = [
        f"{row['dtype']}, {row['width']} wide: {row['label']} takes {row['ratio']:.2f} of the pool's time"
        for row in rows
        if row["ratio"] < 1
    ]
    return Verdict("a peer switches sooner than the pool", lost, len(rows))


def merging(file: Path) -> Verdict:
    """The aim is a time within 1.3 times that of a plain copy."""
    rows = [row for row in read_csv(file) if row["method"] == "sprand merge"]
    lost = [f"{row['bytes'] / 1e9:.2f} GB: {row['ratio']:.2f} times a plain copy" for row in rows if row["ratio"] > 1.3]
    return Verdict("merging takes more than 1.3 times a plain copy of the files, which was the aim", lost, len(rows))


def quality(file: Path) -> Verdict:
    """Random entries against each peer at the same budget, and against all weights: means over the seeds of the best rates."""
    summary = tables.summarize(results.read(file), results.read_rows(file))
    lost, compared = [], 0
    for ours in (row for row in summary if row["method"] == "random"):
        for theirs in summary:
            if theirs["task"] != ours["task"] or theirs["method"] not in ("lora", "shira", "sparta", "peft-sparta", "full"):
                continue
            if theirs["budget"] not in (ours["budget"], None):
                continue
            compared += 1
            higher = ours["metric"] == "accuracy"
            if (theirs["test"] > ours["test"]) == higher and theirs["test"] != ours["test"]:
                spread = [f" ± {row['sd']:.2g}" if row["sd"] else "" for row in (theirs, ours)]
                numbers = f"{theirs['method']} {theirs['test']:.4g}{spread[0]}, random entries {ours['test']:.4g}{spread[1]}"
                lost.append(f"{ours['task']}, {ours['metric']}, {100 * ours['budget']:g} %: {numbers}")
    return Verdict("a peer is better than random entries", lost, compared)


def long_run(file: Path) -> Verdict:
    rows = read_csv(file)
    lost = [
        f"{row['run']}: {row['check']}: expected {row['expected']}, got {row['got']}" for row in rows if row["passed"] != "yes"
    ]
    return Verdict("a check failed", lost, len(rows))
