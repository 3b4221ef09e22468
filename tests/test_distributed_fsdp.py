"""Two ranks under FSDP2 (`fully_shard`) train what one process does, to the bit; what they save, resume and refuse."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import ranks
import sprand
from models import assert_same_bits, bits, tokens_and_labels
from ranks import HALVES, LR, TARGETS, Net, Wire, adamw, assert_same_training, made, train, trained_alone
from sprand.layers.sharding import whole
from sprand.serving import DeltaReceiver, DeltaSync


def sharded(model, again=True, **options):
    """Each layer on its own but the norm and the head, which the root shards."""
    for layer in (model.embed, model.linear, model.conv):
        fully_shard(layer, reshard_after_forward=again, **options)
    return fully_shard(model, reshard_after_forward=again, **options)


def base():
    torch.manual_seed(0)
    return Net()


def trained_sharded(rank, again=True, steps=4, optimizer=adamw):
    model = sharded(made(), again)
    train(model, optimizer(model), HALVES[rank : rank + 1], steps)
    return model


def sparse(model):
    return sprand.SparseAdamW(model, lr=LR)


def full_state(model):
    model.eval()
    return {name: whole(value) for name, value in model.state_dict().items()}


def every_resharding_trains_as_one_process(rank, folder):
    alone = trained_alone()
    for again in (True, False):
        assert_same_training(trained_sharded(rank, again), alone)


def whole_columns_train_as_one_process(rank, folder):
    """Each rank gathers weights and shards deltas; which features of an input are kept is known to it as to one process."""

    def make():
        return made(**TARGETS | {"layout": "columns"})

    model = sharded(make())
    train(model, adamw(model), HALVES[rank : rank + 1])
    assert_same_training(model, trained_alone(make))
    assert model.linear.sparse_entries().pattern.columns is not None


def a_cpu_without_instructions_trains_as_one_process(rank, folder):
    """In bfloat16, beside a frozen head, which a disabled model uses as PyTorch does."""

    def make():
        return made(torch.bfloat16, density=0.2, target_modules=["embed", "linear"])

    with torch.backends.mkldnn.flags(enabled=False):
        model = sharded(make())
        train(model, adamw(model), HALVES[rank : rank + 1])
        assert_same_training(model, trained_alone(make))
        x, _ = tokens_and_labels()
        with sprand.disabled(model):
            assert torch.equal(model(x), base().bfloat16()(x))


def sparse_adamw_steps_shards_as_fused_adamw_does(rank, folder):
    """Sharded deltas take torch's fused AdamW, whose last bit depends on where in a vector register an element lies."""

    def fused(model):
        return torch.optim.AdamW(sprand.parameters(model), lr=LR, fused=True)

    ours, torchs = trained_sharded(rank, optimizer=sparse), trained_sharded(rank, optimizer=fused)
    for a, b in zip(sprand.parameters(ours), sprand.parameters(torchs), strict=True):
        assert torch.equal(whole(a), whole(b))
    model, alone = made(torch.float64), trained_alone(lambda: made(torch.float64), sparse)
    train(sharded(model), sparse(model), HALVES[rank : rank + 1])
    for a, b in zip(sprand.parameters(model), sprand.parameters(alone), strict=True):
        torch.testing.assert_close(whole(a), b.detach(), rtol=1e-10, atol=1e-13)


def clipping_and_scaling_know_the_whole_norm(rank, folder):
    def clipped(model):
        return sprand.SparseAdamW(model, lr=LR, max_grad_norm=0.05)

    norms = []
    for model, parts in ((sharded(made(torch.float64)), HALVES[rank : rank + 1]), (made(torch.float64), HALVES)):
        optimizer = clipped(model)
        train(model, optimizer, parts, steps=1)
        norms.append(optimizer.grad_norm)
        last = model
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)
    assert norms[0] > 0.05
    other = sharded(made(torch.float64))
    train(other, clipped(other), HALVES[rank : rank + 1], steps=1)
    for a, b in zip(sprand.parameters(other), sprand.parameters(last), strict=True):
        torch.testing.assert_close(whole(a), b.detach(), rtol=1e-9, atol=1e-13)


