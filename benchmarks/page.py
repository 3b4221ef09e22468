"""Writes docs/benchmarks.md from the CSVs, figures and head lines under benchmarks/results; where sprand loses comes first."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import losses
from losses import Compare, Verdict
from report import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "benchmarks.md"
SHOWN = 12
HEAD = """# Benchmarks

Made by `python benchmarks/page.py` from [benchmarks/results](../benchmarks/results/README.md); not edited by hand. What each
script does, and how to read its numbers: [benchmarks/README.md](../benchmarks/README.md).
"""
FIRST = """## Where sprand loses

Every comparison in the CSVs that another method wins, counted; the sections below list them.
"""
CI = """## What CI holds

`python benchmarks/cost/regression.py` fails when a small step of sprand, over the frozen one, takes 15 % more than:
"""
FLOOR = "the frozen model's forward and input-gradient backward, the floor of any method"


@dataclass(frozen=True)
class Result:
    """One CSV of the results, by the stem that its `.md` and `.png` share.

    Attributes:
        stem: of its files.
        title: of its section.
        says: what is measured, in a sentence.
        compare: the comparisons that can be lost, each with the stem of the CSV it reads.
    """

    stem: str
    title: str
    says: str
    compare: tuple[tuple[Compare, str], ...] = ()

    def is_in(self, folder: Path) -> bool:
        return any((folder / f"{self.stem}.{kind}").exists() for kind in ("csv", "md"))

    def verdicts(self, folder: Path) -> list[Verdict]:
        return [compare(folder / f"{stem}.csv") for compare, stem in self.compare]


SECTIONS = (
    Result(
        "train_step", "A training step", f"Time of each method's step over {FLOOR}, at equal counts.",
        ((losses.training_step, "train_step"),),
    ),
    Result(
        "cost_growth", "How a step grows", f"Milliseconds of a step along each axis; dashed: {FLOOR}.",
        ((losses.growth, "cost_growth"),),
    ),
    Result("memory", "Memory", "Peak memory of a training step above the frozen model's.", ((losses.peak, "memory"),)),
    Result("cost_life", "Set-up, files, merging", "What an adapter costs beside its steps.", ((losses.life, "cost_life"),)),
    Result("ops", "Operators", "Each operator of the CPU against plain PyTorch.", ((losses.operators, "ops"),)),
    Result("instructions", "Instructions", "Counted by callgrind: no clock, and nearly the same each time."),
    Result("selection", "Choosing entries", "Time and memory of each way, over one pass through the same data."),
    Result("merge", "Merging into files", "Against a plain copy of the files.", ((losses.merging, "merge"),)),
    Result("switch", "Switching adapters", "Two adapters of a live model, back and forth.", ((losses.switching, "switch"),)),
    Result("shira", "SHiRA and Super-Tuning, accelerated", "PEFT's own methods before and after `sprand.peft.accelerate`."),
    Result("wire", "Between ranks", "Bytes of every collective of a step; nothing is timed."),
    Result("combine", "Merging adapters of three tasks", "Accuracy of one merged adapter on each task."),
    Result(
        "first_look", "Quality, a first look", "Every strategy beside LoRA and all weights.", ((losses.quality, "first_look"),),
    ),
    Result("suite", "Quality", "Every method at equal counts, and what it forgets.", ((losses.quality, "suite"),)),
    Result("learning_rate", "Learning rates", "The law behind the default rate."),
    Result(
        "long_run", "Long runs", "Memory, numbers, untouched weights, and density 1 beside dense AdamW.",
        ((losses.long_run, "long_run_checks"),),
    ),
)  # fmt: skip
GPU_SECTIONS = (
    Result(
        "step", "a training step", f"Two blocks of the shape of Llama 8B in bf16, over {FLOOR}.",
        ((losses.gpu_step, "step"), (losses.predicted, "step")),
    ),
    Result("ops", "operators", "Against cuBLAS and PyTorch.", ((losses.gpu_operators, "ops"),)),
    Result(
        "choice", "the choice between kernels",
        "Made anew from the times above, with costs fitted to a few of them: what it gives away against the fastest kernel.",
    ),
    Result("switch", "switching adapters", "Two adapters of a live model, back and forth.", ((losses.switching, "switch"),)),
    Result("selection", "choosing entries", "Time and memory of each way, over one pass through the same data."),
)  # fmt: skip


def render(results: Path, page: Path) -> str:
    """The page.

    Args:
        results: the folder of the CSVs; `gpu-*` in it are those of GPUs.
        page: where it will stand, for the links.

    Raises:
        FileNotFoundError: there are no results, or a CSV without the `.md` that names its command and machine.
    """
    found = [(result, results, result.title) for result in SECTIONS if result.is_in(results)]
    for folder in sorted(results.glob("gpu-*")):
        found += [(result, folder, f"{folder.name}: {result.title}") for result in GPU_SECTIONS if result.is_in(folder)]
    if not found:
        raise FileNotFoundError(f"{results}: expected the results of a benchmark, got none; benchmarks/README.md names them")
    behind, parts = [], []
    for result, folder, title in found:
        verdicts = result.verdicts(folder)
        behind += [summed_up(title, verdict) for verdict in verdicts if verdict.compared]
        parts.append(section(result, folder, title, verdicts, page))
    first = [HEAD, FIRST, "\n".join(behind) + "\n"]
    return "\n".join([*first, *regression(results / "regression.json"), *parts])


def summed_up(title: str, verdict: Verdict) -> str:
    count = len(verdict.lost) or "none"
    return f"- [{title}](#{anchor(title)}): {verdict.what}: **{count} of {verdict.compared}**"


def section(result: Result, folder: Path, title: str, verdicts: Sequence[Verdict], page: Path) -> str:
    """What was measured, what was lost, the figures, and the command and machine."""
    command, facts = heading(folder / f"{result.stem}.md")
    where = Path(os.path.relpath(folder, page.parent))
    lines = [f"## {title}", "", result.says, ""]
    for verdict in verdicts:
        lines += lost_lines(verdict)
    for figure in figures_of(result.stem, folder):
        lines += [f"![{title}]({(where / figure).as_posix()})", ""]
    names = [name for name in (f"{result.stem}.md", f"{result.stem}.csv") if (folder / name).exists()]
    files = ", ".join(f"[{name}]({(where / name).as_posix()})" for name in names)
    lines += [f"`{command}`", "", f"{'; '.join(facts)}.", "", f"All numbers: {files}.", ""]
    return "\n".join(lines)


def lost_lines(verdict: Verdict) -> list[str]:
    if not verdict.lost:
        return []
    shown, rest = verdict.lost[:SHOWN], verdict.lost[SHOWN:]
    lines = [f"Lost: {verdict.what}, {len(verdict.lost)} of {verdict.compared}.", "", *(f"- {line}" for line in shown), ""]
    if rest:
        lines += ["<details><summary>and the others</summary>", "", *(f"- {line}" for line in rest), "", "</details>", ""]
    return lines


def figures_of(stem: str, folder: Path) -> list[str]:
    """`STEM.png`, and those of a grid that draws several."""
    return sorted(path.name for path in folder.glob("*.png") if path.stem == stem or path.stem.startswith(f"{stem}_"))


def heading(file: Path) -> tuple[str, list[str]]:
    """The command of a result and its facts, from the head of its `.md`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it names no command.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected the command and machine of {file.stem}.csv; run its benchmark to the end")
    head = file.read_text(encoding="utf-8").partition("\n## ")[0]
    command = re.search(r"^`(.+)`$", head, re.MULTILINE)
    if command is None:
        raise ValueError(f"{file}: expected the command that made it, in backquotes on a line of its own")
    return command[1], [f"{name} {value}" for name, value in re.findall(r"^- ([^:\n]+): (.+)$", head, re.MULTILINE)]


def anchor(title: str) -> str:
    """The place of a heading, as GitHub and mkdocs name it."""
    return re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-")


def regression(file: Path) -> list[str]:
    """The ratios that every change is held against."""
    if not file.exists():
        return []
    kept = json.loads(file.read_text(encoding="utf-8"))
    rows = [f"- {where}: {one['ratio']:.3f} ({one['CPU']}, torch {one['torch']}, {one['date']})" for where, one in kept.items()]
    return [CI, "\n".join(rows) + "\n"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is not what the results make")
    options = parser.parse_args(argv)
    text = render(options.results, options.page)
    if not options.check:
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text(text, encoding="utf-8")
        print(f"{options.page}: {len(text.splitlines())} lines")
        return 0
    if not options.page.exists() or options.page.read_text(encoding="utf-8") != text:
        print(f"{options.page} is not what the results make: run python benchmarks/page.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
