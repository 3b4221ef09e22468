"""What the suite's runs say about the claims of SpaRTA and SPEFT: one page, each claim a table of differences with intervals."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plots import panels
from quality import paired, results, tables
from quality.grids import SUITE
from report import RESULTS, command_line, markdown

Summary = Mapping[str, object]
Line = dict[str, object]
PAGE = RESULTS.parents[1] / "docs" / "claims.md"
TABLE = {
    "task": ("task", ""), "amount": ("trained", ""), "name": ("method", ""), "test": ("test", ""), "reference": ("against", ""),
    "its": ("its test", ""), "difference": ("difference", ""), "says": ("", ""),
}  # fmt: skip


COLOURS = {"better": "#1b7837", "worse": "#b2182b", "": "#888888"}  # by what a line says


@dataclasses.dataclass(frozen=True)
class Claim:
    """A question, who claims what about it, and which methods are held against which other at the same count."""

    title: str
    text: str
    pairs: tuple[tuple[str, str], ...]


CLAIMS = (
    Claim(
        "Random entries or LoRA, at the same number of trained weights?",
        "SpaRTA (arXiv 2502.15975): a random part of the weights does about as well as LoRA with as many.",
        (("random", "lora"), ("uniform", "lora"), ("peft-sparta", "lora"), ("shira", "lora")),
    ),
    Claim(
        "Which layers?",
        "SpaRTA trains the value and output projections alone. Here that choice, and query and value (LoRA's first recipe), "
        "are held against the same number of random entries of all linear layers.",
        (("random-vo", "random"), ("random-qv", "random")),
    ),
    Claim(
        "A mask that stays, or one that moves?",
        "SPEFT (arXiv 2412.13488): moving the mask brings nothing. `regrow` exchanges a fifth of random entries for those with "
        "the largest gradients, eight times; `recompute` chooses the whole gradient mask anew, eight times, and what it leaves "
        "behind stays in the weights, so that in the end more weights differ from the base than train at a time.",
        (("regrow", "random"), ("recompute", "gradient"), ("regrow", "gradient")),
    ),
    Claim(
        "Chosen by gradients, or random?",
        "SPEFT: a plain gradient mask is as good as the best of the scores.",
        (("gradient", "random"), ("snip", "random"), ("snip", "gradient"), ("gradient", "lora")),
    ),
    Claim(
        "Runs, or single entries?",
        "`layout` made kernels cheaper by training short runs, until 0.1.0; what did that cost?",
        (("run2", "random"), ("run4", "random"), ("run8", "random")),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "suite.csv")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    done, rows = results.read(options.results), results.read_rows(options.results)
    if not done:
        parser.error(f"{options.results} holds no runs; python benchmarks/quality/suite.py makes them")
    summary = tables.summarize(done, rows)
    lines = {claim.title: compared_in(claim, summary) for claim in CLAIMS}
    options.page.write_text(page(summary, lines, command_line(__file__, [])), encoding="utf-8")
    draw(lines, options.results.with_name("claims.png"))
    print(f"{options.page}: {len(CLAIMS)} claims, {len(done)} runs")
    return 0


def cells_of(summary: Sequence[Summary]) -> list[tuple[str, float]]:
    """Task and budget of what was run with random entries, in the suite's order."""
    known = {(row["task"], row["budget"]) for row in summary if row["method"] == "random"}
    return [block for block in SUITE.blocks if block in known]


def compared_in(claim: Claim, summary: Sequence[Summary]) -> list[Line]:
    """The lines of a claim that have run."""
    known = {(row["task"], row["budget"], row["method"]): row for row in summary}
    lines = [compared(known, *cell, *pair) for cell in cells_of(summary) for pair in claim.pairs]
    return [line for line in lines if line is not None]


def page(summary: Sequence[Summary], lines: Mapping[str, Sequence[Line]], command: str) -> str:
    """The page, from the rows of `tables.summarize` and the lines of each claim."""
    cells = cells_of(summary)
    blocks = ", ".join(f"{task} at {100 * budget:g} %" for task, budget in cells)
    planned = len(SUITE.blocks)
    parts = [
        "# What the numbers say of the two papers' claims",
        f"Made by `{command}` from [suite.csv](../benchmarks/results/suite.csv), where every learning rate that was tried "
        "stands; the tables of all methods are in [suite.md](../benchmarks/results/suite.md). "
        f"Run so far: {blocks} ({len(cells)} of {planned} blocks of the suite).",
        "Each method has as many trained weights as its units allow, a learning rate of its own, chosen on dev rows among at "
        "least four, and three seeds. `test` is the mean and the standard deviation over seeds. A difference is the method minus "
        "the other, with the 95 % interval of a paired bootstrap over test rows and seeds, and in how many seeds the method was "
        "better. *Better* or *worse* is said only where the interval leaves out 0 and all seeds agree. Intervals are not "
        "corrected for the number of comparisons, and small models on small tasks say little about large ones.",
    ]
    if any(lines.values()):
        parts.append("![Every difference with its interval](../benchmarks/results/claims.png)")
    for claim in CLAIMS:
        here = lines[claim.title]
        body = markdown(here, TABLE) if here else "Not run yet.\n"
        parts.append(f"## {claim.title}\n\n{claim.text}\n\n{counted(here)}{body}".rstrip())
    return "\n\n".join(parts) + "\n"