def mixed_precision_computes_in_what_it_says(rank, folder):
    """Forward is that of the bfloat16 cast of the trained weights; deltas and their moments stay float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for again in (True, False):
        model = sharded(made(), again, mp_policy=policy)
        optimizer = sparse(model)
        losses = train(model, optimizer, HALVES[rank : rank + 1], steps=8)
        dist.all_reduce(losses)
        assert losses[-1] < losses[0]
        assert all(p.dtype == torch.float32 == optimizer.state[p]["exp_avg"].dtype for p in sprand.parameters(model))
        plain = made()
        for p, q in zip(sprand.parameters(plain), sprand.parameters(model), strict=True):
            p.data.copy_(whole(q).bfloat16())  # FSDP2 casts all it gathers
        sprand.merge(plain).bfloat16()
        x, _ = tokens_and_labels()
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))


def state_dicts_hold_the_trained_weights(rank, folder):
    alone = trained_alone()
    model = trained_sharded(rank)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, _ = get_state_dict(model, (), options=options)
    expected = alone.state_dict()
    if rank == 0:
        assert_same_bits(state, expected)
    assert_same_bits(full_state(model), expected)
    with torch.no_grad():
        model(tokens_and_labels()[0])  # the root's own parameters stay gathered after a forward
    assert_same_bits(full_state(model), expected)
    train(model, adamw(model), HALVES[rank : rank + 1], steps=1)
    other = trained_alone()
    train(other, adamw(other), HALVES, steps=1)
    assert_same_training(model, other)


def a_resumed_run_goes_on_exactly(rank, folder):
    for kind, optimizer in (("sharded", adamw), ("full", sparse)):
        model = sharded(made())
        state = optimizer(model)
        train(model, state, HALVES[rank : rank + 1], steps=3)
        options = StateDictOptions(full_state_dict=kind == "full", broadcast_from_rank0=kind == "full")
        saved = dict(zip(("model", "optimizer"), get_state_dict(model, state, options=options), strict=True))
        if kind == "sharded":
            dcp.save(saved, checkpoint_id=folder / "checkpoint")
        else:
            saved = copy.deepcopy(saved)  # on a CPU it shares memory with what trains on
        train(model, state, HALVES[rank : rank + 1], steps=3, start=3)

        torch.manual_seed(1)
        resumed = sharded(sprand.apply(Net(), **{**TARGETS, "seed": 9}))
        fresh = optimizer(resumed)
        if kind == "sharded":
            saved = dict(zip(("model", "optimizer"), get_state_dict(resumed, fresh, options=options), strict=True))
            dcp.load(saved, checkpoint_id=folder / "checkpoint")
        set_state_dict(resumed, fresh, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options)
        train(resumed, fresh, HALVES[rank : rank + 1], steps=3, start=3)
        assert_same_bits(full_state(resumed), full_state(model))


def a_sharded_model_takes_a_new_base(rank, folder):
    """A checkpoint without entries is a new base, of which each rank holds a part."""
    torch.manual_seed(7)
    other = Net()
    model, plain = sharded(made()), made()
    plain.load_state_dict(other.state_dict(), strict=False)
    set_model_state_dict(model, other.state_dict(), options=StateDictOptions(full_state_dict=True, strict=False))
    assert_same_bits(full_state(model), plain.state_dict())
    train(model, adamw(model), HALVES[rank : rank + 1])
    train(plain, adamw(plain), HALVES)
    assert_same_training(model, plain)


def a_model_may_be_filled_after_it_is_sharded(rank, folder):
    with torch.device("meta"):
        model = sprand.apply(Net(), **TARGETS)
    sharded(model).state_dict()
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, made().state_dict(), options=options)
    train(model, adamw(model), HALVES[rank : rank + 1])
    assert_same_training(model, trained_alone())


def adapters_are_saved_from_shards(rank, folder):
    alone = trained_alone()
    model = trained_sharded(rank, again=False)
    with torch.no_grad():
        model(tokens_and_labels()[0])
    sprand.save(model, folder / "adapter")
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    sprand.save(alone, folder / f"alone {rank}")
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == (
        folder / f"alone {rank}" / "adapter_model.safetensors"
    ).read_bytes()
    assert_same_training(sprand.load(base(), folder / "adapter"), alone)
    blocked = folder / "a file"
    dist.barrier()
    if rank == 0:
        blocked.write_text("")
    with pytest.raises(OSError if rank == 0 else RuntimeError):
        sprand.save(model, blocked / "adapter")


def disabled_is_the_base_model(rank, folder):
    x, y = tokens_and_labels()
    part = HALVES[rank]
    for again in (True, False):
        alone, model = made(), sharded(made(), again)
        optimizer, other = adamw(model), adamw(alone)
        for _ in range(3):
            loss = F.cross_entropy(model(x[part]), y[part])
            with sprand.disabled(model), torch.no_grad():
                assert torch.equal(model(x), base()(x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            train(alone, other, HALVES, steps=1, start=0)
        with sprand.disabled(model):
            inside = full_state(model)
        assert_same_bits({name: inside[name] for name in bits(base())}, bits(base()))
        assert_same_training(model, alone)
        assert_same_bits(full_state(model), alone.state_dict())


def input_gradients_of_a_disabled_model_are_those_of_the_base(rank, folder):
    model = trained_sharded(rank)
    model.state_dict()
    layer, plain = model.linear, base().linear
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(rank))
    grads = []
    with sprand.disabled(model):
        for called in (layer, plain):
            leaf = x.clone().requires_grad_(True)
            called(leaf).square().sum().backward()
            grads.append(leaf.grad)
    assert torch.equal(*grads)


def write_puts_trained_values_into_the_shards(rank, folder):
    model, alone = trained_sharded(rank), trained_alone()
    sprand.write(model)
    sprand.write(alone)
    for name, p in alone.named_parameters():
        assert torch.equal(whole(model.get_parameter(name)), p.detach()), name


def what_cannot_be_done_is_refused(rank, folder):
    model = trained_sharded(rank, again=False)
    with torch.no_grad():
        model(tokens_and_labels()[0])
    before = full_state(model)
    for verb, call in {
        "merge": lambda: sprand.merge(model),
        "unmerge": lambda: sprand.unmerge(model),
        "switch": lambda: sprand.switch(model, None),
        "load": lambda: sprand.load(model, folder / "adapter"),
        "DynamicMask": lambda: sprand.DynamicMask(model),
        "apply": lambda: sprand.apply(sharded(Net()), density=0.1),
    }.items():
        with pytest.raises(ValueError, match=rf"^{verb}: expected a model whose parameters are whole, got .* fully_shard"):
            call()
    assert_same_bits(full_state(model), before)
    assert "5 of" not in sprand.summary(model)
    sprand.print_trainable_parameters(model)


def tensor_parallel_models_are_refused(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    with pytest.raises(ValueError, match="apply: .* tensor parallelism"):
        sprand.apply(parallelize_module(plain, mesh, {"0": ColwiseParallel()}), density=0.5)
    applied = sprand.apply(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()), density=0.5)
    parallelize_module(applied, mesh, {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match="tensor parallelism"):
        applied(torch.randn(2, 8))


def gathers_weights_and_reduces_deltas(rank, folder):
    """No index and no base travels; gradients are those of the deltas and of the head."""
    model = sharded(made())
    optimizer = adamw(model)
    train(model, optimizer, HALVES[rank : rank + 1], steps=1)
    with Wire() as wire:
        train(model, optimizer, HALVES[rank : rank + 1], steps=1)
    trained = sum(p.numel() * 4 for p in sprand.parameters(model))
    everything = sum(p.numel() * 4 for p in model.parameters())
    padding = 64 * len(list(model.parameters()))
    assert 0 <= wire.bytes["reduce_scatter_base"] - trained <= padding, wire.bytes
    assert wire.bytes["allgather_base"] <= 2 * everything + 2 * padding, wire.bytes


def a_copy_follows_the_shards(rank, folder):
    """Each rank has the same values message, and a copy that takes it holds what one process would have trained."""
    model = sharded(made())
    optimizer, sync = adamw(model), DeltaSync(model)
    torch.manual_seed(0)
    receiver = DeltaReceiver(copied := Net())
    receiver.receive(sync.indices())
    for number in range(2):
        train(model, optimizer, HALVES[rank : rank + 1], steps=1, start=number)
        message = sync.values()
        receiver.receive(message)
        both = [torch.empty_like(message) for _ in range(2)]
        dist.all_gather(both, message)
        assert torch.equal(*both)
    assert_same_bits(bits(copied), bits(sprand.merge(trained_alone(steps=2))))


CHECKS = (
    every_resharding_trains_as_one_process, whole_columns_train_as_one_process,
    a_cpu_without_instructions_trains_as_one_process, sparse_adamw_steps_shards_as_fused_adamw_does,
    clipping_and_scaling_know_the_whole_norm, mixed_precision_computes_in_what_it_says, state_dicts_hold_the_trained_weights,
    a_resumed_run_goes_on_exactly, a_sharded_model_takes_a_new_base,
    a_model_may_be_filled_after_it_is_sharded, adapters_are_saved_from_shards, disabled_is_the_base_model,
    input_gradients_of_a_disabled_model_are_those_of_the_base, write_puts_trained_values_into_the_shards,
    what_cannot_be_done_is_refused, tensor_parallel_models_are_refused, gathers_weights_and_reduces_deltas,
    a_copy_follows_the_shards,
)  # fmt: skip

test_two_ranks = ranks.test_of(CHECKS)
