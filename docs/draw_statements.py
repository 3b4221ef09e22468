"""Draws docs/images/positions.png (draws of each layout) and set_not_add.png (what adding and subtracting does to a base)."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from sprand.kernels import ops
from sprand.selection import pattern

INK, FROZEN, CHOSEN, SECOND = "#1f2933", "#dfe5ec", "#d9480f", "#1971c2"
IMAGES = Path(__file__).parent / "images"
SHAPE = (24, 48)
DRAWS = {'strategy="random"': ("random", None), 'strategy="uniform"': ("uniform", None), 'layout="columns"': ("random", 1)}


def positions() -> Path:
    """One draw of each kind, a twelfth of a small weight."""
    figure, axes = plt.subplots(1, len(DRAWS), figsize=(10.1, 2.3))
    colours = matplotlib.colors.ListedColormap([FROZEN, CHOSEN])
    for axis, (title, (strategy, units)) in zip(axes, DRAWS.items(), strict=True):
        chosen = torch.zeros(SHAPE).flatten()
        chosen[pattern.draw(strategy, "weight", SHAPE, 96, seed=0, axis=units).long()] = 1
        axis.pcolormesh(chosen.view(SHAPE).flip(0), cmap=colours, edgecolors="white", linewidth=0.4)
        axis.set_title(title, fontsize=10, color=INK)
        axis.set_aspect("equal")
        axis.axis("off")
    return save(figure, "positions.png")


def set_not_add() -> Path:
    """Which share of the base's entries is not what it was, after cycles of putting a change in and taking it out."""
    cycles = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    base = (0.02 * torch.randn(100_000)).bfloat16()
    indices = torch.arange(base.numel(), dtype=torch.int32)
    added, written, lost = base.clone(), base.clone(), []
    for cycle in range(1, cycles[-1] + 1):
        delta = 1e-3 * torch.randn(base.numel())
        added += delta.bfloat16()
        added -= delta.bfloat16()
        ops.patch_(written, indices, base, delta)
        ops.patch_(written, indices, base, None)
        if cycle in cycles:
            lost.append(100 * (added != base).float().mean().item())
    assert torch.equal(written, base)
    figure, axis = plt.subplots(figsize=(6.4, 3))
    axis.plot(cycles, lost, "o-", color=CHOSEN, label="w += delta, w -= delta")
    axis.plot(cycles, [0] * len(cycles), "o-", color=SECOND, label="w = cast(base + delta), w = base")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("cycles of merging and unmerging, bfloat16")
    axis.set_ylabel("weights that are not the base's, %")
    axis.set_ylim(-4, 104)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    print(f"after {cycles[-1]} cycles: {lost[-1]:.0f} % changed by adding, 0 % by setting")
    return save(figure, "set_not_add.png")


def save(figure: plt.Figure, name: str) -> Path:
    """Write a picture."""
    figure.savefig(IMAGES / name, dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return IMAGES / name


if __name__ == "__main__":
    torch.manual_seed(0)
    print(positions().name, set_not_add().name)
