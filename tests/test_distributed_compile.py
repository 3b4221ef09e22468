"""Two ranks under FSDP2 with compiled layers train what one process does: a weight gathered anew is read with its entries."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import ranks
from ranks import HALVES, TARGETS, Net, adamw, assert_same_training, made, train, trained_alone
from sprand.layers.sharding import whole


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_close(model, expected):
    """A base read in place of trained entries shows in the second digit."""
    others = trainable(expected)
    for name, p in trainable(model).items():
        torch.testing.assert_close(whole(p), others[name].detach(), rtol=0, atol=1e-6)
    assert len(others) == len(trainable(model)) == 7


def compiled_layers_read_trained_weights_in_backward(rank, folder):
    """Inductor writes into the gathered weight, and the backward of each layer reads it, gathered anew."""
    for layout in ("unstructured", "columns"):
        torch.compiler.reset()

        def make(layout=layout):
            return made(**TARGETS | {"layout": layout})

        model = make()
        for layer in (model.linear, model.conv, model.norm):
            layer.compile(fullgraph=True)
            fully_shard(layer, reshard_after_forward=True)
        fully_shard(model)
        train(model, adamw(model), HALVES[rank : rank + 1], steps=3)
        assert_close(model, trained_alone(make, steps=3))


def compiled_layers_of_peft_do_so_too(rank, folder):
    peft = pytest.importorskip("peft")
    from sprand.peft import SprandConfig

    def adapted():
        torch.manual_seed(0)
        return peft.get_peft_model(Net(), SprandConfig(**TARGETS))

    def optimizer(model):
        return torch.optim.AdamW(trainable(model).values(), lr=1e-2, foreach=False)

    model = adapted()
    inner = model.base_model.model
    for layer in (inner.conv, inner.norm):
        layer.compile(fullgraph=True)
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(model)
    train(model, optimizer(model), HALVES[rank : rank + 1], steps=3)
    assert_close(model, trained_alone(adapted, optimizer, steps=3))


def a_compiled_model_trains_as_one_process(rank, folder):
    for again in (True, False):
        torch.compiler.reset()
        model = made()
        for layer in (model.embed, model.linear, model.conv, model.norm):
            fully_shard(layer, reshard_after_forward=again)
        fully_shard(model, reshard_after_forward=again)
        model.compile(backend="aot_eager")
        train(model, adamw(model), HALVES[rank : rank + 1], steps=3)
        assert_same_training(model, trained_alone(steps=3))


CHECKS = (
    compiled_layers_read_trained_weights_in_backward, compiled_layers_of_peft_do_so_too, a_compiled_model_trains_as_one_process,
)  # fmt: skip

test_two_ranks = pytest.mark.slow(ranks.test_of(CHECKS))
