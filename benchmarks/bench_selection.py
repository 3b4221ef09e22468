"""Choosing entries: time and peak memory of each strategy, beside the way that holds all dense gradients, in fresh processes."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import torch

import blocks
import plots
import sprand
import timing
from peak_memory import ALLOCATOR, MIB, high_water, resident
from report import RESULTS, Row, command_line, end_as_by_ctrl_c, markdown, progress, write_csv, write_markdown
from sprand.selection.strategies import STRATEGIES

NAIVE = {"naive snip": "snip", "naive fisher": "fisher"}
BOUNDED = "snip, bounded"
COLUMNS = (
    "device", "width", "layers", "dtype", "examples", "tokens", "method", "targets", "chosen", "seconds", "ratio", "peak_mib",
    "above_mib", "largest_mib", "repeats", "note",
)  # fmt: skip
TABLE = {
    "method": ("strategy", ""), "seconds": ("seconds", ".2f"), "ratio": ("over one pass", ".2f"),
    "peak_mib": ("peak, MiB", ".0f"), "above_mib": ("above one pass, MiB", ".0f"), "note": ("", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        method: "one pass" (the model's own forward and backward over the data, each weight gradient dropped as soon as it is
            made), a strategy, or a key of `NAIVE`.
        width, feed_forward, layers, dtype: of the model, square projections; `key_value` wide keys and values.
        examples, tokens: how many sequences, and how long; in batches of `batch`.
        memory: bytes for accumulators, where bounded.
    """

    method: str
    width: int
    key_value: int
    feed_forward: int
    layers: int
    dtype: str
    device: str
    examples: int
    tokens: int
    batch: int
    density: float
    memory: int


@end_as_by_ctrl_c()
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    methods = ["one pass", *options.methods]
    rows: list[dict[str, object]] = []
    try:
        with progress(len(methods), "selection") as bar:
            for method in methods:
                case = Case(
                    method, options.width, options.key_value, options.feed_forward, options.layers, options.dtype, options.device,
                    options.examples, options.tokens, options.batch, options.density, options.bounded_mib * MIB,
                )  # fmt: skip
                row = {**asdict(case), "repeats": options.repeats, **middle([measure(case) for _ in range(options.repeats)])}
                floor = rows[0] if rows else row
                if not row.get("note") and not floor.get("note"):
                    row |= {"ratio": row["seconds"] / floor["seconds"], "above_mib": row["peak_mib"] - floor["peak_mib"]}
                rows.append(row)
                bar.say(f"{method}: " + str(row.get("note") or f"{row['seconds']:.1f} s, peak {row['peak_mib']:.0f} MiB"))
                bar.advance()
    finally:
        put_down(rows, options, command_line(__file__, sys.argv[1:] if argv is None else argv))
    return 0


def put_down(rows: Sequence[Row], options: argparse.Namespace, command: str) -> None:
    """Write the rows measured so far."""
    if not rows:
        return
    write_csv(options.out / "selection.csv", rows, COLUMNS)
    first = rows[0]
    facts = (
        f"{options.layers} layers, {options.width} wide, {options.dtype}, {first.get('targets', 0):,.0f} targeted weights; "
        f"{options.examples} examples of {options.tokens} tokens; "
        f"gradient of the largest layer {first.get('largest_mib', 0):.0f} MiB"
    )
    write_markdown(options.out / "selection.md", "Choosing entries", command, [(facts, markdown(rows, TABLE))])
    plots.selection(rows, options.out / "selection.png")


def middle(found: Sequence[dict[str, object]]) -> dict[str, object]:
    """The medians of repeated measurements, or the first reason why there is none."""
    failed = next((one for one in found if "note" in one), None)
    return failed or {key: statistics.median(one[key] for one in found) for key in found[0]}


