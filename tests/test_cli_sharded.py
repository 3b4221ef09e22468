"""`sprand finetune` in two processes that share a model, by FSDP2 and ZeRO-3: as in one, saved whole, verified, and resumed."""

from __future__ import annotations

import contextlib
import io
import json
import os

import pytest
import torch
from safetensors.torch import load_file

import ranks
from tiny_models import save_llama

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

ZERO = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
}  # fmt: skip


def finetune(folder, out, *more: object) -> str:
    """Train on what lies in a folder, a constant rate in whole; what is said of it."""
    from sprand.cli import main

    asked = ["--model", folder / "llama", "--train", folder / "rows.jsonl", "--eval", folder / "rows.jsonl", "--max-length", 16]
    asked = [*asked, "--density", 0.1, "--lr", 0.01, "--schedule", "constant", "--max-new-tokens", 1, "--verify", "--out", out]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main.run(["finetune", *map(str, [*asked, *more])]) == 0
    return said.getvalue()


def losses(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


def shares(rank, folder, name, *more):
    """Train three steps in both processes, and go on to four: what one process does in four."""
    out = folder / name
    said = finetune(folder, out, "--batch-size", 4, "--max-steps", 3, *more)
    torch.distributed.barrier()
    again = finetune(folder, out, "--batch-size", 4, "--max-steps", 4, "--resume", *more)
    torch.distributed.barrier()
    if rank == 0:
        assert "checked: loaded from the checkpoint that sprand merge writes, the outputs are equal" in said
        assert "resumed from" in again
    torch.testing.assert_close(losses(out), losses(folder / "one"))
    adapter, alone = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (out, folder / "one"))
    assert adapter.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(adapter[key], value)


def fsdp2(rank, folder):
    """Accelerate drops its plugin on CPUs, whose code runs there all the same."""
    import transformers
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    made = transformers.Trainer.create_accelerator_and_postprocess

    def sharded(trainer):
        made(trainer)
        state = trainer.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT",
        )  # fmt: skip
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
        assert trainer.accelerator.is_fsdp2

    transformers.Trainer.create_accelerator_and_postprocess = sharded
    try:
        shares(rank, folder, "fsdp2")
    finally:
        transformers.Trainer.create_accelerator_and_postprocess = made


def zero3(rank, folder):
    """DeepSpeed's own kernel for shared memory would have to be compiled first."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops
    from accelerate.state import AcceleratorState

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    AcceleratorState._reset_state(reset_partial_state=True)
    shares(rank, folder, "zero3", "--trainer", f"deepspeed={folder / 'zero.json'}")


def prepare(folder):
    """A model, rows, and what one process makes of them, that adds the gradients of the same halves of each batch."""
    save_llama(folder / "llama")
    lines = (json.dumps({"prompt": f"w{i % 9} w1", "completion": f" w{i % 9} w{i % 9 + 1}"}) for i in range(16))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "zero.json").write_text(json.dumps(ZERO))
    finetune(folder, folder / "one", "--batch-size", 4, "--grad-accumulation", 2, "--max-steps", 4)


@pytest.mark.slow
def test_two_processes_share_a_model(tmp_path):
    prepare(tmp_path)
    report = ranks.run("test_cli_sharded", ["fsdp2", "zero3"], tmp_path)
    for name in ("fsdp2", "zero3"):
        ranks.all_passed(report, name)
