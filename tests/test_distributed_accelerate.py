"""Two ranks through Accelerate, over DistributedDataParallel and FSDP2, train what one process does, to the bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ranks
import sprand
from models import assert_same_bits
from ranks import HALVES, LR, adamw, assert_same_training, made, train, trained_alone
from sprand.layers.sharding import whole

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


LAUNCHED = """
import sys
import torch
from accelerate import Accelerator
import sprand
from ranks import HALVES, adamw, made, train

torch.set_num_threads(1)
helper = Accelerator(cpu=True)
model = made()
wrapped, optimizer = helper.prepare(model, adamw(model))
train(wrapped, optimizer, HALVES[helper.process_index : helper.process_index + 1], backward=helper.backward)
if helper.is_main_process:
    sprand.save(helper.unwrap_model(wrapped), sys.argv[1])
print("ran", helper.process_index, "of", helper.num_processes, flush=True)
helper.end_training()
"""


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

test_two_ranks = ranks.test_of(CHECKS)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over two processes")
@pytest.mark.slow
def test_accelerate_launch_starts_two_processes(tmp_path, threads):
    """Its launcher for several GPUs is torchrun; the one for CPUs starts a single process where there is no MPI."""
    threads(1)  # as in the script: torch's dense sums depend on the number of threads
    here = Path(__file__).parent
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"num_processes": 2, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no", "main_process_port": port}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    paths = os.pathsep.join((str(here), str(here.parent)))
    ran = subprocess.run(
        [*command, str(script), str(tmp_path / "adapter")], env=os.environ | {"PYTHONPATH": paths}, cwd=tmp_path,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert sorted(line for line in ran.stdout.splitlines() if line.startswith("ran")) == ["ran 0 of 2", "ran 1 of 2"]
    assert_same_training(sprand.load(sprand.unmerge(made()), tmp_path / "adapter"), trained_alone())
