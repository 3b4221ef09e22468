"""A small vision transformer, pre-trained to tell directions of stripes, learns to tell their widths from 5 % of its weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

import sprand


class ViT(nn.Module):
    """Patches by a convolution, two transformer blocks, a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 64, 4, stride=4)
        self.places = nn.Parameter(0.02 * torch.randn(16, 64))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True) for _ in range(2)))
        self.head = nn.Linear(64, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.blocks(hidden).mean(1))


def stripes(count: int, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy stripes [count, 1, 16, 16], and the number of their direction or of their width [count]."""
    direction, width = torch.randint(4, (count,)), torch.randint(4, (count,))
    angle, speed = (direction * torch.pi / 4).view(-1, 1, 1), (0.6 + 0.3 * width).view(-1, 1, 1)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    waves = torch.sin(speed * (x * angle.cos() + y * angle.sin()) + 6.3 * torch.rand(count, 1, 1))
    return (waves + 0.7 * torch.randn_like(waves))[:, None], direction if task == "direction" else width


def train(model: nn.Module, optimizer: torch.optim.Optimizer, task: str, steps: int) -> float:
    """The share of fresh images named rightly after a training."""
    for _ in range(steps):
        images, labels = stripes(32, task)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    images, labels = stripes(1000, task)
    with torch.no_grad():
        return (model(images).argmax(-1) == labels).float().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    base = ViT(4)
    print(f"pre-trained, directions: {train(base, torch.optim.AdamW(base.parameters(), lr=1e-3), 'direction', 200):.1%} right")
    head = copy.deepcopy(base).requires_grad_(False)
    head.head.requires_grad_(True)
    print(f"widths, by its head alone: {train(head, torch.optim.AdamW(head.head.parameters(), lr=1e-2), 'width', 200):.1%} right")
    targets = {"target_modules": ["patches", "linear1", "linear2"], "target_parameters": ["in_proj_weight"]}
    model = sprand.apply(base, density=0.05, modules_to_save=["head"], **targets)
    sprand.print_trainable_parameters(model)
    print(f"widths, by these entries:  {train(model, sprand.SparseAdamW(model, lr=1e-2), 'width', 200):.1%} right")
