"""A training step on Llama-8B-shaped blocks: frozen model, sprand, LoRA, SHiRA and full fine-tuning; time and peak memory."""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from blocks import Shape, batch, build

from timing import Budget, Clock, default_out, microseconds, predictions  # isort: skip  (puts benchmarks/ on the path)
from methods import PEER_DENSITY, Attach, adamw, attach_frozen, attach_full, attach_shira, attach_sprand
from report import Progress, Row, command_line, end_as_by_ctrl_c, markdown, progress, write_csv, write_markdown

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANK = 16
LAYOUTS = ("unstructured", "columns")
MIB = 2**20
COLUMNS = (
    "method", "label", "layout", "density", "graph", "tokens", "layers", "trained", "us", "us_p20", "us_p80", "samples", "ratio",
    "ratio_p20", "ratio_p80", "predicted_ratio", "above_floor_mib", "bytes_per_weight", "loss_first", "loss_last", "note",
)  # fmt: skip
TABLE = {
    "label": ("method", ""), "trained": ("trained", ",d"), "ms": ("ms", ".2f"), "ratio": ("ratio", ".3f"),
    "spread": ("p20 to p80", ""), "predicted_ratio": ("predicted for 8B", ".3f"), "above_floor_mib": ("MiB above floor", ",.1f"),
    "bytes_per_weight": ("B per trained weight", ".1f"), "note": ("note", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One row: how to make a model train that way, and whether the whole step is one CUDA graph."""

    key: str
    label: str
    attach: Attach
    layout: str | None = None
    density: float | None = None
    graph: bool = False


class Trainer:
    """A model of one method, and its training step on a fixed batch.

    Attributes:
        before: bytes on the device before the model was made.
        loss: the loss of the last step, on the device.
    """

    def __init__(self, method: Method, shape: Shape, layers: int, data: tuple[Tensor, Tensor], clock: Clock) -> None:
        self.before = allocated()
        self.model, self.optimizer = method.attach(build(shape, layers, clock.device))
        self.data, self.clock, self.loss = data, clock, None
        self._step = self._run
        if method.graph:
            self._capture()

    @property
    def trained(self) -> int:
        """How many scalars the optimizer updates."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return sum(p.numel() for group in groups for p in group["params"])

    def step(self) -> None:
        self._step()

    def _run(self) -> None:
        self.data[0].grad = None
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self.loss = self.model(*self.data)
        self.loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def _capture(self) -> None:
        """Forward, backward and optimizer step as one CUDA graph, after three steps outside of it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self._step = graph.replay


def methods(options: argparse.Namespace) -> list[Method]:
    """The rows of a table after the frozen model, sprand first."""
    chosen = []
    for layout in options.layouts if "sprand" in options.methods else ():
        for density in options.densities:
            attach = partial(attach_sprand, density=density, layout=layout)
            chosen.append(Method("sprand", f"sprand {100 * density:g} %, {layout}", attach, layout, density))
    if "sprand" in options.methods and options.device == "cuda":
        attach = partial(attach_sprand, density=PEER_DENSITY, layout="unstructured")
        label = f"sprand {100 * PEER_DENSITY:g} %, CUDA graph"
        chosen.append(Method("sprand", label, attach, "unstructured", PEER_DENSITY, graph=True))
    peers = {
        "lora": Method("lora", f"PEFT LoRA r{LORA_RANK}, fp32 adapters (PEFT's default)", attach_lora),
        "lora-bf16": Method("lora-bf16", f"PEFT LoRA r{LORA_RANK}, bf16 adapters", partial(attach_lora, cast=False)),
        "shira": Method("shira", "PEFT SHiRA 1 %", attach_shira, density=PEER_DENSITY),
        "full": Method("full", "full, fused AdamW", attach_full),
    }
    return chosen + [peers[name] for name in options.methods if name in peers]


def urgency(method: Method) -> int:
    """What a budget is spent on first: what a reader compares, the peers, then the rest."""
    if method.key != "sprand":
        return 1
    return 0 if method.density in (0.001, 0.01) and not method.graph else 2


def attach_lora(model: nn.Module, cast: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """PEFT LoRA on all linears, with PEFT's default of fp32 weights on a bf16 model, or, without `cast`, in the model's dtype."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=PROJECTIONS)
    model = get_peft_model(model, config, autocast_adapter_dtype=cast)
    return model, adamw(model.parameters())


def allocated() -> int:
    """Bytes that live tensors hold on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak(trainer: Trainer) -> int | None:
    """The most bytes held during a training step, the model included, after one step that does not count; None on the CPU."""
    trainer.step()
    if trainer.clock.device != "cuda":
        return None
    trainer.clock.wait()
    torch.cuda.reset_peak_memory_stats()
    trainer.step()
    trainer.clock.wait()
    return torch.cuda.max_memory_allocated() - trainer.before


def measure(method: Method, shape: Shape, options: argparse.Namespace, data: tuple[Tensor, Tensor], clock: Clock) -> list[Row]:
    """The rows of the frozen model and of one method, step by step in turn; ratios are taken within a round."""
    facts = {"tokens": data[0][..., 0].numel(), "layers": options.layers, "graph": int(method.graph)}
    frozen = Method("frozen", "frozen model" + ", CUDA graph" * method.graph, attach_frozen, graph=method.graph)
    floor = Trainer(frozen, shape, options.layers, data, clock)
    lowest = peak(floor)
    trainer = Trainer(method, shape, options.layers, data, clock)
    highest = peak(trainer)
    first = trainer.loss.item()
    taken = clock.alternate({"frozen": floor.step, "method": trainer.step}, flush=False)
    ratios = [b / a for a, b in zip(taken["frozen"], taken["method"], strict=True)]
    ratio, low, high = (value / 1e6 for value in list(microseconds(ratios).values())[:3])
    above = None if highest is None or method.graph else highest - lowest
    ours = {
        "method": method.key, "label": method.label, "layout": method.layout, "density": method.density,
        "trained": trainer.trained, **facts, **microseconds(taken["method"]), "ratio": ratio, "ratio_p20": low, "ratio_p80": high,
        "above_floor_mib": None if above is None else above / MIB,
        "bytes_per_weight": above / trainer.trained if above else None,
        "loss_first": first, "loss_last": trainer.loss.item(),
    }  # fmt: skip
    base = {"method": "frozen", "label": frozen.label, "trained": 0, "ratio": 1.0, **facts, **microseconds(taken["frozen"])}
    return [base, ours]


def compare(
    chosen: Sequence[Method], options: argparse.Namespace, clock: Clock, budget: Budget, bar: Progress
) -> Iterator[tuple[int, Row]]:
    """Tokens and row of every method at every number of tokens, most urgent first, before each that of the frozen model."""
    predicted = predictions("step") if options.device == "cuda" else {}
    shape = Shape(64, 32, 160, 16) if options.quick else Shape()
    data = {tokens: batch(shape, tokens, options.device) for tokens in options.tokens}
    for method, tokens in itertools.product(sorted(chosen, key=urgency), options.tokens):
        row = {"method": method.key, "label": method.label, "layout": method.layout, "density": method.density, "tokens": tokens}
        if budget.spent():
            yield tokens, {**row, "note": f"not measured: the budget of {options.budget:g} s was spent"}
            continue
        try:
            base, row = measure(method, shape, options, data[tokens], clock)
            if not method.graph:
                row["predicted_ratio"] = predicted.get((method.key, method.layout, method.density, None, None, tokens))
            yield tokens, base
        except ImportError as error:
            row["note"] = f"not installed: {error.name or error}"
        except torch.OutOfMemoryError:
            row["note"] = "more memory than this card has"
        except Exception as error:
            row["note"] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield tokens, row
        bar.say(f"{tokens} tokens, {method.label}: " + (row.get("note") or f"{row['ratio']:.3f} of the frozen model's step"))
        bar.advance()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def one_floor(rows: list[Row], labels: Sequence[str]) -> list[Row]:
    """The rows by their labels, behind one of the frozen model and one of its graph: the median of theirs."""
    floors: dict[int, list[Row]] = {}
    for row in rows:
        if row["method"] == "frozen":
            floors.setdefault(row["graph"], []).append(row)
    bases = [{**found[0], "us": statistics.median(row["us"] for row in found)} for found in floors.values()]
    return bases + sorted((row for row in rows if row["method"] != "frozen"), key=lambda row: labels.index(row["label"]))


def line(row: Row) -> Row:
    """A row as the printed table shows it."""
    shown = dict(row)
    shown["ms"] = row["us"] / 1e3 if "us" in row else None
    shown["spread"] = f"{row['ratio_p20']:.3f} to {row['ratio_p80']:.3f}" if "ratio_p20" in row else None
    return shown


@end_as_by_ctrl_c()
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    clock, budget = Clock(options.device, options.samples), Budget(options.budget)
    measured: dict[int, list[Row]] = {tokens: [] for tokens in options.tokens}
    chosen = methods(options)
    try:
        with progress(len(measured) * len(chosen), "gpu step") as bar:
            for tokens, row in compare(chosen, options, clock, budget, bar):
                measured[tokens].append(row)
    finally:
        labels = [method.label for method in chosen]
        tables = {tokens: one_floor(rows, labels) for tokens, rows in measured.items() if rows}
        put_down(tables, options, command_line(__file__, sys.argv[1:] if argv is None else argv))
    ours = [row for rows in measured.values() for row in rows if row["method"] == "sprand"]
    return int(any(row.get("note", "").startswith("failed") for row in ours))


def put_down(tables: dict[int, list[Row]], options: argparse.Namespace, command: str) -> None:
    """Write the rows of each number of tokens, or print them where there is no folder."""
    sections = [
        (f"{tokens} tokens, {options.layers} layers, bf16", markdown([line(row) for row in rows], TABLE))
        for tokens, rows in tables.items()
    ]
    if options.out is None:
        print("\n".join(f"## {heading}\n\n{text}" for heading, text in sections))
        return
    write_csv(options.out / "step.csv", [row for rows in tables.values() for row in rows], COLUMNS)
    write_markdown(options.out / "step.md", "Training step on a GPU", command, sections)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    names = ["sprand", "lora", "lora-bf16", "shira", "full"]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see that it runs, nothing is written")
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.001, 0.005, 0.01, 0.05])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=20, help="rounds that count")
    parser.add_argument("--budget", type=float, default=240, help="seconds; what does not fit is left out")
    parser.add_argument("--out", type=Path, help="folder of the results; by default results/gpu-<card>")
    parser.add_argument("--quick", action="store_true", help="tiny blocks: does it run at all?")
    options = parser.parse_args(argv)
    if options.quick:
        options.tokens, options.densities, options.layers, options.samples = [32], [0.02], 1, 2
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible to torch (--device cpu --quick shows that the script runs)")
    if options.out is None and options.device == "cuda":
        options.out = default_out()
    if any(tokens > 2048 and tokens % 2048 for tokens in options.tokens) or min(options.tokens) < 1 or options.samples < 1:
        parser.error(f"expected up to 2048 tokens or a multiple of that, and at least one sample, got {options.tokens}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
