"""Two ranks train PEFT models of sprand under DDP, FSDP2 and ZeRO as one process does, to the bit; what they save and refuse."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import ranks
import sprand
from models import assert_same_bits, tokens_and_labels
from peft_models import peft, trainable
from ranks import HALVES, LR, TARGETS, Net, Wire, train, trained_alone
from sprand.layers.sharding import whole
from sprand.peft import SprandConfig, SprandLayer


def base(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Net().to(dtype)


def made(dtype=torch.float32, **fields):
    """The same net, targets and entries as those of the other door."""
    return peft.get_peft_model(base(dtype=dtype), SprandConfig(**(fields or TARGETS)))


def adamw(model):
    return torch.optim.AdamW(trainable(model), lr=LR, foreach=False)


def fused(model):
    return torch.optim.AdamW(trainable(model), lr=LR, fused=True)


def sparse(model):
    return sprand.SparseAdamW(model, lr=LR)


def alone(make=made, optimizer=adamw, steps=4):
    return trained_alone(make, optimizer, steps)


def trained_values(model):
    return {name: whole(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(model, expected):
    values = trained_values(expected)
    assert len(values) == 7
    assert_same_bits(trained_values(model), values)


def sharded(model, again=True, **options):
    """Each PEFT layer on its own but that of the norm, which the root shards with the head."""
    for layer in (model.base_model.model.embed, model.base_model.model.linear, model.base_model.model.conv):
        assert isinstance(layer, SprandLayer)
        fully_shard(layer, reshard_after_forward=again, **options)
    return fully_shard(model, reshard_after_forward=again, **options)


def trained_sharded(rank, again=True, make=made, optimizer=adamw, steps=4):
    model = sharded(make(), again)
    train(model, optimizer(model), HALVES[rank : rank + 1], steps)
    return model


def engine(model, optimizer, stage, **options):
    from test_distributed_deepspeed import engine as start

    return start(model, optimizer, stage, **options)


def trained_by_zero(rank, stage, make=made, steps=4):
    from test_distributed_deepspeed import go

    model = make()
    wrapped = engine(model, adamw(model), stage)
    go(wrapped, rank, steps)
    return model, wrapped


def assert_saved(model, folder, rank, expected):
    """Saved on every rank, written by the first, loaded into a base that is not sharded."""
    model.save_pretrained(folder, is_main_process=rank == 0)
    dist.barrier()
    loaded = peft.PeftModel.from_pretrained(base(), folder, is_trainable=True)
    assert_same(loaded, expected)
    x, _ = tokens_and_labels()
    with torch.no_grad():
        assert torch.equal(loaded(x), expected(x))


def ddp_trains_as_one_process(rank, folder):
    for make in (adamw, sparse):
        expected = alone(optimizer=make)
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
            model = made()
            train(DistributedDataParallel(model, **options), make(model), HALVES[rank : rank + 1])
            assert_same(model, expected)
    assert_saved(model, folder / "ddp", rank, expected)


def ddp_sends_nothing_but_deltas(rank, folder):
    model = made()
    with Wire() as start:
        wrapped = DistributedDataParallel(model)
    beyond = start.bytes["broadcast"] - sum(p.nbytes for p in model.parameters())
    assert 0 <= beyond < 256 < sum(buffer.nbytes for buffer in model.buffers()), start.bytes
    optimizer = sparse(model)
    train(wrapped, optimizer, HALVES[rank : rank + 1], steps=2)
    with Wire() as step:
        train(wrapped, optimizer, HALVES[rank : rank + 1], steps=1)
    assert step.bytes == {"allreduce": sum(p.nbytes for p in trainable(model))}, step.bytes


def every_resharding_trains_as_one_process(rank, folder):
    expected = alone()
    for again in (True, False):
        assert_same(trained_sharded(rank, again), expected)
    ours, torchs = trained_sharded(rank, optimizer=sparse), trained_sharded(rank, optimizer=fused)
    assert_same(ours, torchs)


def base_layers_may_be_sharded_by_themselves(rank, folder):
    """A policy that wraps classes of layers splits a weight from its deltas."""
    expected = alone()
    for again in (True, False):
        model = made()
        for name in ("embed", "linear", "conv", "norm"):
            fully_shard(getattr(model.base_model.model, name).base_layer, reshard_after_forward=again)
        fully_shard(model)
        train(model, adamw(model), HALVES[rank : rank + 1])
        assert_same(model, expected)
        with model.disable_adapter(), torch.no_grad():
            assert torch.equal(model(tokens_and_labels()[0]), base()(tokens_and_labels()[0]))


def mixed_precision_rounds_once(rank, folder):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for again in (True, False):
        model = sharded(made(), again, mp_policy=policy)
        train(model, sparse(model), HALVES[rank : rank + 1], steps=3)
        assert all(p.dtype == torch.float32 for p in trainable(model))
        plain = made()
        for name, p in plain.named_parameters():
            if p.requires_grad:
                p.data.copy_(whole(model.get_parameter(name)).bfloat16())  # FSDP2 casts all it gathers
        x, _ = tokens_and_labels()
        with torch.no_grad():
            assert torch.equal(model(x), plain.merge_and_unload().bfloat16()(x))
    assert_saved(model, folder / "mixed", rank, alone_with(model))


def alone_with(model):
    """A model that is not sharded, with the values of one that is."""
    sprand.layers.sharding.reshard(model)
    result = made()
    for name, value in trained_values(model).items():
        result.get_parameter(name).data.copy_(value)
    return result


def shards_are_saved_as_adapters(rank, folder):
    expected = alone()
    model = trained_sharded(rank, again=False)
    assert_saved(model, folder / "fsdp", rank, expected)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(folder / "gathered", state_dict=state)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (folder / "gathered" / name).read_bytes() == (folder / "fsdp" / name).read_bytes()
    with torch.no_grad():
        model(tokens_and_labels()[0])  # the root's own parameters stay gathered after a forward
    assert_saved(model, folder / "again", rank, expected)


def checkpoints_hold_the_base_and_a_new_base_is_taken(rank, folder):
    options = StateDictOptions(full_state_dict=True)
    model = trained_sharded(rank, again=False)
    state = get_model_state_dict(model, options=options)
    assert torch.equal(state["base_model.model.linear.base_layer.weight"], base().linear.weight)
    other = {name: value for name, value in get_model_state_dict(peft.get_peft_model(base(7), SprandConfig(**TARGETS))).items()}
    for again in (True, False):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        moved = sharded(made(), again)
        set_model_state_dict(moved, other, options=options)
        cast = sharded(made(), again, mp_policy=policy)
        set_model_state_dict(cast, other, options=options)
        expected = peft.get_peft_model(base(7), SprandConfig(**TARGETS))
        for a, b in zip(moved.buffers(), expected.buffers(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(cast.buffers(), expected.buffers(), strict=True):
            assert torch.equal(a, b)
        train(moved, adamw(moved), HALVES[rank : rank + 1])
        train(expected, adamw(expected), HALVES)
        assert_same(moved, expected)


def adapters_are_switched_and_disabled_while_sharded(rank, folder):
    """A reference forward stands between forward and backward, as in DPO; another adapter, and two at once, are made active."""
    x, y = tokens_and_labels()

    def two():
        model = made(density=0.2, target_modules=["embed", "linear", "conv"])
        model.add_adapter("other", SprandConfig(density=0.1, seed=3, target_modules=["embed", "linear", "conv"]))
        model.base_model.set_adapter(["default", "other"])
        return model

    def go(model, parts):
        optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "sprand_delta" in name], lr=LR, foreach=False)
        seen = []
        for active in ("other", ["default", "other"], "default"):
            model.base_model.set_adapter(active)
            for part in parts:
                loss = F.cross_entropy(model(x[part]), y[part]) / len(parts)
                with model.disable_adapter(), torch.no_grad():
                    seen.append(model(x))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                seen.append(model(x))
        return seen[-1], seen[0]

    plain = two()
    expected = go(plain, HALVES)
    for again in (True, False):
        model = sharded(two(), again)
        got = go(model, HALVES[rank : rank + 1])
        for a, b in zip(got, (*expected[:1], base()(x).detach()), strict=True):
            assert torch.equal(a, b)
        named = dict(model.named_parameters())
        for name, p in plain.named_parameters():
            if "sprand_delta" in name:
                assert torch.equal(whole(named[name]), p.detach()), name


def fsdp1_trains_and_is_saved(rank, folder):
    expected, model = alone(), made()
    policy = ModuleWrapPolicy({SprandLayer})
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    train(wrapped, adamw(wrapped), HALVES[rank : rank + 1])
    state = wrapped.state_dict()
    trained = peft.get_peft_model_state_dict(wrapped, state_dict=dict(state))
    assert_same_bits(trained, peft.get_peft_model_state_dict(expected))
    model.save_pretrained(folder / "fsdp1", is_main_process=rank == 0, state_dict=state)
    dist.barrier()
    assert_same_bits(peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(base(), folder / "fsdp1")), trained)
    for call in (model.disable_adapter().__enter__, model.merge_adapter, model.unload, lambda: model.delete_adapter("default")):
        with pytest.raises(ValueError, match=r"got one sharded by FullyShardedDataParallel \(FSDP1\)") as refused:
            call()
        assert "disable_adapter()" not in str(refused.value) and "set_adapter" not in str(refused.value)
    model.set_adapter("default")


def refuses(model, kind):
    for verb, call in {
        "merge_adapter": model.merge_adapter,
        "unmerge_adapter": model.unmerge_adapter,
        "unload": model.merge_and_unload,
        "delete_adapter": lambda: model.delete_adapter("default"),
        "get_peft_model": lambda: model.add_adapter("second", SprandConfig(density=0.1)),
    }.items():
        with pytest.raises(ValueError, match=rf"^{verb}: expected a model whose parameters are whole, got .* {kind}"):
            call()


def what_shards_cannot_do_is_refused(rank, folder):
    refuses(trained_sharded(rank, again=False), "fully_shard")
    refuses(trained_by_zero(rank, 3)[0], "ZeRO-3")
    model = made()
    model.merge_adapter()
    fully_shard(model)
    with pytest.raises(ValueError, match=r"^disable_adapter: .* unmerge the adapters before the model is sharded"):
        model.disable_adapter().__enter__()


def every_stage_trains_as_one_process(rank, folder):
    x, _ = tokens_and_labels()
    expected = alone()
    for stage in (1, 2, 3):
        model, wrapped = trained_by_zero(rank, stage)
        assert_same(model, expected)
        assert_saved(model, folder / f"zero {stage}", rank, expected)
        if stage == 3:
            state = wrapped._zero3_consolidated_16bit_state_dict()
            if rank == 0:
                model.save_pretrained(folder / "consolidated", state_dict=state)
                for name in ("adapter_model.safetensors", "adapter_config.json"):
                    assert (folder / "consolidated" / name).read_bytes() == (folder / "zero 3" / name).read_bytes()
    body = {"density": 0.2, "target_modules": ["embed", "linear", "conv"]}
    model, wrapped = trained_by_zero(rank, 3, lambda: made(**body))
    with torch.no_grad():
        before = wrapped(x)
        with model.disable_adapter():
            assert torch.equal(wrapped(x), base()(x))
        assert torch.equal(wrapped(x), before)
    assert_same_bits({"": before}, {"": alone(lambda: made(**body))(x).detach()})


def a_model_made_in_parts_takes_adapters(rank, folder):
    """As transformers loads a model for ZeRO-3."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    def in_parts():
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Net()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model.load_state_dict(base().state_dict())
        return peft.get_peft_model(model, SprandConfig(density=0.2, target_modules=["embed", "linear", "conv"]))

    def expected():
        return made(density=0.2, target_modules=["embed", "linear", "conv"])

    model, _ = trained_by_zero(rank, 3, in_parts)
    assert_same_bits(trained_values(model), trained_values(alone(expected)))


CHECKS = (
    ddp_trains_as_one_process, ddp_sends_nothing_but_deltas, every_resharding_trains_as_one_process,
    base_layers_may_be_sharded_by_themselves, mixed_precision_rounds_once, shards_are_saved_as_adapters,
    checkpoints_hold_the_base_and_a_new_base_is_taken, adapters_are_switched_and_disabled_while_sharded,
    fsdp1_trains_and_is_saved,
)  # fmt: skip
ZERO_CHECKS = (every_stage_trains_as_one_process, what_shards_cannot_do_is_refused, a_model_made_in_parts_takes_adapters)

test_two_ranks = ranks.test_of(CHECKS)

test_two_ranks_of_zero = ranks.test_of(ZERO_CHECKS, needs="deepspeed")
