"""Two ranks under FSDP1 (`FullyShardedDataParallel`) train what one process does, to the bit; what they save and refuse."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

import ranks
import sprand
from models import assert_same_bits, bits, tokens_and_labels
from ranks import HALVES, LR, Net, adamw, assert_same_training, made, train, trained_alone
from sprand.serving import DeltaSync

CPU = torch.device("cpu")


def flat(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=CPU)


def by_layer(model):
    """Each layer on its own but the norm and the head, which the root shards."""
    for name in ("embed", "linear", "conv"):
        setattr(model, name, flat(getattr(model, name)))
    return flat(model)


def base():
    torch.manual_seed(0)
    return Net()


def sparse(model):
    return sprand.SparseAdamW(model, lr=LR)


def fused(model):
    return torch.optim.AdamW(sprand.parameters(model), lr=LR, fused=True)


def trained_sharded(rank, wrap=by_layer, optimizer=adamw):
    model = wrap(made())
    train(model, optimizer(model), HALVES[rank : rank + 1])
    return model


def an_adapter_is_that_of_one_process(rank, folder):
    for wrap in (flat, by_layer):
        sprand.save(trained_sharded(rank, wrap), folder / wrap.__name__)
        assert_same_training(sprand.load(base(), folder / wrap.__name__), trained_alone())


def sparse_adamw_steps_shards_as_fused_adamw_does(rank, folder):
    for optimizer in (sparse, fused):
        sprand.save(trained_sharded(rank, optimizer=optimizer), folder / optimizer.__name__)
    assert_same_training(*(sprand.load(base(), folder / name) for name in ("sparse", "fused")))


def a_full_state_resumes_in_one_process(rank, folder):
    model = trained_sharded(rank)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        state = model.state_dict()
    other, alone = made(), trained_alone()
    other.load_state_dict(state)
    assert torch.equal(other(tokens_and_labels()[0]), alone(tokens_and_labels()[0]))
    assert_same_bits(bits(sprand.unmerge(other)), bits(base()))


def what_cannot_be_done_is_refused(rank, folder):
    model = trained_sharded(rank)
    for what in (sprand.merge, sprand.unmerge, lambda model: sprand.switch(model, None)):
        with pytest.raises(ValueError, match=r"parameters are whole, got one sharded by FullyShardedDataParallel \(FSDP1\)"):
            what(model)
    for what in (sprand.write, DeltaSync, lambda model: sprand.disabled(model).__enter__()):
        with pytest.raises(ValueError, match=r"\(FSDP1\) cannot do this; shard the model by fully_shard \(FSDP2\) instead"):
            what(model)
    with pytest.raises(ValueError, match=r"expected the FullyShardedDataParallel wrapper itself \(FSDP1\), got the model in it"):
        sprand.save(model.module, folder / "inner")
    with pytest.raises(ValueError, match="max_grad_norm sees the gradients of one rank"):
        train(model, sprand.SparseAdamW(model, lr=LR, max_grad_norm=1.0), HALVES[rank : rank + 1], steps=1)
    with pytest.raises(ValueError, match="one sharded by FullyShardedDataParallel"):
        sprand.apply(flat(base()), density=0.1)


CHECKS = (
    an_adapter_is_that_of_one_process, sparse_adamw_steps_shards_as_fused_adamw_does, a_full_state_resumes_in_one_process,
    what_cannot_be_done_is_refused,
)  # fmt: skip

test_two_ranks = ranks.test_of(CHECKS)