def measure(case: Case) -> dict[str, object]:
    """Run a case in a fresh process."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, **ALLOCATOR, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__)), json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"note": f"failed: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def run(case: Case) -> dict[str, object]:
    """Measure a case in this process: `seconds`, `peak_mib` above the loaded model, `targets`, `chosen`, `largest_mib`."""
    torch.manual_seed(0)
    model = blocks.Blocks(blocks.Shape(case.width, case.key_value, case.feed_forward, min(64, case.width)), case.layers)
    model.to(device=case.device, dtype=getattr(torch, case.dtype)).requires_grad_(False)
    data = [
        tuple(torch.randn(2, case.batch, case.tokens, case.width, device=case.device).to(getattr(torch, case.dtype)))
        for _ in range(case.examples // case.batch)
    ]
    linear = linear_weights(model)
    if case.device == "cuda":  # what starts with the first product of a process is not the method's
        x, target = (side[:1] for side in data[0])
        model(x.clone().requires_grad_(), target).backward()
    call = chooser(case, model, data)
    gc.collect()
    with peak_of(case.device) as peak:
        started = time.perf_counter()
        chosen = call()
        if case.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds, "peak_mib": peak[0] / MIB, "targets": sum(w.numel() for w in linear), "chosen": chosen,
        "largest_mib": max(w.numel() for w in linear) * 4 / MIB,
    }  # fmt: skip


def chooser(case: Case, model, data) -> Callable[[], int]:
    """What is measured; it gives how many entries it chose."""

    def loss(model, batch):
        x, target = batch
        return model(x.requires_grad_(), target)

    def one_pass() -> int:
        for weight in linear_weights(model):
            weight.requires_grad_(True).register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for batch in data:
            loss(model, batch).backward()
        return 0

    if case.method == "one pass":
        return one_pass
    if case.method in NAIVE:
        return lambda: naive(NAIVE[case.method], model, data, loss, case.density)
    fields: dict[str, object] = {"strategy": case.method, "density": case.density, "scope": "global"}
    if case.method == BOUNDED:
        fields |= {"strategy": "snip", "calibration_memory": case.memory}
    if fields["strategy"] in STRATEGIES and STRATEGIES[fields["strategy"]].columns:
        fields["layout"] = "columns"
    if fields["strategy"] == "grasp":
        fields["strategy_options"] = {"temperature": 1.0}
    return lambda: sprand.select(model, data=data, loss_fn=loss, calibration_examples=None, **fields).nnz


def linear_weights(model) -> list[torch.nn.Parameter]:
    """What is targeted."""
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]


def naive(strategy: str, model, data, loss: Callable, density: float) -> int:
    """Dense gradients of all weights at once, all scores joined, one top-k: what a few lines of PyTorch do."""
    weights = linear_weights(model)
    for weight in weights:
        weight.requires_grad_(True)
    squares = [torch.zeros_like(weight) for weight in weights] if strategy == "fisher" else []
    for batch in data:
        if strategy == "snip":
            loss(model, batch).backward()
            continue
        for example in zip(*(side.detach().split(1) for side in batch), strict=True):
            for total, grad in zip(squares, torch.autograd.grad(loss(model, example), weights), strict=True):
                total.add_(grad.square())
    scores = squares or [(weight * weight.grad).abs() for weight in weights]
    joined = torch.cat([score.detach().flatten() for score in scores])
    return joined.topk(round(density * joined.numel())).indices.numel()


@contextlib.contextmanager
def peak_of(device: str) -> Iterator[list[float]]:
    """The most memory above that before, as the only element of the list once the block has ended."""
    if device == "cpu":
        before = resident()
        with high_water() as peak:
            yield peak
        peak[0] -= before
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, peak = torch.cuda.memory_allocated(), [0.0]
    yield peak
    peak[0] = torch.cuda.max_memory_allocated() - before


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    known = (*STRATEGIES, BOUNDED, *NAIVE)
    of_entries = [name for name in known if name not in STRATEGIES or not STRATEGIES[name].columns]
    parser.add_argument("--methods", nargs="+", choices=known, default=of_entries)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--key-value", type=int, default=768, help="width of keys and values")
    parser.add_argument("--feed-forward", type=int, default=2112)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--bounded-mib", type=int, default=64, help="accumulators of 'snip, bounded'")
    parser.add_argument("--repeats", type=int, default=1, help="fresh processes of each")
    parser.add_argument("--out", type=Path, help="default: results/, or that of the card")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all?")
    parser.add_argument("--llama-8b", action="store_true", help="four blocks of the size of Llama 8B, in bf16")
    options = parser.parse_args(argv)
    if options.llama_8b:
        options.width, options.key_value, options.feed_forward, options.layers = 4096, 1024, 14336, 4
        options.dtype, options.tokens, options.bounded_mib = "bfloat16", 512, 512
    if options.quick:
        options.width, options.key_value, options.feed_forward, options.layers = 64, 64, 96, 2
        options.examples, options.tokens, options.bounded_mib = 16, 8, 1
    options.out = options.out or (RESULTS if options.device == "cpu" else timing.default_out())
    if options.examples % options.batch:
        parser.error(f"expected whole batches of {options.batch} examples, got {options.examples}")
    return options


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(run(Case(**json.loads(sys.argv[1])))))
    else:
        raise SystemExit(main())
