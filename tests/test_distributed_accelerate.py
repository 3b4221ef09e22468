"""Two ranks through Accelerate, over DistributedDataParallel and FSDP2, train what one process does, to the bit."""

from __future__ import annotations

import sys

import pytest
import torch

import sprand
from models import assert_same_bits
from ranks import HALVES, LR, adamw, all_passed, assert_same_training, made, run, train, trained_alone
from sprand.sharding import whole

pytest.importorskip("accelerate", reason="Accelerate is not installed")


def accelerator(plugin=None):
    """Accelerate drops the plugin of FSDP on CPUs and says MULTI_CPU; its code for FSDP2 runs there all the same."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    result = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert result.num_processes == 2
    if plugin is not None:
        assert result.distributed_type == DistributedType.MULTI_CPU
        result.state.distributed_type, result.state.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        assert result.is_fsdp2
    return result


def plugin(again):
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=again, cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["SparseLinear", "SparseConv1d"],
    )  # fmt: skip


def sparse(model):
    return sprand.SparseAdamW(model, lr=LR)


def ddp_trains_as_one_process(rank, folder):
    for make in (adamw, sparse):
        helper = accelerator()
        model = made()
        wrapped, optimizer = helper.prepare(model, make(model))
        train(wrapped, optimizer, HALVES[rank : rank + 1], backward=helper.backward)
        assert_same_training(helper.unwrap_model(wrapped), trained_alone(optimizer=make))


def fsdp2_trains_as_one_process(rank, folder):
    alone = trained_alone()
    for again in (True, False):
        helper = accelerator(plugin(again))
        model = made()
        model, optimizer = helper.prepare(model, adamw(model))
        train(model, optimizer, HALVES[rank : rank + 1], backward=helper.backward)
        assert_same_training(model, alone)
    state = helper.get_state_dict(model)
    if rank == 0:
        assert_same_bits(dict(state), alone.state_dict())
    sprand.save(model, folder / "adapter")
    base = sprand.unmerge(made())
    assert_same_training(sprand.load(base, folder / "adapter"), alone)


def sparse_adamw_is_prepared_as_any_optimizer(rank, folder):
    def fused(model):
        return torch.optim.AdamW(sprand.parameters(model), lr=LR, fused=True)

    both = []
    for make in (sparse, fused):
        helper = accelerator(plugin(True))
        model = made()
        model, optimizer = helper.prepare(model, make(model))
        train(model, optimizer, HALVES[rank : rank + 1], backward=helper.backward)
        both.append(sprand.parameters(model))
    for a, b in zip(*both, strict=True):
        assert torch.equal(whole(a), whole(b))


CHECKS = (ddp_trains_as_one_process, fsdp2_trains_as_one_process, sparse_adamw_is_prepared_as_any_optimizer)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run(__name__, [check.__name__ for check in CHECKS], tmp_path_factory.mktemp("accelerate"))


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over two processes")
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_ranks(report, check):
    all_passed(report, check)
