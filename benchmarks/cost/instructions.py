"""Instructions of the CPU kernels and of a layer's training step, counted by callgrind: on any day the same to a few percent."""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import RESULTS, command_line, markdown, write_csv, write_markdown

COLUMNS = (
    "what", "contestant", "out", "in", "density", "nnz", "tokens", "targets", "instructions", "again", "per_entry", "ratio",
    "note",
)  # fmt: skip
TABLE = {
    "contestant": ("", ""), "percent": ("density", ""), "nnz": ("entries", ",d"), "instructions": ("instructions", ",d"),
    "per_entry": ("per entry", ",.1f"), "ratio": ("ratio", ".3f"),
}  # fmt: skip
# What valgrind can decode: it knows no AVX-512, no AMX. PyTorch and its libraries are told, too.
SETS = {
    "avx2": {
        "SPRAND_INSTRUCTION_SET": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "portable": {
        "SPRAND_INSTRUCTION_SET": "portable", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}  # fmt: skip
REPEATABLE = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
WARM_CALLS = 20
LAYER = "training step of one linear"
Call = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.count is not None:
        count_all(options)
        return 0
    reason = missing()
    if reason:
        print(f"instructions: not counted, {reason}", file=sys.stderr)
        rows: list[dict[str, object]] = [{"what": "all", "note": reason}]
    else:
        rows = counted(options)
    write_csv(options.out / "instructions.csv", rows, COLUMNS)
    sections = []
    for what in dict.fromkeys(str(row["what"]) for row in rows):
        here = [{**row, "percent": row.get("density") and f"{100 * row['density']:g} %"} for row in rows if row["what"] == what]
        one = here[0]
        size = f"{what}, {one['out']}x{one['in']}" if "out" in one else what
        size += f", {one['tokens']} tokens" if one.get("tokens") else ""
        size += f", {one['targets']} such weights in one call" if one.get("targets", 1) > 1 else ""
        sections.append((size, markdown(here, TABLE) if "out" in one else f"{one['note']}\n"))
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    write_markdown(options.out / "instructions.md", f"Instructions under callgrind, {options.set}, fp32", command, sections)
    return 0


def missing() -> str | None:
    """Why nothing can be counted here."""
    from sprand import native

    if not native.has_extension():
        return "the compiled CPU kernels are not built"
    for program in ("valgrind", "cc"):
        if shutil.which(program) is None:
            return f"no {program} here"
    if not Path("/usr/include/valgrind/callgrind.h").exists():
        return "no valgrind/callgrind.h here (it comes with valgrind, or its -dev package)"
    return None


def counted(options: argparse.Namespace) -> list[dict[str, object]]:
    """Run this file under callgrind, and read the counts it leaves.

    Raises:
        RuntimeError: callgrind or the program under it failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Path(__file__).with_name("callgrind.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", folder / "requests.so", source], check=True)
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, **REPEATABLE, **SETS[options.set], "PYTHONPATH": path}
        command = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder / 'counts'}"]
        command += [sys.executable, __file__, "--count", str(folder / "requests.so"), "--set", options.set]
        command += [
            "--shape",
            *map(str, options.shape),
            "--tokens",
            str(options.tokens),
            "--densities",
            *map(str, options.densities),
        ]
        done = subprocess.run([*command, "--ops", *options.ops], env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"callgrind ended with exit status {done.returncode}: {' '.join(command)}")
        counts: dict[str, list[int]] = {}
        for file in sorted(folder.glob("counts.*"), key=lambda file: int(file.suffix[1:])):
            text = file.read_text(encoding="utf-8")
            label = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
            if label:
                counts.setdefault(label[1], []).append(int(re.search(r"^totals: (\d+)", text, re.MULTILINE)[1]))
    return rows_of(counts, options)


def rows_of(counts: dict[str, list[int]], options: argparse.Namespace) -> list[dict[str, object]]:
    """A row per count, less what an empty call takes; `again` is a second count of the same call."""
    empty = min(counts.pop("nothing"))
    rows: list[dict[str, object]] = []
    for label, found in counts.items():
        what, contestant, density, nnz, tokens, targets = label.split("|")
        first, again = (value - empty for value in found)
        entries = int(nnz) * int(targets)
        rows.append({
            "what": what, "contestant": contestant, "out": options.shape[0], "in": options.shape[1],
            "density": float(density) if density else None, "nnz": int(nnz), "tokens": int(tokens) or None,
            "targets": int(targets), "instructions": first, "again": again, "per_entry": first / entries if entries else None,
        })  # fmt: skip
    for row in rows:
        same = [other for other in rows if other["what"] == row["what"] and other["density"] in (row["density"], None)]
        if row["what"] == LAYER:
            row["ratio"] = row["instructions"] / next(o["instructions"] for o in same if o["contestant"] == "frozen")
        elif not str(row["contestant"]).startswith("sprand"):
            ours = next(o["instructions"] for o in same if o["contestant"] == "sprand")
            row["ratio"] = row["instructions"] / ours
    return rows


def count_all(options: argparse.Namespace) -> None:
    """Under callgrind: every call twice, each into a dump of its own with its name."""
    import torch

    from bench_ops import FOR_ALL, TARGETS, TOKEN_OPS, Problem, contestants

    requests = ctypes.CDLL(str(options.count))
    if not requests.on_valgrind():
        raise SystemExit("instructions: --count is for a run under valgrind; leave it out")
    torch.set_num_threads(1)
    calls: list[tuple[str, Call]] = [("nothing", lambda: None), *layer_steps(options)]
    for density in options.densities:
        problem = Problem.of(tuple(options.shape), density, torch.float32, options.tokens)
        for op in options.ops:
            tokens, targets = options.tokens if op in TOKEN_OPS else 0, TARGETS if op in FOR_ALL else 1
            facts = f"{density}|{len(problem.indices)}|{tokens}|{targets}"
            calls += [(f"{op}|{name}|{facts}", without_grad(call)) for name, call in contestants(op, problem).items()]
    for _, call in calls:  # imports, caches and Python's specializing of its code are not counted, nor slowed down by counting
        for _ in range(WARM_CALLS):
            call()
    requests.instrument()
    for label, call in calls:
        call()
        for _ in range(2):
            requests.start()
            call()
            requests.stop(label.encode())


def without_grad(call: Call) -> Call:
    import torch

    return torch.no_grad()(call)


def layer_steps(options: argparse.Namespace) -> list[tuple[str, Call]]:
    """Forward, input gradient, and what a method adds, with its optimizer, of one linear layer."""
    import torch
    from torch import nn

    import sprand

    rows, cols = options.shape
    torch.manual_seed(0)
    x = torch.randn(options.tokens, cols, requires_grad=True)
    out = torch.randn(options.tokens, rows)

    def step(layer: nn.Module, optimizer: torch.optim.Optimizer | None) -> Call:
        def call() -> None:
            x.grad = None
            layer(x).backward(out)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return call

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(cols, rows, bias=False))

    tail = f"{options.tokens}|1"
    steps = [(f"{LAYER}|frozen||0|{tail}", step(model().requires_grad_(False), None))]
    for density in options.densities:
        layer = sprand.apply(model(), density=density, seed=0)
        nnz = sum(p.numel() for p in sprand.parameters(layer))
        steps.append((f"{LAYER}|sprand {100 * density:g} %|{density}|{nnz}|{tail}", step(layer, sprand.SparseAdamW(layer))))
    dense = model()
    steps.append((f"{LAYER}|full AdamW||{rows * cols}|{tail}", step(dense, torch.optim.AdamW(dense.parameters(), fused=True))))
    return steps


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from bench_ops import OPS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--shape", nargs=2, type=int, default=[512, 512], help="out, in")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.01, 0.05])
    parser.add_argument("--set", choices=tuple(SETS), default="avx2", help="instruction set; valgrind knows no later one")
    parser.add_argument("--count", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="one operator on a tiny weight: does it run at all?")
    options = parser.parse_args(argv)
    if options.quick:
        options.shape, options.tokens, options.densities, options.ops = [64, 64], 32, [0.01], ["gather"]
    return options


if __name__ == "__main__":
    raise SystemExit(main())
