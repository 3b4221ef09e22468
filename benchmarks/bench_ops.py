"""Each operator against what plain PyTorch does for the same result: seconds, GFLOP/s, times faster."""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import plots
from report import RESULTS, Row, command_line, progress, quantiles, write_csv, write_markdown
from report import markdown as table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPS = (
    "sddmm", "linear", "linear_grad", "linear_input_grad", "embedding_grad", "gather", "patch_", "patch_all_", "scatter_add_all_",
    "sparse_adamw_", "stratified_indices_", "uniform_indices_",
)  # fmt: skip
TOKEN_OPS = ("sddmm", "linear", "linear_grad", "linear_input_grad", "embedding_grad")
FOR_ALL = ("patch_all_", "scatter_add_all_", "sparse_adamw_")  # operators on TARGETS equal weights in one call
TARGETS = 8
SHORTEST = 5e-4
COLUMNS = (
    "op", "out", "in", "layout", "density", "nnz", "dtype", "tokens", "targets", "kernel", "contestant", "seconds", "seconds_p20",
    "seconds_p80", "gflops", "ns_per_entry", "speedup", "repeats",
)  # fmt: skip
TABLE = {
    "shape": ("weight", ""), "layout": ("layout", ""), "percent": ("density", ""), "nnz": ("entries", ",d"),
    "ours": ("sprand, us", ".1f"), "ours_gflops": ("GFLOP/s", ".1f"), "ours_ns": ("ns per entry", ".2f"),
    "plain": ("fastest plain PyTorch", ""), "plain_us": ("us", ".1f"), "speedup": ("times faster", ".2f"),
}  # fmt: skip

Call = Callable[[], object]


@dataclass(frozen=True)
class Problem:
    """One weight and everything that the operators take beside it."""

    weight: torch.Tensor
    indices: torch.Tensor
    base: torch.Tensor
    delta: torch.Tensor
    grad_output: torch.Tensor
    input: torch.Tensor

    @classmethod
    def of(cls, shape: tuple[int, int], density: float, dtype: torch.dtype, tokens: int) -> Problem:
        from sprand.kernels import ops
        from sprand.selection import pattern

        generator = torch.Generator().manual_seed(0)
        rows, cols = shape
        indices = pattern.draw("random", "", shape, max(round(rows * cols * density), 1), 1)
        weight = torch.randn(shape, generator=generator).to(dtype)
        delta = torch.randn(indices.shape, generator=generator) * 0.01
        sides = [torch.randn((tokens, size), generator=generator).to(dtype) for size in shape]
        return cls(weight, indices, ops.gather(weight, indices), delta, *sides)


