"""Two ranks under DeepSpeed ZeRO-1, 2 and 3 train what one process does, to the bit; what they save and resume."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ranks
import sprand
from models import assert_same_bits, tokens_and_labels
from ranks import HALVES, LR, TARGETS, Net, adamw, assert_same_training, made, train, trained_alone
from sprand.layers.sharding import whole

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def engine(model, optimizer, stage, **options):
    """DeepSpeed's engine, on CPUs and over gloo: its own kernel for shared memory would have to be compiled first."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        **options,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


class Steps:
    """The engine's step, which also drops gradients, for a loop that has an optimizer."""

    def __init__(self, wrapped):
        self.step = wrapped.step

    def zero_grad(self):
        pass


def go(wrapped, rank, steps=4, start=0):
    return train(wrapped, Steps(wrapped), HALVES[rank : rank + 1], steps, start, backward=wrapped.backward)


def fused(model):
    return torch.optim.AdamW(sprand.parameters(model), lr=LR, fused=True)


def sparse(model):
    return sprand.SparseAdamW(model, lr=LR)


UNTESTED = {"zero_allow_untested_optimizer": True}


def every_stage_trains_as_one_process(rank, folder):
    alone = trained_alone()
    for stage in (1, 2, 3):
        model = made()
        go(engine(model, adamw(model), stage), rank)
        assert_same_training(model, alone)


def whole_columns_train_as_one_process(rank, folder):
    def make():
        return made(**TARGETS | {"layout": "columns"})

    alone = trained_alone(make)
    for stage in (2, 3):
        model = make()
        go(engine(model, adamw(model), stage), rank)
        assert_same_training(model, alone)
        assert model.linear.sparse_entries().pattern.columns is not None


def columns_are_chosen_in_the_first_steps_as_by_one_process(rank, folder):
    scoring = {"layout": "columns", "strategy": "token_fisher", "score_steps": 2}

    def make():
        return made(density=0.2, target_modules=["linear"], modules_to_save=["head"], **scoring)

    alone = trained_alone(make)
    for stage in (1, 2, 3):
        model = make()
        go(engine(model, adamw(model), stage), rank)
        assert torch.equal(model.linear.sprand_indices, alone.linear.sprand_indices)
        assert_same_training(model, alone)


def sparse_adamw_steps_as_fused_adamw_does(rank, folder):
    for stage in (1, 2, 3):
        ours, torchs = made(), made()
        go(engine(ours, sparse(ours), stage, **UNTESTED), rank)
        go(engine(torchs, fused(torchs), stage), rank)
        for a, b in zip(sprand.parameters(ours), sprand.parameters(torchs), strict=True):
            assert torch.equal(whole(a), whole(b))


def sparse_adamw_is_asked_for_by_a_flag(rank, folder):
    model = made()
    with pytest.raises(AssertionError, match="zero_allow_untested_optimizer"):
        engine(model, sparse(model), 2)


def adapters_are_saved(rank, folder):
    alone = trained_alone()
    sprand.save(alone, folder / f"alone {rank}")
    for stage in (1, 3):
        model = made()
        go(engine(model, adamw(model), stage), rank)
        saved = folder / f"zero {stage}"
        if stage == 3 or rank == 0:
            sprand.save(model, saved)
        dist.barrier()
        assert (saved / "adapter_model.safetensors").read_bytes() == (
            folder / f"alone {rank}" / "adapter_model.safetensors"
        ).read_bytes()


def a_checkpoint_resumes_exactly(rank, folder):
    for stage in (2, 3):
        model = made()
        first = engine(model, adamw(model), stage)
        go(first, rank, steps=3)
        first.save_checkpoint(str(folder / f"checkpoint {stage}"))
        go(first, rank, steps=3, start=3)
        other = made()
        second = engine(other, adamw(other), stage)
        second.load_checkpoint(str(folder / f"checkpoint {stage}"))
        go(second, rank, steps=3, start=3)
        for a, b in zip(sprand.parameters(model), sprand.parameters(other), strict=True):
            assert torch.equal(whole(a), whole(b))


