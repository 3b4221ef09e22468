"""Draws results/overview.png: quality, time and memory of sprand beside LoRA and full fine-tuning, from recorded results."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import plots
from report import RESULTS, Row, read_csv

NAMES = ("sprand, 0.1 %", "sprand, 1 %", "LoRA", "all weights")
COLOURS = ("#f6b26b", "#e07b00", "#4a5f70", "#b7c4cf")
GPU = "gpu-h100-80gb-hbm3"


@dataclasses.dataclass(frozen=True)
class Panel:
    """A number for each of NAMES, None where it was not measured; without training, or of the frozen model, it is `floor`."""

    title: str
    unit: str
    numbers: tuple[float | None, ...]
    floor: float
    floor_name: str


def quality(rows: Sequence[Row]) -> Panel:
    """Perplexity of GSM8K's answers on test rows, each method at the rate that was best on dev rows."""
    here = [row for row in rows if row["task"] == "gsm8k" and row["seed"] == 0]
    untrained = next(row["test"] for row in here if row["method"] == "untrained")

    def best(method: str, budget: float) -> float:
        tried = [row for row in here if (row["method"], row["budget"]) == (method, budget)]
        return min(tried, key=lambda row: row["dev"])["test"]

    numbers = (best("random", 0.001), best("random", 0.01), best("lora", 0.01), None)
    return Panel("Quality: SmolLM2-135M on GSM8K", "perplexity of the answers, test rows", numbers, untrained, "untrained")


def step_on_cpu(rows: Sequence[Row]) -> Panel:
    """A step over the frozen model's, 768 wide in bf16; of the two LoRAs the faster one, whose adapter is bf16 as well."""
    here = {row["method"]: row["ratio"] for row in rows if (row["width"], row["dtype"]) == (768, "bf16")}
    numbers = tuple(here[method] for method in ("sprand@0.001", "sprand@0.01", "lora-bf16", "full"))
    return Panel("Time of a step: two cores of a CPU", "times the frozen model's, bf16", numbers, 1, "frozen")


def step_on_gpu(rows: Sequence[Row]) -> Panel:
    """The same of two Llama-8B blocks on an H100, 2,048 tokens; LoRA of rank 16."""
    here = {row["label"]: row["ratio"] for row in rows if row["tokens"] == 2048}
    labels = ("sprand 0.1 %, unstructured", "sprand 1 %, unstructured", "PEFT LoRA r16, bf16 adapters", "full, fused AdamW")
    return Panel("Time of a step: an H100", "times the frozen model's, bf16", tuple(map(here.get, labels)), 1, "frozen")


def memory(rows: Sequence[Row]) -> Panel:
    """The peak of a step, 1,024 wide in fp32, 2,048 tokens."""
    here = {row["method"]: row["peak_mib"] for row in rows if row["tokens"] == 2048}
    numbers = tuple(here[method] for method in ("sprand@0.001", "sprand@0.01", "lora", "full"))
    return Panel("Memory of a step: CPU", "MiB at the peak, fp32", numbers, here["frozen"], "frozen")


def draw(panels: Sequence[Panel], path: Path) -> None:
    """A bar for each method in each panel, shorter is better; a line where the model is that trains nothing."""
    titled = {panel.title: panel for panel in panels}
    for axis, title in plots.panels(titled, path, across=len(panels), size=(3.3, 2.5)):
        panel = titled[title]
        end = 1.25 * max(panel.floor, *(number for number in panel.numbers if number is not None))
        for y, (number, colour) in enumerate(zip(panel.numbers, COLOURS, strict=True)):
            axis.barh(y, number or 0, 0.72, color=colour)
            text = "not run" if number is None else _short(number)
            axis.annotate(text, (number or 0, y), (4, 0), textcoords="offset points", va="center", fontsize=10, weight="bold")
        axis.axvline(panel.floor, color="black", linewidth=1, linestyle=":")
        axis.set_title(panel.title, fontsize=10, weight="bold", loc="left")
        axis.set_xlabel(f"{panel.unit}\ndotted: {panel.floor_name}, {_short(panel.floor)}", fontsize=9)
        axis.set(xlim=(0, end), yticks=range(len(NAMES)), yticklabels=NAMES if panel is panels[0] else [], xticks=[])
        axis.tick_params(length=0)
        axis.invert_yaxis()
        axis.spines[["top", "right", "bottom"]].set_visible(False)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number > 100 else f"{number:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    panels = (
        quality(read_csv(RESULTS / "chat.csv")), step_on_cpu(read_csv(RESULTS / "train_step.csv")),
        step_on_gpu(read_csv(RESULTS / GPU / "step.csv")), memory(read_csv(RESULTS / "memory.csv")),
    )  # fmt: skip
    for panel in panels:
        print(f"{panel.title}: {dict(zip(NAMES, panel.numbers, strict=True))}; {panel.floor_name} {panel.floor}")
    draw(panels, options.out / "overview.png")


if __name__ == "__main__":
    main()