def contestants(op: str, p: Problem) -> dict[str, Call]:
    """Ours first, then ways to do the same in plain PyTorch, with int64 indices, as it likes them best."""
    from sprand.kernels import ops

    flat, wide = p.weight.view(-1), p.indices.long()
    nnz, dtype = len(wide), p.weight.dtype
    if op == "sddmm":
        return {
            "sprand": lambda: ops.sddmm(p.grad_output, p.input, p.indices),
            "matmul + index_select": lambda: (p.grad_output.t() @ p.input).view(-1).index_select(0, wide).float(),
        }
    if op == "linear":
        return {
            "sprand": lambda: ops.linear(p.input, p.weight),
            "matmul": lambda: torch.nn.functional.linear(p.input, p.weight),
        }
    if op == "linear_grad":
        thin = p.input[:, : max(1, nnz // len(p.weight))].contiguous()  # of as many whole columns as hold so many entries
        return {
            "sprand": lambda: ops.linear_grad(p.grad_output, thin),
            "matmul": lambda: (thin.t() @ p.grad_output).t().float().contiguous(),
            "matmul in float32": lambda: (thin.float().t() @ p.grad_output.float()).t().contiguous(),
        }
    if op == "linear_input_grad":
        return {
            "sprand": lambda: ops.linear_input_grad(p.grad_output, p.weight, p.indices, p.base, p.delta, 1.0, False),
            "index_put_ + matmul": lambda: (
                p.grad_output @ flat.index_put_((wide,), (p.base + p.delta).to(dtype)).view(p.weight.shape)
            ),
        }
    if op == "embedding_grad":
        rows = len(p.weight)
        tokens = torch.randint(rows, p.input.shape[:1], generator=torch.Generator().manual_seed(1))
        backward = torch.ops.aten.embedding_dense_backward
        return {
            "sprand": lambda: ops.embedding_grad(p.input, tokens, p.indices),
            "dense backward + index_select": lambda: (
                backward(p.input, tokens, rows, -1, False).view(-1).index_select(0, wide).float()
            ),
        }
    if op == "gather":
        return {
            "sprand": lambda: ops.gather(p.weight, p.indices),
            "index_select": lambda: flat.index_select(0, wide),
        }
    if op == "patch_":
        return {
            "sprand": lambda: ops.patch_(p.weight, p.indices, p.base, p.delta, 1.0),
            "index_put_": lambda: flat.index_put_((wide,), (p.base + p.delta).to(dtype)),
            "index_copy_": lambda: flat.index_copy_(0, wide, (p.base + p.delta).to(dtype)),
        }
    if op in ("patch_all_", "scatter_add_all_"):
        return all_contestants(op, p, wide)
    if op == "sparse_adamw_":
        return adamw_contestants(p, wide)
    if op == "stratified_indices_":
        drawn = torch.empty_like(p.indices)
        return {
            "sprand": lambda: ops.stratified_indices_(drawn, *p.weight.shape, 7),
            "randperm + sort": lambda: torch.randperm(flat.numel())[:nnz].sort().values,
            "bernoulli + nonzero": lambda: torch.empty(p.weight.shape).bernoulli_(nnz / flat.numel()).nonzero(),
        }
    drawn = torch.empty_like(p.indices)
    return {
        "sprand": lambda: ops.uniform_indices_(drawn, flat.numel(), 7),
        "randperm": lambda: torch.randperm(flat.numel())[:nnz],
    }


def copies(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.clone() for _ in range(TARGETS)]


def all_contestants(op: str, p: Problem, wide: torch.Tensor) -> dict[str, Call]:
    """`TARGETS` equal layers in one call, against a write per weight."""
    from sprand.kernels import ops

    weights, indices, deltas = copies(p.weight), copies(p.indices), copies(p.delta)
    dtype, adds = p.weight.dtype, op == "scatter_add_all_"

    def plain() -> None:
        for weight, delta in zip(weights, deltas, strict=True):
            weight.view(-1).index_put_((wide,), (1e-6 * delta if adds else p.base + delta).to(dtype), accumulate=adds)

    ours = (
        (lambda: ops.scatter_add_all_(weights, indices, deltas, [1e-6] * TARGETS))
        if adds
        else (lambda: ops.patch_all_(weights, indices, [p.base] * TARGETS, deltas, [1.0] * TARGETS))
    )
    return {"sprand": ours, "index_put_ each": plain}


def adamw_contestants(p: Problem, wide: torch.Tensor) -> dict[str, Call]:
    """One step of `TARGETS` equal layers, against the functional form of torch's fused AdamW and a write per weight."""
    from torch.optim.adamw import adamw

    from sprand.kernels import ops

    weights, grads = copies(p.weight), copies(p.delta)
    deltas, firsts, seconds = (copies(torch.zeros_like(p.delta)) for _ in range(3))
    steps = [torch.ones(()) for _ in range(TARGETS)]
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "maximize": False}
    indices, bases, scales = [p.indices] * TARGETS, [p.base] * TARGETS, [1.0] * TARGETS

    def plain() -> None:
        adamw(deltas, grads, firsts, seconds, [], steps, fused=True, amsgrad=False, **hyper)
        for weight, delta in zip(weights, deltas, strict=True):
            weight.view(-1).index_put_((wide,), (p.base + delta).to(weight.dtype))

    return {
        "sprand": lambda: ops.sparse_adamw_(weights, indices, bases, deltas, grads, firsts, seconds, steps, scales, **hyper),
        "fused AdamW + index_put_": plain,
    }


def flops(op: str, name: str, p: Problem) -> float | None:
    """Multiplications and additions that the contestant carries out; None where memory is what counts."""
    if not op.startswith("sddmm"):
        return None
    return 2.0 * len(p.input) * (len(p.indices) if name.startswith("sprand") else p.weight.numel())


def alternate(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Seconds per call, contestants in turn; calls shorter than half a millisecond are repeated within a sample."""
    inner = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        inner[name] = min(max(math.ceil(SHORTEST / (time.perf_counter() - start)), 1), 1000)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(inner[name]):
                call()
            taken[name].append((time.perf_counter() - start) / inner[name])
    return taken


@torch.no_grad()
def time_op(op: str, shape: tuple[int, int], density: float, dtype: str, tokens: int, repeats: int) -> list[Row]:
    """One row per contestant; the rows of sprand carry `speedup`, against the fastest other of the same run."""
    from sprand import native

    p = Problem.of(shape, density, DTYPES[dtype], tokens)
    layout_of = {"sprand": "unstructured"}
    targets = TARGETS if op in FOR_ALL else 1
    rows: list[dict[str, object]] = []
    for name, taken in alternate(contestants(op, p), repeats).items():
        middle, low, high = quantiles(taken)
        work = flops(op, name, p)
        rows.append({
            "op": op, "out": shape[0], "in": shape[1], "layout": layout_of.get(name), "density": density,
            "nnz": len(p.indices), "dtype": dtype, "tokens": tokens if op in TOKEN_OPS else None, "targets": targets,
            "contestant": name, "kernel": native.kernel_of(op, "cpu") if name in layout_of else "PyTorch", "seconds": middle,
            "seconds_p20": low, "seconds_p80": high, "gflops": work / middle / 1e9 if work else None,
            "ns_per_entry": middle * 1e9 / (len(p.indices) * targets), "repeats": repeats,
        })  # fmt: skip
    fastest = min(row["seconds"] for row in rows if not row["layout"])
    for row in rows:
        row["speedup"] = fastest / row["seconds"] if row["layout"] else None
    return rows


def summary_lines(rows: Sequence[Row]) -> list[Row]:
    """The rows of one problem as lines of the printed table, one for each layout."""
    plain = min((row for row in rows if not row["layout"]), key=lambda row: row["seconds"])
    return [{
        "shape": f"{ours['out']}x{ours['in']}", "layout": ours["layout"], "percent": f"{100 * ours['density']:g} %",
        "nnz": ours["nnz"], "ours": ours["seconds"] * 1e6, "ours_gflops": ours["gflops"], "ours_ns": ours["ns_per_entry"],
        "plain": plain["contestant"], "plain_us": plain["seconds"] * 1e6, "speedup": ours["speedup"],
    } for ours in rows if ours["layout"]]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    groups = [
        (op, dtype) for op in options.ops for dtype in options.dtypes if not op.endswith("indices_") or dtype == options.dtypes[0]
    ]
    problems = [(shape, density) for shape in options.shapes for density in options.densities]
    rows: list[Row] = []
    sections = []
    with progress(len(groups) * len(problems), "ops") as bar:
        for op, dtype in groups:
            bar.say(f"{op}, {dtype}")
            lines = []
            for shape, density in problems:
                here = time_op(op, shape, density, dtype, options.tokens, options.repeats)
                rows += here
                lines += summary_lines(here)
                bar.advance()
            tokens = f", {options.tokens} tokens"
            details = dict.fromkeys(TOKEN_OPS, tokens)
            detail = details.get(op, f", {TARGETS} such weights in one call" * (op in FOR_ALL))
            sections.append((f"{op}, {dtype}{detail} ({here[0]['kernel']})", table(lines, TABLE)))
    write_csv(options.out / "ops.csv", rows, COLUMNS)
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    write_markdown(options.out / "ops.md", "Operators against plain PyTorch", command, sections)
    plots.speedups(rows, options.out / "ops.png")
    return 0


def shape_of(text: str) -> tuple[int, int]:
    """`"768x3072"` as (768, 3072)."""
    rows, _, cols = text.partition("x")
    return int(rows), int(cols)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shapes = ["768x768", "768x3072", "3072x768", "1024x4096"]
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[shape_of(s) for s in shapes], help="out x in")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.001, 0.01, 0.05])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=20, help="samples per contestant")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="one tiny shape: does it run at all?")
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.densities, options.tokens, options.repeats = [(64, 96)], [0.01], 32, 2
    if not all(0 < density <= 1 for density in options.densities) or options.repeats < 1:
        parser.error(f"expected densities in (0, 1] and at least one repeat, got {options.densities} and {options.repeats}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
