"""Two ranks train whole columns as one process does, to the bit, and save the same adapter: DDP and FSDP2."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import ranks
import sprand
from ranks import HALVES, TARGETS, Net, adamw, assert_same_training, made, train, trained_alone
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


SCORING = {
    "density": 0.2, "target_modules": ["linear"], "modules_to_save": ["head"], "layout": "columns", "strategy": "token_fisher",
    "score_steps": 2,
}  # fmt: skip


def scored():
    return made(**SCORING)


def drawn():
    """The columns that keep the place of those that are chosen."""
    return made(**SCORING | {"strategy": "random", "score_steps": None}).linear.sprand_indices


def replicas_choose_in_their_first_steps_as_one_process(rank, folder):
    alone, model = trained_alone(scored), scored()
    train(DistributedDataParallel(model), adamw(model), HALVES[rank : rank + 1])
    assert torch.equal(model.linear.sprand_indices, alone.linear.sprand_indices)
    assert not torch.equal(model.linear.sprand_indices, drawn())
    assert_same_training(model, alone)


def shards_choose_in_their_first_steps_as_one_process(rank, folder):
    from torch.distributed.fsdp import fully_shard

    alone = trained_alone(scored)
    for again, is_compiled in ((True, False), (False, False), (True, True)):
        model = scored()
        if is_compiled:
            model.linear.compile(fullgraph=True, backend="aot_eager")
        for module in (model.linear, model):
            fully_shard(module, reshard_after_forward=again)
        train(model, adamw(model), HALVES[rank : rank + 1])
        assert torch.equal(model.linear.sprand_indices, alone.linear.sprand_indices)
        assert_same_training(model, alone)
        sprand.save(model, folder / f"scored {again} {is_compiled}")


def shards_of_peft_choose_in_their_first_steps(rank, folder):
    import peft
    from torch.distributed.fsdp import fully_shard

    from peft_models import positions, trainable
    from sprand.peft import SprandConfig

    def wrapped():
        torch.manual_seed(0)
        return peft.get_peft_model(Net(), SprandConfig(**SCORING))

    def optimizer(model):
        return torch.optim.AdamW(trainable(model), lr=1e-2, foreach=False)

    alone, model = trained_alone(wrapped, optimizer), wrapped()
    for module in (model.base_model.model.linear, model):
        fully_shard(module)
    train(model, optimizer(model), HALVES[rank : rank + 1])
    assert torch.equal(*(positions(each)["linear.weight"] for each in (alone, model)))
    for one, two in zip(trainable(model), trainable(alone), strict=True):
        assert torch.equal(one.full_tensor(), two)


test_two_ranks = ranks.test_of(
    [
        replicas_train_as_one_process, shards_train_and_are_saved_as_one_process,
        replicas_choose_in_their_first_steps_as_one_process, shards_choose_in_their_first_steps_as_one_process,
        shards_of_peft_choose_in_their_first_steps,
    ]
)  # fmt: skip
