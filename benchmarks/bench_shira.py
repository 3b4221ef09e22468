"""PEFT's SHiRA and Super-Tuning before and after `sprand.peft.accelerate`: time and memory of a training step."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import bench_train_step
from bench_train_step import MEMORY_COLUMNS, MEMORY_TABLE, TIME_COLUMNS, TIME_TABLE, memory_row
from methods import DTYPES, ON_PEFT, expand
from report import RESULTS, Row, command_line, progress, write_csv, write_markdown
from report import markdown as table
from rounds import Setting, identity, time_methods


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    rows: list[Row] = []
    sections: list[tuple[str, str]] = []
    for dtype in options.dtypes:
        timed(options, dtype, rows, sections)
    for dtype in options.dtypes:
        weighed(options, dtype, rows, sections)
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    write_csv(options.out / "shira.csv", rows, tuple(dict.fromkeys((*TIME_COLUMNS, *MEMORY_COLUMNS))))
    write_markdown(options.out / "shira.md", "SHiRA and Super-Tuning, before and after sprand.peft.accelerate", command, sections)
    return 0


def timed(options: argparse.Namespace, dtype: str, rows: list[Row], sections: list[tuple[str, str]]) -> None:
    """One step of each method in turn, on one model, in one process."""
    total = len(options.methods) * (options.warmup + options.repeats)
    with progress(total, "time") as bar:
        setting = Setting(options.width, options.layers, dtype, options.tokens)
        here = time_methods(setting, expand(options.methods, options.densities, dtype), options.repeats, options.warmup, bar)
    rows += here
    heading = f"Time: {options.width} wide, {options.layers} layers, {dtype}, {options.tokens} tokens: {options.repeats} rounds"
    sections.append((heading, table(here, TIME_TABLE)))


def weighed(options: argparse.Namespace, dtype: str, rows: list[Row], sections: list[tuple[str, str]]) -> None:
    """Peak memory of each method, in processes of its own."""
    here: list[dict[str, object]] = []
    with progress(len(options.methods), "memory") as bar:
        for method in expand(options.methods, options.densities, dtype):
            sizes = {"width": options.width, "layers": options.layers, "dtype": dtype, "tokens": options.memory_tokens}
            case = bench_train_step.Case(method.key, **sizes, checkpointing=False, steps=options.memory_steps)
            found = bench_train_step.measure(case, options.memory_repeats)
            facts = {**sizes, "checkpointing": 0, "repeats": options.memory_repeats}
            here.append({**facts, **identity(method), **memory_row(found, here)})
            bar.advance()
    rows += here
    heading = f"Memory: {options.width} wide, {options.layers} layers, {dtype}, {options.memory_tokens} tokens"
    sections.append((heading, table(here, MEMORY_TABLE)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=ON_PEFT, default=list(ON_PEFT))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp32"])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=12, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that do not")
    parser.add_argument("--memory-tokens", type=int, default=256)
    parser.add_argument("--memory-steps", type=int, default=3)
    parser.add_argument("--memory-repeats", type=int, default=3, help="fresh processes per method")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: does it run at all?")
    options = parser.parse_args(argv)
    options.densities = []
    if options.quick:
        options.width, options.layers, options.tokens, options.memory_tokens = 64, 1, 64, 64
        options.repeats, options.warmup, options.memory_steps, options.memory_repeats = 2, 1, 2, 1
    if min(options.repeats, options.memory_repeats, options.tokens) < 1 or options.warmup < 0:
        parser.error("expected at least one repeat and one token")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
