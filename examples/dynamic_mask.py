"""Dynamic masks: a network learns a new task from 2 % of its weights, fixed or exchanged for better ones as it trains."""

from __future__ import annotations

import copy
import tempfile

import torch
from torch import nn

import sprand


def batch(teacher: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Random points [64, 32] and what the teacher says of them [64, 8]."""
    x = torch.randn(64, 32)
    with torch.no_grad():
        return x, teacher(x)


def train(model: nn.Module, teacher: nn.Module, dynamic: bool) -> float:
    """Fine-tune a model to its teacher; the mean loss of the last 20 steps."""
    torch.manual_seed(1)
    optimizer = sprand.SparseAdamW(model, lr=1e-2, weight_decay=0.0)
    mask = sprand.DynamicMask(model, optimizer, every=10, fraction=0.3, decay="cosine", until=160) if dynamic else None
    losses = []
    for _ in range(200):
        x, y = batch(teacher)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if mask is not None:
            mask.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def main() -> None:
    """Compare a fixed mask with a dynamic one, and load the dynamic one's adapter into the untouched base."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8))
    teacher = copy.deepcopy(base)
    teacher[2].weight.data[:8] += 0.3 * torch.randn(8, 128)  # what is to be learnt lies in few rows of one layer
    for dynamic in (False, True):
        model = sprand.apply(copy.deepcopy(base), density=0.02, target_modules=["2"])
        print(f"{'dynamic' if dynamic else 'fixed'} mask: loss {train(model, teacher, dynamic):.5f}")
    with tempfile.TemporaryDirectory() as folder:
        sprand.save(model, folder)
        fresh = sprand.load(copy.deepcopy(base), folder)
    x, _ = batch(teacher)
    print("the base with the adapter gives equal outputs:", torch.equal(fresh(x), model(x)))


if __name__ == "__main__":
    main()
