"""What every method costs: growth curves, set-up, files and merging, instructions, steps, memory, switching; one part or all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench_switch
import bench_train_step
from cost import figures, growth, instructions, life
from report import RESULTS, Row, command_line, machine, progress, read_csv, write_csv, write_markdown
from report import markdown as table

PARTS = ("growth", "life", "instructions", "memory", "switch", "step")


@dataclass(frozen=True)
class Kept:
    """The rows of one CSV, each with the unit it belongs to and the machine it is from.

    A unit is written when all of it is measured, so a run that is stopped goes on with the unit it was in.
    """

    file: Path
    columns: Sequence[str]
    machine: str

    def rows(self) -> list[dict[str, object]]:
        """All rows so far.

        Raises:
            SystemExit: they are of another machine, or have other columns.
        """
        if not self.file.exists():
            return []
        rows = read_csv(self.file)
        others = {str(row.get("machine")) for row in rows} - {self.machine}
        if others or (rows and list(rows[0]) != list(self.columns)):
            what = f"rows of {', '.join(sorted(others))}" if others else "other columns"
            raise SystemExit(
                f"{self.file}: expected rows of {self.machine}, got {what}; measure anew with --again, or choose another --out"
            )
        return rows

    def add(self, rows: Sequence[Row]) -> None:
        write_csv(self.file, [*self.rows(), *({**row, "machine": self.machine} for row in rows)], self.columns)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    arguments = sys.argv[1:] if argv is None else argv
    for part in options.parts:
        PARTS_BY_NAME[part](options, arguments)
    return 0


def measured(
    name: str, module: ModuleType, units: Sequence[growth.Point | life.Size], options: argparse.Namespace
) -> tuple[list[dict[str, object]], list[str]]:
    """Every unit that is not in the CSV yet, then all rows, and the units in their order."""
    facts = machine()
    kept = Kept(options.out / f"cost_{name}.csv", module.COLUMNS, f"{facts['CPU']}, {facts['threads']} threads")
    if options.again:
        kept.file.unlink(missing_ok=True)
    done = {row["unit"] for row in kept.rows()}
    wanted = [unit for unit in units if unit.unit not in done]
    rounds = options.repeats + options.warmup
    with progress(sum(rounds * len(unit.methods) for unit in wanted), name) as bar:
        for unit in wanted:
            bar.say(unit.unit)
            kept.add(unit.measure(options.repeats, options.warmup, bar))
    return kept.rows(), [unit.unit for unit in units]


def report_growth(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    rows, _ = measured("growth", growth, growth.points(options.quick), options)
    sections = []
    for axis, title in growth.TITLES.items():
        here = [growth.shown(row) for row in rows if row["axis"] == axis]
        fixed = {name: {row[name] for row in here} for name in ("width", "layers", "tokens", "length")}
        same = ", ".join(f"{name} {values.pop()}" for name, values in fixed.items() if len(values) == 1)
        sections.append((f"{title} ({same})", table(here, {**growth.TABLE, "x": (title, "g")})))
    command = command_line(__file__, arguments)
    write_markdown(options.out / "cost_growth.md", "How the cost of a training step grows", command, sections)
    figures.growth(rows, options.out / "cost_growth.png")


def report_life(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    rows, units = measured("life", life, life.sizes(options.quick), options)
    sections = [(unit, table([life.shown(row) for row in rows if row["unit"] == unit], life.TABLE)) for unit in units]
    command = command_line(__file__, arguments)
    write_markdown(options.out / "cost_life.md", "Set-up, files and merging", command, sections)
    figures.life(rows, options.out / "cost_life.png")


def run_script(main: Callable[[Sequence[str]], int], *own: str) -> Callable[[argparse.Namespace, Sequence[str]], None]:
    """A benchmark with a script of its own, whose results name that script's command."""

    def part(options: argparse.Namespace, arguments: Sequence[str]) -> None:
        main([*own, *(["--quick"] if options.quick else []), "--out", str(options.out)])

    return part


PARTS_BY_NAME: dict[str, Callable[[argparse.Namespace, Sequence[str]], None]] = {
    "growth": report_growth,
    "life": report_life,
    "instructions": run_script(instructions.main),
    "memory": run_script(
        bench_train_step.main, "--parts", "memory", "--dtypes", "fp32", "--checkpointing", "0", "--memory-repeats", "1"
    ),
    "switch": run_script(bench_switch.main, "--repeats", "5"),
    "step": run_script(bench_train_step.main, "--parts", "time", "--repeats", "12"),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count, of growth and life")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not")
    parser.add_argument("--again", action="store_true", help="measure growth and life anew, also what stands in their CSVs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="tiny models and one round: does it run at all?")
    options = parser.parse_args(argv)
    if options.quick:
        options.repeats, options.warmup = 1, 1
    if options.repeats < 1 or options.warmup < 0:
        parser.error("expected at least one round")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
