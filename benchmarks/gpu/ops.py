"""Every operator on a GPU against cuBLAS and PyTorch, with the bandwidth and arithmetic reached and what was predicted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from timing import Budget, Call, Clock, default_out, microseconds, predictions  # isort: skip  (puts benchmarks/ on the path)
from bench_ops import Problem, contestants, shape_of
from peers import sampled_addmm, spops
from report import Row, command_line, end_as_by_ctrl_c, markdown, progress, write_csv, write_markdown

PARTS = ("cublas", "entries", "adamw", "dtypes", "sddmm", "peers")  # long ones late, for a budget; foreign kernels last
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SECTOR = 32
COLUMNS = (
    "op", "contestant", "out", "in", "tokens", "dtype", "layout", "density", "nnz", "targets", "us", "us_p20", "us_p80",
    "samples", "gb_per_s", "tflop_per_s", "predicted_us", "error", "note",
)  # fmt: skip
TABLE = {
    "op": ("op", ""), "contestant": ("what", ""), "shape": ("weight", ""), "tokens": ("tokens", ",d"), "dtype": ("dtype", ""),
    "layout": ("layout", ""), "percent": ("density", ""), "nnz": ("entries", ",d"), "us": ("us", ".1f"),
    "spread": ("p20 to p80", ""), "gb_per_s": ("GB/s", ",.0f"), "tflop_per_s": ("TFLOP/s", ".2f"),
    "predicted_us": ("predicted, us", ".0f"), "error": ("error", ".1e"), "note": ("note", ""),
}  # fmt: skip


class Bench:
    """The parts of the measurement; each yields its rows, problem by problem."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.clock, self.budget = Clock(options.device, options.samples), Budget(options.budget)
        self.predicted = predictions("op") if options.device == "cuda" else {}
        self.failed = self.broken = False
        self._drawn: tuple[tuple, torch.Tensor] = (), torch.empty(0)

    def rows(self, part: str) -> Iterator[dict[str, object]]:
        """The rows of one part. A problem that does not run is a row with the reason, and `failed` tells that there was one."""
        for arguments in getattr(self, f"_{part}_problems")():
            if self.broken or self.budget.spent():
                why = "the device is in error" if self.broken else f"the budget of {self.options.budget:g} s was spent"
                yield {"op": part, "note": f"{why}: the rest was not measured"}
                return
            try:
                yield from getattr(self, f"_{part}")(*arguments)
            except torch.OutOfMemoryError:
                yield {"op": part, "note": f"{arguments}: more memory than this card has"}
            except (ValueError, RuntimeError) as error:
                self.failed, self.broken = True, isinstance(error, torch.AcceleratorError)
                yield {"op": part, "note": f"{arguments}: {type(error).__name__}: {str(error).splitlines()[0]}"}

    def _cublas_problems(self) -> Iterator[tuple]:
        return ((shape, tokens) for shape in self.options.shapes for tokens in self.options.tokens)

    def _cublas(self, shape: tuple[int, int], tokens: int) -> list[dict[str, object]]:
        grad_output, input = self._sides(shape, tokens, torch.bfloat16)
        weight = torch.randn(shape, device=self.device, dtype=torch.bfloat16)

        def forward() -> torch.Tensor:
            return input @ weight.t()

        def to_input() -> torch.Tensor:
            return grad_output @ weight

        calls = {
            "forward": forward,
            "dX": to_input,
            "forward + dX": lambda: (forward(), to_input()),
            "dW": lambda: grad_output.t() @ input,
        }
        work = 2 * tokens * shape[0] * shape[1]
        moved = 2 * (tokens * sum(shape) + shape[0] * shape[1])
        rows = []
        for name, taken in self.clock.alternate(calls).items():
            times = 2 if name == "forward + dX" else 1
            row = {"op": "cuBLAS", "contestant": name, **_of(shape, tokens, "bf16"), **microseconds(taken)}
            row["predicted_us"] = self.predicted.get((name, None, None, *shape, tokens))
            rows.append(row | _rates(row, times * moved, times * work))
        return rows

    def _sddmm_problems(self) -> Iterator[tuple]:
        for shape in self.options.shapes:
            for density in self.options.densities:
                for tokens in self.options.tokens:
                    yield shape, tokens, density, "bf16"

    def _sddmm(self, shape, tokens: int, density: float, dtype: str) -> list[dict[str, object]]:
        from sprand.kernels import ops

        grad_output, input = self._sides(shape, tokens, DTYPES[dtype])
        indices = self._draw(shape, density, DTYPES[dtype])
        calls = self._sampled(grad_output, input, indices)
        ours = calls["sprand"]
        calls["dW + gather"] = lambda: ops.gather(grad_output.t() @ input, indices)
        if product := wide_product(grad_output, input):
            calls["dW in fp32 + gather"] = lambda: ops.gather(product(), indices)
        nnz, entries = len(indices), shape[0] * shape[1]
        size = input.element_size()
        rows = []
        for name, taken in self.clock.alternate(calls).items():
            row = {"op": "sddmm", "contestant": name, **_of(shape, tokens, dtype), **microseconds(taken)}
            row |= {"layout": "unstructured", "density": density, "nnz": nnz}
            sampled = name.startswith("sprand") and name != "sprand, dense chunks"
            what = ("sddmm", "unstructured", density) if sampled else ("dW + gather", None, None)
            row["predicted_us"] = self.predicted.get((*what, *shape, tokens)) if dtype == "bf16" else None
            row |= _rates(row, size * tokens * sum(shape) + 8 * nnz, 2 * tokens * (nnz if sampled else entries))
            rows.append(row)
        exact = ops.gather(grad_output.float().t() @ input.float(), indices)
        rows[0]["error"] = ((ours() - exact).norm() / exact.norm()).item()
        return rows

    def _dtypes_problems(self) -> Iterator[tuple]:
        shape, tokens = self.options.shapes[0], self.options.tokens[min(1, len(self.options.tokens) - 1)]
        for dtype in ("fp32", "fp16"):
            for density in self.options.densities:
                yield shape, tokens, density, dtype

    _dtypes = _sddmm

    def _peers_problems(self) -> Iterator[tuple]:
        shape, tokens = self.options.peer_shape, self.options.tokens[0]
        return ((shape, tokens, density, peer) for density in self.options.densities for peer in (sampled_addmm, spops))

    def _peers(self, shape, tokens: int, density: float, peer) -> list[dict[str, object]]:
        grad_output, input = self._sides(shape, tokens, torch.float32)
        indices = self._draw(shape, density, torch.float32)
        facts = {"op": "sddmm", **_of(shape, tokens, "fp32"), "layout": "unstructured", "density": density, "nnz": len(indices)}
        ours = self._sampled(grad_output, input, indices)["sprand"]
        try:
            theirs = peer(grad_output, input, indices)
            difference = (theirs().float() - ours()).norm() / ours().norm()
        except Exception as error:
            return [{**facts, "contestant": peer.__name__, "note": f"does not run here: {str(error).splitlines()[0]}"}]
        rows = []
        for name, taken in self.clock.alternate({"sprand": ours, peer.__name__: theirs}).items():
            row = {**facts, "contestant": name, **microseconds(taken)}
            rows.append(row | _rates(row, 4 * tokens * sum(shape) + 8 * len(indices), 2 * tokens * len(indices)))
        rows[1]["error"] = difference.item()
        return rows

    def _entries_problems(self) -> Iterator[tuple]:
        for op in ("gather", "patch_"):
            for shape in self.options.shapes[:: max(len(self.options.shapes) // 3, 1)]:
                for density in self.options.densities:
                    yield op, shape, density

    def _entries(self, op: str, shape: tuple[int, int], density: float) -> list[dict[str, object]]:
        problem = self._problem(shape, density)
        nnz, sectors = len(problem.indices), _sectors(problem.indices, problem.weight)
        streams = {"gather": 4 + 2, "patch_": 4 + 2 + 4}[op]
        moved = nnz * streams + SECTOR * sectors * (1 if op == "gather" else 2)
        rows = []
        for name, taken in self.clock.alternate(contestants(op, problem)).items():
            row = {
                "op": op,
                "contestant": name,
                **_of(shape, None, "bf16"),
                "density": density,
                "nnz": nnz,
                **microseconds(taken),
            }
            rows.append(row | _rates(row, moved, None))
        return rows

    def _adamw_problems(self) -> Iterator[tuple]:
        return ((entries, self.options.adamw_density) for entries in self.options.adamw_entries)

    def _adamw(self, entries: int, density: float) -> list[dict[str, object]]:
        from torch.optim.adamw import adamw

        from sprand.kernels import ops

        shape = max(self.options.shapes, key=lambda s: s[0] * s[1])
        pattern = self._draw(shape, density, torch.bfloat16)
        count = max(round(entries / len(pattern)), 1)
        weights = [torch.zeros(shape, dtype=torch.bfloat16, device=self.device) for _ in range(count)]
        indices, wide = ([pattern.to(dtype, copy=True) for _ in weights] for dtype in (torch.int32, torch.int64))
        bases = [ops.gather(weight, index) for weight, index in zip(weights, indices, strict=True)]
        deltas, grads, firsts, seconds = ([torch.zeros(len(pattern), device=self.device) for _ in weights] for _ in range(4))
        steps = [torch.ones((), device=self.device) for _ in weights]
        scales = [1.0] * count
        hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "maximize": False}

        def fused() -> None:
            adamw(deltas, grads, firsts, seconds, [], steps, fused=True, amsgrad=False, **hyper)

        def fused_and_put() -> None:
            fused()
            for weight, index, base, delta in zip(weights, wide, bases, deltas, strict=True):
                weight.view(-1).index_put_((index,), (base + delta).to(weight.dtype))

        calls = {
            "sprand": lambda: ops.sparse_adamw_(weights, indices, bases, deltas, grads, firsts, seconds, steps, scales, **hyper),
            "fused AdamW + index_put_": fused_and_put,
            "fused AdamW": fused,
        }
        nnz = count * len(pattern)
        state = 4 * nnz + 3 * 8 * nnz
        moved = {"sprand": state + 6 * nnz + 2 * SECTOR * count * _sectors(pattern, weights[0])}
        rows = []
        for name, taken in self.clock.alternate(calls).items():
            row = {"op": "sparse_adamw_", "contestant": name, **_of(shape, None, "bf16"), "density": density, "nnz": nnz}
            row |= {"targets": count, **microseconds(taken)}
            what = "sparse_adamw_" if name == "sprand" else name
            row["predicted_us"] = self.predicted.get((what, None, density if name == "sprand" else None, None, None, entries))
            rows.append(row | _rates(row, moved.get(name, state if name == "fused AdamW" else None), None))
        return rows

    def _sides(self, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`grad_output [tokens, out]` and `input [tokens, in]`."""
        grad_output, input = (torch.randn((tokens, size), device=self.device).to(dtype) for size in shape)
        return grad_output, input

    def _draw(self, shape: tuple[int, int], density: float, dtype: torch.dtype) -> torch.Tensor:
        """The positions that `sprand.apply` gives a linear layer of that shape."""
        import sprand

        key = shape, density, dtype
        if self._drawn[0] != key:
            layer = torch.nn.Linear(shape[1], shape[0], bias=False, device=self.device, dtype=dtype)
            model = sprand.apply(torch.nn.Sequential(layer), target_modules=["0"], density=density)
            self._drawn = key, model[0].sprand_indices
        return self._drawn[1]

    def _sampled(self, grad_output: torch.Tensor, input: torch.Tensor, indices: torch.Tensor) -> dict[str, Call]:
        """`ops.sddmm` with the schedule that a layer keeps, and each of the ways that it chooses from."""
        from sprand.kernels import ops
        from sprand.kernels.schedule import make_schedule
        from sprand.kernels.tuning import schedule_for

        if torch.device(self.device).type != "cuda":
            return {"sprand": lambda: ops.sddmm(grad_output, input, indices)}
        sizes = grad_output.shape[1], input.shape[1], input.dtype
        chosen = schedule_for(indices, *sizes)
        made = make_schedule(indices, *sizes)
        calls = {"sprand": lambda: ops.sddmm(grad_output, input, indices, chosen)}
        if made is not None:
            calls["sprand, row kernel"] = lambda: ops.sddmm(grad_output, input, indices, made)
            calls["sprand, dense chunks"] = lambda: ops.sddmm_dense(grad_output, input, indices, made)
        return calls

    def _problem(self, shape: tuple[int, int], density: float) -> Problem:
        from sprand.kernels import ops

        weight = torch.randn(shape, device=self.device).to(torch.bfloat16)
        indices = self._draw(shape, density, torch.bfloat16)
        delta = torch.randn(len(indices), device=self.device) * 0.01
        return Problem(weight, indices, ops.gather(weight, indices), delta, weight, weight)


def wide_product(grad_output: torch.Tensor, input: torch.Tensor) -> Call | None:
    """The dense gradient in fp32 from low precision, which cuBLAS has, and torch on a CPU has not."""
    if input.dtype == torch.float32 or not input.is_cuda:
        return None
    return lambda: torch.mm(grad_output.t(), input, out_dtype=torch.float32)


def _of(shape: tuple[int, int], tokens: int | None, dtype: str) -> dict[str, object]:
    return {"out": shape[0], "in": shape[1], "tokens": tokens, "dtype": dtype, "targets": 1}


def _rates(row: Row, moved: float | None, flops: float | None) -> dict[str, float | None]:
    """GB/s of the bytes that have to move (inputs once, a touched 32-byte sector once per read or write), and TFLOP/s."""
    seconds = row["us"] / 1e6
    return {
        "gb_per_s": None if moved is None else moved / seconds / 1e9,
        "tflop_per_s": None if flops is None else flops / seconds / 1e12,
    }


def _sectors(indices: torch.Tensor, weight: torch.Tensor) -> int:
    """How many 32-byte sectors of the weight the entries lie in."""
    return torch.unique_consecutive(indices * weight.element_size() // SECTOR).numel()


def line(row: Row) -> Row:
    """A row as the printed table shows it."""
    shown = dict(row)
    shown["shape"] = f"{row['out']}x{row['in']}" if "out" in row else None
    shown["percent"] = f"{100 * row['density']:g} %" if row.get("density") else None
    shown["spread"] = f"{row['us_p20']:.1f} to {row['us_p80']:.1f}" if "us" in row else None
    return shown


@end_as_by_ctrl_c()
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    bench = Bench(options)
    parts: dict[str, list[Row]] = {part: [] for part in options.parts}
    try:
        with progress(len(parts), "gpu ops") as bar, torch.no_grad():
            for part, rows in parts.items():
                bar.say(part)
                for row in bench.rows(part):
                    rows.append(row)
                bar.advance()
    finally:
        put_down(parts, options, command_line(__file__, sys.argv[1:] if argv is None else argv))
    return int(bench.failed)


def put_down(parts: dict[str, list[Row]], options: argparse.Namespace, command: str) -> None:
    """Write the rows measured so far, or print them where there is no folder."""
    sections = []
    for part, rows in parts.items():
        columns = {name: how for name, how in TABLE.items() if any(line(row).get(name) is not None for row in rows)}
        if rows:
            sections.append((part, markdown([line(row) for row in rows], columns)))
    if options.out is None:
        print("\n".join(f"## {heading}\n\n{text}" for heading, text in sections))
        return
    write_csv(options.out / "ops.csv", [row for rows in parts.values() for row in rows], COLUMNS)
    write_markdown(options.out / "ops.md", "Operators on a GPU", command, sections)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shapes = ["4096x4096", "1024x4096", "14336x4096", "4096x14336", "768x3072", "3072x768"]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see that it runs, nothing is written")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[shape_of(s) for s in shapes], help="out x in")
    parser.add_argument("--peer-shape", type=shape_of, default=shape_of("1024x1024"), help="of peers that know fp32 alone")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192, 16384])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.0001, 0.001, 0.005, 0.01, 0.05])
    parser.add_argument("--adamw-entries", nargs="+", type=int, default=[8_000_000, 42_000_000, 70_000_000])
    parser.add_argument("--adamw-density", type=float, default=0.01)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--budget", type=float, default=240, help="seconds; what does not fit is left out")
    parser.add_argument("--out", type=Path, help="folder of the results; by default results/gpu-<card>")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.tokens, options.densities = [(64, 96)], [32], [0.01]
        options.peer_shape, options.adamw_entries, options.samples = (64, 64), [200], 2
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible to torch (--device cpu --quick shows that the script runs)")
    if options.out is None and options.device == "cuda":
        options.out = default_out()
    if not all(0 < density <= 1 for density in options.densities) or options.samples < 1:
        parser.error(f"expected densities in (0, 1] and at least one sample, got {options.densities} and {options.samples}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
