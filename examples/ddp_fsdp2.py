"""Two processes train one model's entries, under DistributedDataParallel and under FSDP2.

Run it with `torchrun --nproc_per_node 2 examples/ddp_fsdp2.py`, or plainly: it starts its two processes itself then.
"""

import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sprand


def train(shard: bool) -> tuple[nn.Module, float]:
    """A plain loop; each rank has its own half of every batch. The entries come from a seed, and nothing is sent for them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8))
    sprand.apply(model, density=0.05, seed=0)
    called = fully_shard(model) if shard else DistributedDataParallel(model)
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    for step in range(50):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step)).chunk(2)[dist.get_rank()]
        loss = (called(x) - x[:, :8].sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, loss.item()


def run(rank: int, port: str) -> None:
    """What each process does."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo")
    _, loss = train(shard=False)
    model, other = train(shard=True)
    sprand.save(model, "sharded-adapter" if len(sys.argv) < 2 else sys.argv[1])  # on every rank; the first one writes
    print(f"rank {rank}: loss {loss:.4f} with DDP, {other:.4f} with FSDP2", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), os.environ["MASTER_PORT"])
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        mp.spawn(run, (port,), nprocs=2)
