"""Models that read weights past their modules, and the two doors by which such weights train."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import sprand

BOTH = ["a.weight", "b.weight"]


class Pair(nn.Module):
    """Two linear layers, to be used in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)


class Read(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.a.weight, self.a.bias)), self.b.weight)


class ReadAndCalled(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) @ self.b.weight @ self.a.weight


def first_changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    change(model[0])
    return model.eval()  # a spectral norm moves its vectors while it trains


def called_through(layer: nn.Module) -> None:
    """As tools do that put a function in front of a layer: they keep the forward it had."""
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def prune_half(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def through_apply(model: nn.Module, targets: list[str], **fields) -> nn.Module:
    return sprand.apply(model, target_modules=None, target_parameters=targets, density=0.5, **fields)


def through_peft(model: nn.Module, targets: list[str], **fields) -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig

    return peft.get_peft_model(model, SprandConfig(target_modules=[], target_parameters=targets, density=0.5, **fields))


DOORS = pytest.mark.parametrize("door", [through_apply, through_peft], ids=lambda door: door.__name__)
NOTHING_SAID = [
    pytest.mark.filterwarnings("error:sprand"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated"),
]
