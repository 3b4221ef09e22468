"""Llama-8B-shaped decoder blocks with random weights, in plain PyTorch: what the training step is measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a block: hidden width, width of keys and values, feed-forward width, width of a head."""

    hidden: int = 4096
    key_value: int = 1024
    feed_forward: int = 14336
    head: int = 128


class Attention(nn.Module):
    """Causal grouped-query attention. No rotary embedding: it is work that no method changes."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.key_value, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.key_value, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.head = shape.head

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """RMSNorm, attention, RMSNorm, SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.attention = Attention(shape)
        self.feed_forward_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.gate_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.down_proj = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        normed = self.feed_forward_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


class Blocks(nn.Module):
    """Hidden states in, mean squared distance to a target out: the loss has no weights, and no cost that counts.

    Input: `x [batch, length, hidden]` and `target` of the same shape. Output: a scalar, float32.
    """

    def __init__(self, shape: Shape, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(shape) for _ in range(layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(self.norm(x).float(), target.float())


def build(shape: Shape, layers: int, device: str) -> Blocks:
    """The model in bf16; the same random weights every time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Blocks(shape, layers)
    finally:
        torch.set_default_dtype(before)


def batch(shape: Shape, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """`x` and `target`, `[batch, length, hidden]` in bf16, sequences of 2048 tokens (or one, where there are fewer).

    x requires grad, so that every method computes the same input gradients, down to the first block.
    """
    length = min(tokens, 2048)
    x, target = torch.randn((2, tokens // length, length, shape.hidden), device=device).to(torch.bfloat16)
    return x.requires_grad_(), target
