"""Adapters for the tests of serving: with random changes, saved, and what they must give."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import sprand
from models import EVERY_TARGET, EveryLayer, bits, built


def trained(model: nn.Module, path: Path, seed: int = 0, draw: int = 0, **fields) -> Path:
    """An adapter with random changes, saved."""
    sprand.apply(model, seed=draw, **({"density": 0.1} | fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sprand.parameters(model):
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return sprand.save(model, path)


def merged(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The weights of an untouched model with an adapter, by loading and merging."""
    return bits(sprand.merge(sprand.load(model, path)))


def four_adapters(folder: Path) -> dict[str, Path]:
    """Adapters of `EveryLayer`: two with the same positions, one with others, one that trains other weights, and no head."""
    return {
        "a": trained(built(EveryLayer), folder / "a", 1, **EVERY_TARGET),
        "b": trained(built(EveryLayer), folder / "b", 2, **EVERY_TARGET),
        "c": trained(built(EveryLayer), folder / "c", 3, draw=7, **EVERY_TARGET),
        "d": trained(built(EveryLayer), folder / "d", 4, target_modules=["linear", "head"]),
    }
