"""Two ranks under FSDP2 with compiled layers train what one process does, to the bit: a weight gathered anew is no base there."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from ranks import HALVES, adamw, all_passed, assert_same_training, made, run, train, trained_alone

LAYERS = ("embed", "linear", "conv", "norm")


def trained_compiled(rank, again, each):
    """Convolution and norm read their weights in backward, when FSDP2 has gathered them anew."""
    torch.compiler.reset()
    model = made()
    for name in LAYERS:
        layer = getattr(model, name)
        if each:
            layer.compile(backend="aot_eager", fullgraph=True)
        fully_shard(layer, reshard_after_forward=again)
    fully_shard(model, reshard_after_forward=again)
    if not each:
        model.compile(backend="aot_eager")
    train(model, adamw(model), HALVES[rank : rank + 1], steps=3)
    return model


def compiled_layers_train_as_one_process(rank, folder):
    alone = trained_alone(steps=3)
    for again in (True, False):
        assert_same_training(trained_compiled(rank, again, each=True), alone)


def a_compiled_model_trains_as_one_process(rank, folder):
    alone = trained_alone(steps=3)
    for again in (True, False):
        assert_same_training(trained_compiled(rank, again, each=False), alone)


CHECKS = (compiled_layers_train_as_one_process, a_compiled_model_trains_as_one_process)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run(__name__, [check.__name__ for check in CHECKS], tmp_path_factory.mktemp("compile"))


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over two processes")
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_ranks(report, check):
    all_passed(report, check)
