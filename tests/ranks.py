"""Two processes that run the same checks, each a function of its rank, and what one process must have come to."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sprand
from models import tokens_and_labels

WORLD = 2
LR = 1e-2
IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "sprand.peft"]  # once, and not by each rank


class Net(nn.Module):
    """An embedding, linear layers, a convolution and a norm: the path of each kind of layer, with gradients through all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.linear = nn.Linear(32, 64)
        self.conv = nn.Conv1d(64, 32, 3)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens):
        hidden = torch.tanh(self.linear(self.embed(tokens)))
        hidden = torch.relu_(self.conv(hidden.transpose(1, 2))).transpose(1, 2)
        return self.head(self.norm(hidden).mean(1))


TARGETS = {
    "density": 0.2,
    "target_modules": ["embed", "linear", "conv"],
    "target_parameters": ["norm.weight", "linear.bias"],
    "modules_to_save": ["head"],
}


def made(dtype: torch.dtype = torch.float32, **targets) -> nn.Module:
    """The model that the ranks train."""
    torch.manual_seed(0)
    return sprand.apply(Net().to(dtype), **(targets or TARGETS))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of torch whose arithmetic is the same for each element, wherever in a tensor it stands."""
    return torch.optim.AdamW(sprand.parameters(model), lr=LR, foreach=False)


def train(called: nn.Module, optimizer, parts, steps=4, start=0, backward=None) -> torch.Tensor:
    """Train on the given rows of each batch, one backward pass per part: its losses, `[steps]`.

    A rank has one part, and averages its gradient with the other's. A process that has both parts halves their losses, which
    is exact, and adds their gradients: the same sum of the same two numbers.
    """
    losses = []
    for step in range(start, start + steps):
        x, y = tokens_and_labels(step)
        total = 0.0
        for part in parts:
            loss = F.cross_entropy(called(x[part]).to(torch.float32), y[part]) / len(parts)
            (backward or torch.Tensor.backward)(loss)
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return torch.tensor(losses, dtype=torch.float64)


HALVES = (slice(0, 4), slice(4, 8))


def trained_alone(make=made, optimizer=adamw, steps=4) -> nn.Module:
    """What one process makes of both ranks' rows."""
    model = make()
    train(model, optimizer(model), HALVES, steps)
    return model


class Wire(TorchDispatchMode):
    """Counts the bytes that collectives carry: what is reduced, broadcast or scattered, and what a gather results in."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
            self.bytes[func._schema.name.partition("::")[2].strip("_")] += max(sum_of(tensors), default=0)
        return func(*args, **(kwargs or {}))


def sum_of(tensors):
    """The largest tensor of a call with one input and one output, or all of a list that is reduced in one call."""
    sizes = [value.nbytes for value in tensors]
    return [max(sizes)] if len(sizes) == 2 else [sum(sizes)]


def _one_rank(rank, port, folder, module, names):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{WORLD}", "LOCAL_WORLD_SIZE": f"{WORLD}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    report = {}
    for name in names:
        try:
            getattr(sys.modules[module] if module in sys.modules else __import__(module), name)(rank, Path(folder))
            report[name] = None
        except Exception:
            report[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def start(function, args=(), nprocs=WORLD) -> None:
    """As `torch.multiprocessing.spawn`, of ranks that are forked from a process that has imported what takes seconds."""
    method = "spawn"
    if sys.platform == "linux" and not torch.cuda.is_available():  # a context of CUDA is lost in a fork
        method = "forkserver"
        multiprocessing.set_forkserver_preload(IMPORTED)
    mp.start_processes(function, args, nprocs, start_method=method)


def run(module: str, names, folder: Path) -> list[dict[str, str | None]]:
    """Run functions `name(rank, folder)` of a test module on two ranks: by rank, each one's traceback, or None."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        start(_one_rank, (port, str(folder), module, list(names)))
    except Exception as error:  # one rank's failed check may bring the other one down in a collective
        print(error)
    return [json.loads(path.read_text()) if path.exists() else {} for path in (folder / f"{rank}.json" for rank in range(WORLD))]


def test_of(checks, needs: str | None = None):
    """A test with a case for each check, all of them run by one start of two ranks.

    Args:
        checks: functions `check(rank, folder)` of one module.
        needs: a package without which the test is skipped.
    """
    module, names, reports = checks[0].__module__, [check.__name__ for check in checks], []

    @pytest.mark.skipif(sys.platform == "win32", reason="gloo over two processes")
    @pytest.mark.parametrize("check", names)
    def test_two_ranks(check, tmp_path_factory):
        if needs is not None:
            pytest.importorskip(needs, reason=f"{needs} is not installed")
        if not reports:
            reports.append(run(module, names, tmp_path_factory.mktemp("ranks")))
        all_passed(reports[0], check)

    return test_two_ranks


def all_passed(report, name) -> None:
    """Fail with the tracebacks of the ranks where a check failed."""
    found = [ran.get(name, "it did not run") for ran in report]
    failed = [f"rank {rank}:\n{text}" for rank, text in enumerate(found) if text is not None]
    assert not failed, "\n".join(failed)


def assert_same_training(model: nn.Module, expected: nn.Module) -> None:
    """All that trains is the same to the bit, sharded or not."""
    others = dict(sprand.adapters.model.named_parameters(expected))
    for name, p in sprand.adapters.model.named_parameters(model):
        assert torch.equal(sprand.layers.sharding.whole(p), others[name].detach()), name
    assert len(others) == len(sprand.parameters(model)) > 0