def zero_3_refuses_what_it_cannot_do(rank, folder):
    import deepspeed

    model = sprand.apply(Net(), density=0.2, target_modules=["linear"])
    wrapped = engine(model, adamw(model), 3)
    go(wrapped, rank, steps=2)
    for verb, call in {
        "merge": lambda: sprand.merge(model),
        "unmerge": lambda: sprand.unmerge(model),
        "switch": lambda: sprand.switch(model, None),
        "load": lambda: sprand.load(model, folder),
        "DynamicMask": lambda: sprand.DynamicMask(model),
    }.items():
        with pytest.raises(ValueError, match=rf"^{verb}: expected a model whose parameters are whole, got .* ZeRO-3"):
            call()
    headed = made()
    engine(headed, adamw(headed), 3)
    with pytest.raises(ValueError, match="modules trained in full cannot be put back under DeepSpeed ZeRO-3"):
        sprand.disabled(headed).__enter__()
    with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}):
        parts = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="apply: .* ZeRO-3 holds in parts.*GatheredParameters"):
        sprand.apply(parts, density=0.5)
    with deepspeed.zero.GatheredParameters(list(parts.parameters())):
        sprand.apply(parts, density=0.5)
    plain = sprand.apply(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), density=0.5)
    assert torch.equal(parts[0].sprand_indices, plain[0].sprand_indices)


def zero_3_is_disabled_exactly(rank, folder):
    torch.manual_seed(0)
    base = Net()
    x, _ = tokens_and_labels()
    torch.manual_seed(0)
    model = sprand.apply(Net(), density=0.2, target_modules=["linear", "conv", "embed"])
    wrapped = engine(model, adamw(model), 3)
    go(wrapped, rank, steps=3)
    with torch.no_grad():
        trained = wrapped(x)
        with sprand.disabled(model):
            assert torch.equal(wrapped(x), base(x))
        assert torch.equal(wrapped(x), trained)
    assert not torch.equal(trained, base(x))


def bfloat16_models_train(rank, folder):
    """Deltas stay float32 where a model is cast.

    ZeRO flattens each group into one dtype, so the head has a group of its own; ZeRO-3 wants one dtype of all that trains.
    """
    for stage in (1, 2, 3):
        model = made() if stage < 3 else made(density=0.2, target_modules=["embed", "linear", "conv"])
        named = list(sprand.adapters.model.named_parameters(model))
        groups = [[p for name, p in named if ("sprand_delta" in name) == deltas] for deltas in (True, False)]
        optimizer = torch.optim.AdamW([{"params": group} for group in groups if group], lr=LR)
        losses = go(engine(model, optimizer, stage, bf16={"enabled": True}), rank, steps=8)
        dist.all_reduce(losses)
        assert losses[-1] < losses[0]
        assert whole(model.linear.sprand_delta).dtype == torch.float32
        assert whole(model.head.weight).dtype == whole(model.linear.weight).dtype == torch.bfloat16
        for p in sprand.parameters(model):
            mine = whole(p)
            both = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(both, mine)
            assert_same_bits({"": both[0]}, {"": both[1]})


def zero_3_suggests_the_rate_of_one_process(rank, folder):
    expected, model = sprand.suggest_lr(made()), made()
    wrapped = engine(model, adamw(model), 3)
    assert sprand.suggest_lr(model) == expected
    go(wrapped, rank, steps=2)
    assert sprand.suggest_lr(model) == expected


CHECKS = (
    every_stage_trains_as_one_process, whole_columns_train_as_one_process,
    columns_are_chosen_in_the_first_steps_as_by_one_process, sparse_adamw_steps_as_fused_adamw_does,
    sparse_adamw_is_asked_for_by_a_flag, adapters_are_saved, a_checkpoint_resumes_exactly, zero_3_refuses_what_it_cannot_do,
    zero_3_is_disabled_exactly, bfloat16_models_train, zero_3_suggests_the_rate_of_one_process,
)  # fmt: skip

test_two_ranks = ranks.test_of(CHECKS)
