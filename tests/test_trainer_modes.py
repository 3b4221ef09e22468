"""A plain `Trainer` in its modes: mixed precision, skipped steps, activation checkpointing, `torch.compile`."""

from __future__ import annotations

import pytest
import torch

import sprand
from models import assert_same_bits, bits
from trainers import everything, llama, losses, rows, sparse, trained

transformers = pytest.importorskip("transformers", reason="these tests train with transformers.Trainer")
accelerate = pytest.importorskip("accelerate", reason="a Trainer needs it")


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path, reentrant):
    plain = everything(*trained(tmp_path))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model, trainer = trained(tmp_path, **options)
    assert model.is_gradient_checkpointing
    assert_same_bits(everything(model, trainer), plain)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_bf16(tmp_path, weights):
    """Forward and backward in bfloat16; deltas and moments stay float32, and the weights are exactly base + delta."""
    model, trainer = trained(tmp_path, sparse(dtype=weights), bf16=True, max_steps=8)
    _, other = trained(tmp_path, sparse(dtype=torch.float32), max_steps=8)
    assert losses(trainer) == pytest.approx(losses(other), rel=5e-3)
    assert losses(trainer) != losses(other)
    assert all(p.dtype == torch.float32 and p.any() for p in sprand.parameters(model))
    assert all(s["exp_avg"].dtype == torch.float32 for s in trainer.optimizer.state_dict()["state"].values())
    for layer in model.modules():
        if isinstance(layer, sprand.SparseModule):
            written = (layer.sprand_base + layer.sprand_delta).to(weights)
            assert torch.equal(layer.weight.flatten()[layer.sprand_indices.long()], written)
    assert_same_bits(bits(sprand.unmerge(model)), bits(llama(weights)))


def test_fp16_and_a_skipped_step():
    """The optimizer as Accelerate wraps it for a Trainer with fp16=True, which itself asks for a GPU."""
    accelerate.Accelerator(cpu=True)
    model, reference = sparse(), sparse()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(sprand.SparseAdamW(model, lr=1e-2), scaler=scaler)
    plain = sprand.SparseAdamW(reference, lr=1e-2)
    tokens = torch.stack([row["input_ids"] for row in rows(4)])
    for step in range(4):
        scale, overflow = scaler.get_scale(), step == 2
        for each in (model, reference):
            with torch.autocast("cpu", torch.float16):
                scaler.scale(each(input_ids=tokens, labels=tokens).loss).backward()
        if overflow:
            sprand.parameters(model)[0].grad[0] = float("inf")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        scaler.unscale_(optimizer.optimizer)
        torch.nn.utils.clip_grad_norm_(sprand.parameters(model), 10.0)
        optimizer.step()
        if overflow:
            assert_same_bits(model.state_dict(), before)
            assert scaler.get_scale() == scale / 2
        else:
            for p in sprand.parameters(reference):
                p.grad /= scale
            plain.step()
        optimizer.zero_grad()
        plain.zero_grad()
    assert optimizer.state_dict()["state"][0]["step"] == 3
    assert_same_bits(model.state_dict(), reference.state_dict())


def test_torch_compile(tmp_path):
    compiled, trainer = trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", max_steps=3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plain, other = trained(tmp_path, max_steps=3)
    assert losses(trainer) == pytest.approx(losses(other), rel=1e-6)
    assert all(p.any() for p in sprand.parameters(compiled))
    for a, b in zip(sprand.parameters(compiled), sprand.parameters(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
