"""sprand on any torch model: a small convolutional network, trained on digits, learns them rotated from 10 % of its weights."""

from __future__ import annotations

import torch
from torch import nn

import sprand

GLYPHS = ("111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001")


def digits(count: int, rotated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy 12 x 12 pictures of the digits 0 to 4, made on the spot: images [count, 1, 12, 12] and labels [count]."""
    shapes = torch.tensor([[float(pixel) for pixel in glyph] for glyph in GLYPHS]).view(-1, 1, 5, 3)
    labels = torch.randint(len(GLYPHS), (count,))
    images = torch.zeros(count, 1, 12, 12)
    for i, label in enumerate(labels):
        y, x = torch.randint(0, 8, (1,)), torch.randint(0, 10, (1,))
        images[i, :, y : y + 5, x : x + 3] = shapes[label]
    images = images.rot90(1, (2, 3)) if rotated else images
    return images + 0.3 * torch.randn_like(images), labels


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rotated: bool, steps: int) -> None:
    """A plain training loop: sprand asks for no other."""
    for _ in range(steps):
        images, labels = digits(64, rotated)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, rotated: bool) -> float:
    """The share of fresh pictures named rightly."""
    images, labels = digits(1000, rotated)
    return (model(images).argmax(-1) == labels).float().mean().item()


def main() -> None:
    """Pre-train, fine-tune sparsely, and go back to the pre-trained weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1152, 64), nn.ReLU(), nn.Linear(64, len(GLYPHS)),
    )  # fmt: skip
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), rotated=False, steps=150)
    print(
        f"pre-trained on upright digits: {accuracy(model, False):.1%} of them right, {accuracy(model, True):.1%} of rotated ones"
    )

    weights = [name for name, p in model.named_parameters() if p.dim() > 1]
    sprand.apply(model, density=0.1, target_modules=None, target_parameters=weights)
    sprand.print_trainable_parameters(model)
    train(model, sprand.SparseAdamW(model, lr=1e-2), rotated=True, steps=300)
    print(f"fine-tuned on rotated digits:  {accuracy(model, True):.1%} of rotated ones right")

    with sprand.disabled(model):
        print(f"with the entries disabled:     {accuracy(model, False):.1%} of upright ones right, as before")
    sprand.merge(model)


if __name__ == "__main__":
    main()
