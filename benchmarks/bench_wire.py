"""What travels between two ranks in a training step: bytes under DDP and FSDP2, for sprand, LoRA and full AdamW."""

from __future__ import annotations

import argparse
import datetime
import os
import socket
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from methods import DTYPES, Trainer, Unavailable, build, expand, random_tokens
from report import RESULTS, Row, command_line, write_csv, write_markdown
from report import markdown as table

METHODS = ("sprand", "lora", "full")
COLLECTIVES = {
    "broadcast": "broadcast_", "all_reduce": "allreduce_", "all_gather": "_allgather_base_",
    "reduce_scatter": "_reduce_scatter_base_",
}  # fmt: skip
COLUMNS = (
    "width", "layers", "dtype", "strategy", "method", "label", "trained", "start_bytes",
    *(f"{name}_bytes" for name in COLLECTIVES), "step_bytes", "gradient_bytes", "bytes_per_trained", "note",
)  # fmt: skip
TABLE = {
    "label": ("method", ""), "trained": ("trained weights", ",d"), "gradient_bytes": ("gradients, bytes", ",d"),
    "all_gather_bytes": ("gathered weights, bytes", ",d"), "step_bytes": ("a step, bytes", ",d"),
    "bytes_per_trained": ("gradient bytes per trained weight", ".2f"), "start_bytes": ("at the start, bytes", ",d"),
    "note": ("", ""),
}  # fmt: skip
STRATEGIES = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP2, each decoder layer sharded"}


class Wire(TorchDispatchMode):
    """Counts the payload of every collective: what is reduced, scattered or broadcast, and what a gather results in."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [value.nbytes for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
            self.bytes[func._schema.name.partition("::")[2]] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        free.close()
        mp.spawn(rank_main, (address, options, folder), nprocs=2)
        rows = torch.load(Path(folder) / "rows.pt")
    write_csv(options.out / "wire.csv", rows, COLUMNS)
    sections = []
    for dtype in options.dtypes:
        for strategy, title in STRATEGIES.items():
            here = [row for row in rows if (row["dtype"], row["strategy"]) == (dtype, strategy)]
            sections.append((f"{title}; {options.width} wide, {options.layers} layers, {dtype}", table(here, TABLE)))
    write_markdown(options.out / "wire.md", "Bytes between two ranks in a training step", command, sections)
    return 0


def rank_main(rank: int, address: dict[str, str], options: argparse.Namespace, folder: str) -> None:
    """One of the two processes; the first one writes the rows of the table."""
    warnings.simplefilter("ignore")
    os.environ |= address | {"RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    rows = []
    for dtype in options.dtypes:
        for strategy in STRATEGIES:
            for method in expand(METHODS, options.densities, dtype):
                row: dict[str, object] = {
                    "width": options.width, "layers": options.layers, "dtype": dtype, "strategy": strategy,
                    "method": method.key, "label": method.label,
                }  # fmt: skip
                try:
                    trainer = Trainer.of(method, build(options.width, options.layers, dtype), random_tokens(options.tokens))
                    rows.append(row | count(trainer, strategy))
                except Unavailable as error:
                    rows.append(row | {"note": str(error)})
    if rank == 0:
        torch.save(rows, Path(folder) / "rows.pt")
    dist.destroy_process_group()


def count(trainer: Trainer, strategy: str) -> Row:
    """The payloads of setting up, and of the fourth step: in the first ones DDP settles its buckets."""
    trained = trainer.trained
    with Wire() as start:
        if strategy == "ddp":
            trainer.model = DistributedDataParallel(trainer.model)
        else:
            for module in list(trainer.model.modules()):
                if type(module).__name__ == "LlamaDecoderLayer":
                    fully_shard(module)
            fully_shard(trainer.model)
            if hasattr(trainer.optimizer, "param_groups"):
                sharded = [p for p in trainer.model.parameters() if p.requires_grad]
                trainer.optimizer = type(trainer.optimizer)(sharded, lr=1e-3)
    for _ in range(3):
        trainer.step()
    with Wire() as wire:
        trainer.step()
    moved = {f"{name}_bytes": wire.bytes.pop(op, 0) for name, op in COLLECTIVES.items()}
    if wire.bytes:
        raise RuntimeError(f"collectives that the table has no column for: {dict(wire.bytes)}")
    gradients = moved["all_reduce_bytes"] + moved["reduce_scatter_bytes"]
    return moved | {
        "trained": trained, "start_bytes": sum(start.bytes.values()), "step_bytes": sum(moved.values()),
        "gradient_bytes": gradients, "bytes_per_trained": gradients / trained,
    }  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="per rank; they change nothing in the table")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.001, 0.01, 0.05], help="of sprand; LoRA: 1 %%")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp32"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all?")
    options = parser.parse_args(argv)
    if options.quick:
        options.width, options.layers, options.tokens, options.densities = 64, 1, 16, [0.01]
    if min(options.width, options.layers, options.tokens) < 1 or not all(0 < density <= 1 for density in options.densities):
        parser.error("expected a positive width, layers and tokens, and densities in (0, 1]")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