def compared(known: Mapping[tuple, Summary], task: str, budget: float, method: str, reference: str) -> dict[str, object] | None:
    """A line of a table; None where one of them has not run to its end, with all rates and seeds."""
    ours, theirs = known.get((task, budget, method)), known.get((task, budget, reference))
    if ours is None or theirs is None or min(len(ours["tests"]), len(theirs["tests"])) < len(SUITE.seeds):
        return None
    metric = str(ours["metric"])
    found = paired.difference(ours["rows"], theirs["rows"], metric)
    if found is None:
        return None
    if metric == "accuracy":
        found = dataclasses.replace(found, mean=100 * found.mean, low=100 * found.low, high=100 * found.high)
    return {
        "task": task, "amount": f"{100 * budget:g} %", "name": method, "test": spread(ours), "reference": reference,
        "its": spread(theirs), "difference": str(found), "says": verdict(found, metric),
        "metric": metric, "found": found, "its mean": theirs["test"],
    }  # fmt: skip


def verdict(found: paired.Difference, metric: str) -> str:
    """*better*, *worse*, or nothing."""
    if found.low <= 0 <= found.high or found.better not in (0, found.seeds):
        return ""
    return "better" if (found.mean > 0) == (metric == "accuracy") else "worse"


def spread(row: Summary) -> str:
    """Mean and standard deviation over seeds; accuracies in percent."""
    percent = row["metric"] == "accuracy"
    mean, deviation = (None if value is None else value * (100 if percent else 1) for value in (row["test"], row["sd"]))
    text = f"{mean:.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")
    return text + (" %" if percent else "")


def counted(lines: Sequence[Mapping[str, object]]) -> str:
    """How often each method was better and worse than what it is held against."""
    pairs = dict.fromkeys((line["name"], line["reference"]) for line in lines)
    sentences = []
    for name, reference in pairs:
        here = [line["says"] for line in lines if (line["name"], line["reference"]) == (name, reference)]
        sentences.append(
            f"`{name}` against `{reference}`: better in {here.count('better')}, worse in {here.count('worse')}, "
            f"not told apart in {here.count('')} of {len(here)}."
        )
    return "\n".join(f"- {sentence}" for sentence in sentences) + "\n\n" if sentences else ""


def draw(lines: Mapping[str, Sequence[Line]], path: Path) -> None:
    """A row of panels per claim: perplexity, then accuracy; each pair of methods by rising budget, better to the right."""
    metrics = [metric for metric in ("perplexity", "accuracy") if any(line["metric"] == metric for line in _flat(lines))]
    claims = [title for title, here in lines.items() if here]
    names = [f"{title}|{metric}" for title in claims for metric in metrics]
    heights = [max(len([line for line in lines[title] if line["metric"] == metric]) for metric in metrics) for title in claims]
    for panel, name in panels(names, path, across=len(metrics) or 1):
        title, _, metric = name.partition("|")
        here = sorted((line for line in lines[title] if line["metric"] == metric), key=_order(lines[title]))
        _forest(panel, here, title if metric == metrics[0] else "", metric)
        if name == names[-1]:
            panel.figure.set_size_inches(6.5 * len(metrics), 0.17 * sum(heights) + 0.8 * len(claims) + 0.4)
            panel.get_gridspec().set_height_ratios([height + 3 for height in heights])
            for says, colour in COLOURS.items():
                panel.plot([], [], "o-", color=colour, label=says or "not told apart")
            panel.figure.legend(loc="outside lower left", ncols=len(COLOURS), frameon=False, fontsize=9)


def _forest(panel, here: Sequence[Line], title: str, metric: str) -> None:
    panel.set_title(title, loc="left", fontsize=10, weight="bold")
    if not here:
        panel.axis("off")
        return
    for y, line in enumerate(here):
        # Of perplexities the share of the other's with its sign turned: better is to the right, and small budgets dwarf no other.
        scale = 1 if metric == "accuracy" else -100 / line["its mean"]
        found = line["found"]
        colour = COLOURS[str(line["says"])]
        panel.plot([scale * found.low, scale * found.high], [y, y], "-", color=colour, linewidth=2)
        panel.plot(scale * found.mean, y, "o", color=colour, markersize=4)
    panel.axvline(0, color="black", linewidth=1)
    for y, (one, two) in enumerate(itertools.pairwise(here)):
        if (one["name"], one["reference"]) != (two["name"], two["reference"]):
            panel.axhline(y + 0.5, color="#cccccc", linewidth=0.6)
    names = [f"{line['name']} - {line['reference']}, {line['task']} {line['amount']}" for line in here]
    panel.set_yticks(range(len(here)), names)
    panel.tick_params(axis="y", labelsize=7)
    panel.set_ylim(len(here) - 0.4, -0.6)
    panel.set_xlabel("points of accuracy" if metric == "accuracy" else "perplexity lower by, %", fontsize=8)
    panel.grid(axis="x", alpha=0.3)


def _order(lines: Sequence[Line]) -> Callable[[Line], tuple]:
    """By pair as the claim names them, then by task, then by budget."""
    pairs = list(dict.fromkeys((line["name"], line["reference"]) for line in lines))
    tasks = list(dict.fromkeys(line["task"] for line in lines))

    def place(line: Line) -> tuple:
        return pairs.index((line["name"], line["reference"])), tasks.index(line["task"]), float(str(line["amount"]).rstrip(" %"))

    return place


def _flat(lines: Mapping[str, Sequence[Line]]) -> list[Line]:
    return [line for here in lines.values() for line in here]


if __name__ == "__main__":
    raise SystemExit(main())
