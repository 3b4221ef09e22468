"""Two ranks under DistributedDataParallel train what one process does, to the bit, and send nothing but deltas."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ranks
import sprand
from models import assert_same_bits, bits, tokens_and_labels
from ranks import HALVES, LR, Wire, adamw, assert_same_training, made, train, trained_alone
from sprand.serving import DeltaReceiver, DeltaSync

OPTIONS = {
    "plain": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
}


def sparse(model):
    return sprand.SparseAdamW(model, lr=LR)


def each_option_trains_as_one_process(rank, folder):
    for make in (adamw, sparse):
        alone = trained_alone(optimizer=make)
        for options in OPTIONS.values():
            model = made()
            train(DistributedDataParallel(model, **options), make(model), HALVES[rank : rank + 1])
            assert_same_training(model, alone)
            sprand.write(alone)
            sprand.write(model)
            assert_same_bits(bits(model), bits(alone))


def only_deltas_travel(rank, folder):
    for name, options in OPTIONS.items():
        model = made()
        trained = sum(p.nbytes for p in sprand.parameters(model))
        with Wire() as start:
            wrapped = DistributedDataParallel(model, **options)
        weights = sum(p.nbytes for p in model.parameters())
        beyond = start.bytes["broadcast"] - weights  # DDP compares the shapes of the parameters first
        assert 0 <= beyond < 256 < sum(buffer.nbytes for buffer in model.buffers()), start.bytes
        optimizer = sparse(model)
        train(wrapped, optimizer, HALVES[rank : rank + 1], steps=3)  # buckets are settled in the first ones
        with Wire() as step:
            train(wrapped, optimizer, HALVES[rank : rank + 1], steps=3)
        used = 3 * 4 * len(sprand.parameters(model)) if name == "find_unused" else 0  # one int32 says which were used
        assert step.bytes == {"allreduce": 3 * trained + used}, step.bytes


def accumulated_gradients_travel_once(rank, folder):
    model, alone = made(), made()
    wrapped, optimizer, other = DistributedDataParallel(model), sparse(model), sparse(alone)
    x, y = tokens_and_labels()
    parts = [slice(2 * i, 2 * i + 2) for i in range(4)]
    with Wire() as wire:
        with wrapped.no_sync():
            (F.cross_entropy(wrapped(x[parts[2 * rank]]), y[parts[2 * rank]]) / 2).backward()
        (F.cross_entropy(wrapped(x[parts[2 * rank + 1]]), y[parts[2 * rank + 1]]) / 2).backward()
    assert wire.bytes["allreduce"] == sum(p.nbytes for p in sprand.parameters(model))
    optimizer.step()
    halves = []
    for half in (0, 1):
        for part in parts[2 * half : 2 * half + 2]:
            (F.cross_entropy(alone(x[part]), y[part]) / 2).backward()
        halves.append([p.grad.clone() for p in sprand.parameters(alone)])
        alone.zero_grad()
    for p, *grads in zip(sprand.parameters(alone), *halves, strict=True):
        p.grad = grads[0] / 2 + grads[1] / 2
    other.step()
    assert_same_training(model, alone)


def ranks_draw_the_same_positions_and_send_nothing(rank, folder):
    torch.manual_seed(100 + rank)
    with Wire() as wire:
        model = sprand.apply(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8)), density=0.1, seed=5)
    assert not wire.bytes
    mine = torch.cat([layer.sprand_indices for layer in model])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(both[0], both[1])


def one_rank_saves_alone(rank, folder):
    """Nothing is sent: the other rank is elsewhere."""
    model = trained_alone()
    if rank == 0:
        sprand.save(model, folder / "adapter")
    dist.barrier()
    torch.manual_seed(0)
    base = sprand.unmerge(copy.deepcopy(model))
    assert_same_training(sprand.load(base, folder / "adapter"), model)


def the_adapter_file_is_that_of_one_process(rank, folder):
    model = made()
    train(DistributedDataParallel(model), sparse(model), HALVES[rank : rank + 1])
    if rank == 0:
        two, one = sprand.save(model, folder / "two"), sprand.save(trained_alone(optimizer=sparse), folder / "one")
        assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
        assert all((two / path.name).read_bytes() == path.read_bytes() for path in one.iterdir())
    dist.barrier()


def a_copy_follows_a_trainer(rank, folder):
    """Rank 0 trains and sends positions once and values after each step; rank 1 serves a copy, equal to the bit."""
    if rank == 0:
        model = made(torch.bfloat16)
        optimizer, sync = sparse(model), DeltaSync(model)
        message = sync.indices()
        dist.send(torch.tensor([message.numel(), sync.values_bytes]), 1)
        dist.send(message, 1)
        for number in range(3):
            train(model, optimizer, HALVES[:1], steps=1, start=number)
            dist.send(sync.values(), 1)
        sprand.write(model)
        torch.save(bits(model), folder / "trained.pt")
        dist.barrier()
        return
    torch.manual_seed(0)
    receiver = DeltaReceiver(copied := ranks.Net().to(torch.bfloat16))
    sizes = torch.empty(2, dtype=torch.int64)
    dist.recv(sizes, 0)
    message = torch.empty(int(sizes[0]), dtype=torch.uint8)
    dist.recv(message, 0)
    receiver.receive(message)
    message = torch.empty(int(sizes[1]), dtype=torch.uint8)
    for version in (1, 2, 3):
        dist.recv(message, 0)
        assert receiver.receive(message) == version
    dist.barrier()
    assert_same_bits(bits(copied), torch.load(folder / "trained.pt"))


CHECKS = (
    each_option_trains_as_one_process, only_deltas_travel, accumulated_gradients_travel_once,
    ranks_draw_the_same_positions_and_send_nothing, one_rank_saves_alone, the_adapter_file_is_that_of_one_process,
    a_copy_follows_a_trainer,
)  # fmt: skip

test_two_ranks = ranks.test_of(CHECKS)
