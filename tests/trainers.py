"""Tiny language models in a Hugging Face `Trainer`, as the tests of it share them."""

from __future__ import annotations

import pytest
import torch

import sprand

transformers = pytest.importorskip("transformers", reason="these tests train with transformers.Trainer")

from sprand.integrations.transformers import SparseCheckpointCallback, sparse_adamw  # noqa: E402

VOCABULARY, LENGTH = 50, 8


def llama(dtype=torch.float32, seed=0, **options):
    """A tiny causal language model with the same weights every time."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=LENGTH, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def rows(count=16, seed=0):
    """Sentences that count upwards, each from another number."""
    starts = torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
    sentences = [(start + torch.arange(LENGTH)) % VOCABULARY for start in starts]
    return [{"input_ids": sentence, "labels": sentence} for sentence in sentences]


def trainer_of(model, folder, callbacks=(), optimizer=None, **options):
    defaults = dict(
        max_steps=6, save_strategy="no", per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", seed=0,
        disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    args = transformers.TrainingArguments(str(folder), **(defaults | options))
    chosen = None if optimizer is None else optimizer(args)
    return transformers.Trainer(
        model,
        args,
        train_dataset=rows(),
        eval_dataset=rows(4, seed=1),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=chosen,
    )


def sparse(density=0.05, seed=0, dtype=torch.float32, **fields):
    return sprand.apply(llama(dtype), density=density, seed=seed, **fields)


def trained(folder, model=None, optimizer=sparse_adamw, resume=None, **options):
    """The model after a training, and its trainer."""
    model = sparse() if model is None else model
    callbacks = [] if hasattr(model, "peft_config") else [SparseCheckpointCallback()]
    trainer = trainer_of(model, folder, callbacks, optimizer, **options)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_close(a, b, **limits):
    """Every tensor of two models."""
    torch.testing.assert_close(a.state_dict(), b.state_dict(), **limits)


def everything(model, trainer):
    """Weights, entries and moments: what an exact resume must bring back."""
    optimizer = trainer.optimizer.state_dict()["state"]
    moments = {
        f"{i} {name}": torch.as_tensor(value).reshape(-1) for i, state in optimizer.items() for name, value in state.items()
    }
    assert moments
    return model.state_dict() | moments
