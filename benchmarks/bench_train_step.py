"""The whole training step of each method: seconds, ratio to the frozen model, and peak memory above it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import plots
from methods import DTYPES, METHODS, PEER_DENSITY, expand
from peak_memory import CATEGORIES, MIB, Case, measure
from report import RESULTS, Row, command_line, progress, write_csv, write_markdown
from report import markdown as table
from rounds import Setting, identity, time_methods

TIME_COLUMNS = (
    "width", "layers", "dtype", "tokens", "method", "label", "density", "trained", "seconds", "seconds_p20", "seconds_p80",
    "ratio", "ratio_p20", "ratio_p80", "forward", "backward", "optimizer", "loss_first", "loss_last", "repeats", "note",
)  # fmt: skip
MEMORY_COLUMNS = (
    "width", "layers", "dtype", "tokens", "checkpointing", "method", "label", "density", "trained", "peak_mib", "above_mib",
    "saved_above_mib", "state_mib", *(f"{name}_mib" for name in CATEGORIES), "bytes_per_weight",
    "own_bytes_per_weight", "repeats",
    "note",
)  # fmt: skip
TIME_TABLE = {
    "label": ("method", ""), "trained": ("trained weights", ",d"), "seconds": ("seconds", ".4f"), "seconds_p20": ("p20", ".4f"),
    "seconds_p80": ("p80", ".4f"), "ratio": ("ratio to frozen", ".3f"), "forward": ("forward", ".4f"),
    "backward": ("backward", ".4f"), "optimizer": ("optimizer", ".4f"), "note": ("", ""),
}  # fmt: skip
MEMORY_TABLE = {
    "label": ("method", ""), "trained": ("trained weights", ",d"), "peak_mib": ("peak, MiB", ".1f"),
    "above_mib": ("above frozen, MiB", ".1f"), "saved_above_mib": ("saved activations, MiB", ".1f"),
    "state_mib": ("state, MiB", ".1f"), **{f"{name}_mib": (name, ".1f") for name in CATEGORIES},
    "bytes_per_weight": ("bytes per trained weight", ".1f"),
    "own_bytes_per_weight": ("without saved activations", ".1f"), "note": ("", ""),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    if "time" in options.parts:
        report_times(options, command)
    if "memory" in options.parts:
        report_memory(options, command)
    return 0


def report_times(options: argparse.Namespace, command: str) -> None:
    """Time all widths and dtypes, then write train_step.csv, .md and .png."""
    cases = [(width, dtype) for dtype in options.dtypes for width in options.widths]
    rounds = options.repeats + options.warmup
    total = sum(len(expand(options.methods, options.densities, dtype)) * rounds for _, dtype in cases)
    rows: list[Row] = []
    sections = []
    with progress(total, "train step") as bar:
        for width, dtype in cases:
            bar.say(f"{width} wide, {dtype}: {rounds} rounds")
            setting = Setting(width, options.layers, dtype, options.tokens)
            methods = expand(options.methods, options.densities, dtype)
            with torch.backends.mkldnn.flags(enabled=not options.no_mkldnn):
                here = time_methods(setting, methods, options.repeats, options.warmup, bar)
            rows += here
            heading = f"{width} wide, {options.layers} layers, {dtype}, {options.tokens} tokens: {options.repeats} rounds"
            sections.append((heading, table(here, TIME_TABLE)))
    write_csv(options.out / "train_step.csv", rows, TIME_COLUMNS)
    write_markdown(options.out / "train_step.md", "Training step: time", command, sections)
    plots.time_ratios(rows, options.out / "train_step.png")


def report_memory(options: argparse.Namespace, command: str) -> None:
    """Measure memory with and without activation checkpointing, then write memory.csv, .md and .png."""
    width, layers, repeats = options.memory_width, options.memory_layers, options.memory_repeats
    settings = [(d, t, c) for d in options.dtypes for t in options.memory_tokens for c in options.checkpointing]
    total = sum(len(expand(options.methods, options.densities, dtype)) for dtype, _, _ in settings)
    rows: list[Row] = []
    sections = []
    with progress(total, "memory") as bar:
        for dtype, tokens, checkpointing in settings:
            heading = f"{width} wide, {layers} layers, {dtype}, {tokens} tokens" + (", checkpointing" if checkpointing else "")
            bar.say(heading)
            here: list[dict[str, object]] = []
            for method in expand(options.methods, options.densities, dtype):
                case = Case(method.key, width, layers, dtype, tokens, checkpointing, options.memory_steps)
                found = measure(case, repeats)
                facts = {"width": width, "layers": layers, "dtype": dtype, "tokens": tokens, "checkpointing": int(checkpointing)}
                here.append({**facts, **identity(method), "repeats": repeats, **memory_row(found, here)})
                bar.advance()
            rows += here
            sections.append((heading, table(here, MEMORY_TABLE)))
    write_csv(options.out / "memory.csv", rows, MEMORY_COLUMNS)
    write_markdown(options.out / "memory.md", "Training step: peak memory above the loaded model", command, sections)
    plots.memory(rows, options.out / "memory.png")


def memory_row(found: dict[str, object], before: Sequence[Row]) -> dict[str, object]:
    """What one measurement says, against the frozen model's row in `before` (or itself, where it is the first)."""
    if "reason" in found:
        return {"note": found["reason"]}
    row = {"trained": found["trained"], "peak_mib": found["peak"] / MIB, "state_mib": found["state"] / MIB}
    row |= {f"{name}_mib": found[name] / MIB for name in CATEGORIES}
    saved = found["saved"]
    row["_saved"] = saved
    floor = next((r for r in before if r["method"] == "frozen" and "peak_mib" in r), None)
    if floor is None:
        return row
    row["above_mib"] = row["peak_mib"] - floor["peak_mib"]
    row["saved_above_mib"] = None if saved is None else (saved - floor["_saved"]) / MIB
    if found["trained"]:
        row["bytes_per_weight"] = row["above_mib"] * MIB / found["trained"]
        if saved is not None:
            row["own_bytes_per_weight"] = (row["above_mib"] - row["saved_above_mib"]) * MIB / found["trained"]
    return row


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("time", "memory"), default=["time", "memory"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.001, 0.01, 0.05], help="of sprand; peers: 1 %%")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--widths", nargs="+", type=int, default=[384, 768, 1024])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=20, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that do not")
    parser.add_argument("--no-mkldnn", action="store_true", help="time as on a CPU without instructions for 16 bits")
    parser.add_argument("--memory-width", type=int, default=1024)
    parser.add_argument("--memory-layers", type=int, default=4)
    parser.add_argument("--memory-tokens", nargs="+", type=int, default=[256, 2048])
    parser.add_argument("--memory-steps", type=int, default=3)
    parser.add_argument("--memory-repeats", type=int, default=3, help="fresh processes per method")
    parser.add_argument("--checkpointing", nargs="+", type=int, choices=(0, 1), default=[0, 1], help="settings to measure")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: does it run at all?")
    options = parser.parse_args(argv)
    if options.quick:
        options.widths, options.tokens, options.layers, options.densities = [128], 64, 1, [PEER_DENSITY]
        options.repeats, options.warmup, options.dtypes = 2, 1, ["fp32"]
        options.memory_width, options.memory_layers, options.memory_tokens = 128, 1, [64]
        options.memory_steps, options.memory_repeats, options.checkpointing = 2, 1, [0]
    if min(options.repeats, options.memory_repeats, options.tokens) < 1 or options.warmup < 0:
        parser.error("expected at least one repeat and one token")
    if not all(0 < density <= 1 for density in options.densities):
        parser.error(f"expected densities in (0, 1], got {options.densities}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
