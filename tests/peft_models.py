"""What the PEFT tests share: tiny models, a training loop, and the weights of a wrapped model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="sprand.peft plugs into PEFT")


def llama(seed: int = 0, **fields) -> nn.Module:
    """A Llama of two layers with random weights, the same for the same seed."""
    transformers = pytest.importorskip("transformers", reason="these models are made by transformers")
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | heads | fields)).eval()


TOKENS = torch.arange(24).reshape(2, 12) * 7 % 64


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, tokens: Tensor = TOKENS) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own tensors as they are now, under their own names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from sprand.peft.plan import base_modules

    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in base_modules(inner)
        if not isinstance(module, BaseTunerLayer)
        for key, value in module._parameters.items()
        if value is not None
    }


def adapted(seed: int = 0, model: nn.Module | None = None, steps: int = 3, **fields) -> nn.Module:
    """A trained PEFT model."""
    from sprand.peft import SprandConfig

    wrapped = peft.get_peft_model(llama() if model is None else model, SprandConfig(**{"density": 0.1, "seed": seed} | fields))
    train(wrapped, torch.optim.AdamW(trainable(wrapped), lr=1e-2), steps)
    return wrapped.eval()


def saved(folder: Path, **fields) -> Path:
    """The folder of a trained adapter."""
    adapted(**fields).save_pretrained(folder)
    return folder


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    from sprand.peft import SprandLayer

    return {
        target.name: target.deltas[adapter].detach().clone()
        for layer in model.modules()
        if isinstance(layer, SprandLayer)
        for _, _, target in layer.sprand_weights()
        if adapter in target.deltas
    }


def positions(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    from sprand.peft import SprandLayer

    return {
        target.name: target.indices[adapter].clone()
        for layer in model.modules()
        if isinstance(layer, SprandLayer)
        for _, _, target in layer.sprand_weights()
        if adapter in target.deltas
    }
