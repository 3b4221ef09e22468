"""Two ranks train whole columns as one process does, to the bit, and save the same adapter: DDP and FSDP2."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import ranks
import sprand
from ranks import HALVES, TARGETS, adamw, assert_same_training, made, train, trained_alone
from sprand.adapters.file import AdapterFile


def columns(strategy):
    return lambda: made(**TARGETS, layout="columns", strategy=strategy)


def replicas_train_as_one_process(rank, folder):
    for strategy in ("random", "magnitude"):
        model = columns(strategy)()
        train(DistributedDataParallel(model), adamw(model), HALVES[rank : rank + 1])
        assert_same_training(model, trained_alone(make=columns(strategy)))


def shards_train_and_are_saved_as_one_process(rank, folder):
    from torch.distributed.fsdp import fully_shard

    for strategy in ("random", "magnitude"):
        alone, model = trained_alone(make=columns(strategy)), columns(strategy)()
        for module in (model.linear, model):
            fully_shard(module)
        train(model, adamw(model), HALVES[rank : rank + 1])
        assert_same_training(model, alone)
        sprand.save(model, folder / f"{strategy} of two")
        if rank == 0:
            sprand.save(alone, folder / f"{strategy} of one")
        dist.barrier()
        two, one = (AdapterFile.read(folder / f"{strategy} of {count}") for count in ("two", "one"))
        assert two.targets == one.targets and two.config == one.config and two.tensors.keys() == one.tensors.keys()
        assert all(torch.equal(value, one.tensors[name]) for name, value in two.tensors.items())
        stored = [name.rpartition("sprand_")[2] for name in two.tensors]
        assert ("columns" in stored) == (strategy == "magnitude")


test_two_ranks = ranks.test_of([replicas_train_as_one_process, shards_train_and_are_saved_as_one_process])
