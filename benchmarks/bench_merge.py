"""Merging an adapter into a checkpoint: time against a plain copy of its files, and against loading, patching and saving."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import sprand
from report import RESULTS, command_line, markdown, progress, quantiles, write_csv, write_markdown
from sprand.adapters.file import AdapterFile
from sprand.checkpoint.merge import merge, verify
from sprand.checkpoint.revert import revert

PLAIN = "copy"
COLUMNS = (
    "method", "bytes", "entries", "density", "dtype", "seconds", "seconds_p20", "seconds_p80", "ratio", "cpu_seconds", "rounds",
)  # fmt: skip
TABLE = {
    "method": ("what", ""), "seconds": ("seconds", ".2f"), "seconds_p20": ("p20", ".2f"), "seconds_p80": ("p80", ".2f"),
    "ratio": ("over a copy", ".2f"), "cpu_seconds": ("CPU seconds", ".2f"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="bench_merge_", dir=options.folder) as name:
        folder = Path(name)
        entries = make(folder, options)
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        methods = contestants(folder)
        samples: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
        with progress(len(methods) * (options.rounds + 1), "merge") as bar:
            for turn in range(options.rounds + 1):
                for method, call in methods.items():
                    shutil.rmtree(folder / "out", ignore_errors=True)
                    if options.sync:
                        os.sync()
                    wall, cpu = time.perf_counter(), time.process_time()
                    call(folder / "out")
                    if options.sync:
                        os.sync()
                    if turn:
                        samples[method].append((time.perf_counter() - wall, time.process_time() - cpu))
                    bar.advance()
    rows = []
    for method, found in samples.items():
        seconds, low, high = quantiles([wall for wall, _ in found])
        ratio, *_ = quantiles([wall / plain for (wall, _), (plain, _) in zip(found, samples[PLAIN], strict=True)])
        cpu, *_ = quantiles([cpu for _, cpu in found])
        rows.append(
            {
                "method": method, "bytes": size, "entries": entries, "density": options.density, "dtype": options.dtype,
                "seconds": seconds, "seconds_p20": low, "seconds_p80": high, "ratio": ratio, "cpu_seconds": cpu,
                "rounds": options.rounds,
            }
        )  # fmt: skip
    write_csv(options.out / "merge.csv", rows, COLUMNS)
    synced = "each with a sync of the disk" if options.sync else "to where the system has taken the bytes, not to the disk"
    facts = f"{size / 1e9:.2f} GB of {options.dtype}, {entries:,} entries ({options.density:g}), {synced}"
    write_markdown(
        options.out / "merge.md", "Merging files", command_line(__file__, sys.argv[1:]), [(facts, markdown(rows, TABLE))]
    )
    return 0


def make(folder: Path, options: argparse.Namespace) -> int:
    """A checkpoint of random matrices in one file, and a random adapter for it; returns how many entries it has."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict()
    for number in range(options.layers):
        linear = torch.nn.Linear(options.width, options.width, bias=False, device="meta").to_empty(device="cpu")
        linear.weight.data = torch.empty(options.width, options.width, dtype=getattr(torch, options.dtype)).normal_(std=0.02)
        model[f"layer{number}"] = linear
    (folder / "base").mkdir()
    save_file(dict(model.state_dict()), folder / "base" / "model.safetensors")
    sprand.apply(model, density=options.density)
    for p in sprand.parameters(model):
        p.data.normal_(std=1e-3)
    sprand.save(model, folder / "adapter")
    merge(folder / "base", [(folder / "adapter", 1.0)], folder / "merged")
    return sum(p.numel() for p in sprand.parameters(model))


def contestants(folder: Path) -> dict[str, Callable[[Path], object]]:
    """What is timed, in turn; each makes the folder it is given."""
    base, adapters = folder / "base", [(folder / "adapter", 1.0)]

    def loaded(out: Path) -> None:
        """Every tensor in memory, one index_put_ each, everything written anew."""
        adapter = AdapterFile.read(folder / "adapter")
        weights = load_file(base / "model.safetensors")
        for name in adapter.targets:
            indices, deltas = adapter.entries(name)
            flat = weights[name].view(-1)
            flat[indices.long()] = (flat[indices.long()].float() + deltas).to(flat.dtype)
        out.mkdir()
        save_file(weights, out / "model.safetensors")

    return {
        PLAIN: lambda out: shutil.copytree(base, out),
        "sprand merge": lambda out: merge(base, adapters, out),
        "sprand merge, no base values": lambda out: merge(base, adapters, out, revertible=False),
        "verify": lambda out: verify(base, adapters, folder / "merged"),
        "revert": lambda out: revert(folder / "merged", adapters, out),
        "load, index_put_, save": loaded,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="of the square matrices")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count")
    parser.add_argument("--sync", action="store_true", help="count the time until the disk has the bytes")
    parser.add_argument("--folder", type=Path, help="where the files are made (default: the system's folder for temporary files)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two small matrices: does it run at all?")
    options = parser.parse_args(argv)
    if options.quick:
        options.layers, options.width, options.rounds = 2, 64, 1
    return options


if __name__ == "__main__":
    raise SystemExit(main())
