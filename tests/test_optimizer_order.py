"""An optimizer made before `apply` trains nothing: that is said at its first step, once, and of no other optimizer."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import sprand


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()


def test_an_optimizer_made_before_apply_is_warned_of_once():
    model = net()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, early)
    sprand.apply(model, density=0.1)
    with pytest.warns(UserWarning, match=r"this SGD holds weights that sprand.apply froze \(2 of them\) and none") as told:
        step(model, early)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, early)


@pytest.mark.parametrize("made", ["all parameters", "what trains", "SparseAdamW", "another model's"])
def test_an_optimizer_in_order_is_not(made: str):
    model, other = sprand.apply(net(), density=0.1), net()
    if made == "SparseAdamW":
        optimizer = sprand.SparseAdamW(model, lr=0.1)
    else:
        held = {
            "all parameters": model.parameters(),
            "what trains": sprand.parameters(model),
            "another model's": other.parameters(),
        }
        optimizer = torch.optim.AdamW(held[made], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


def test_a_head_that_trains_does_not_hide_it():
    model = nn.Module()
    model.body, model.classifier = nn.Linear(8, 8), nn.Linear(8, 2)
    early = torch.optim.AdamW(model.parameters())
    sprand.apply(model, density=0.1, modules_to_save=["classifier"])
    with pytest.warns(UserWarning, match=r"froze \(1 of them\)"):
        early.step()
