"""Nested state as safetensors and JSON: it comes back in every type and bit, and what it cannot hold is refused."""

from __future__ import annotations

import math

import pytest
import torch

import sprand
from models import MLP, built, points_and_labels
from sprand.files import states


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        as_bytes = [value.contiguous().view(-1).view(torch.uint8) for value in (one, two)]
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*as_bytes)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and (one == two or (one != one and two != two))


def test_every_type_comes_back(tmp_path):
    shared = torch.randn(3)
    state = {
        "numbers": [1, -(2**70), 0.1, 5e-324, -0.0, math.inf, -math.inf, math.nan, True, None, "text", ""],
        "nested": {0: {"a": (1, [2, (3,)])}, 1: {}, "1": [], "tensor": {"tensor": "0"}},
        "tensors": [shared, shared, shared[1:], torch.tensor(7), torch.tensor([-0.0, math.nan]), torch.zeros(0, 3)],
        "dtypes": [torch.arange(3).to(dtype) for dtype in (torch.bfloat16, torch.uint8, torch.float64, torch.bool)],
        "transposed": torch.randn(3, 4).T,
    }
    states.write(tmp_path / "state.safetensors", "test", state)
    found = states.read(tmp_path / "state.safetensors", "test")
    assert same(found, state)
    assert math.copysign(1, found["numbers"][4]) == -1
    found["tensors"][0].zero_()
    assert shared.any() and found["tensors"][1].any()


@pytest.mark.parametrize("make", [sprand.SparseAdamW, torch.optim.Adafactor, torch.optim.SGD, torch.optim.NAdam])
def test_an_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path, make):
    def step(model, optimizer, seed):
        x, y = points_and_labels(seed)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    models = [sprand.apply(built(MLP), density=0.3) for _ in range(2)]
    optimizers = [make(sprand.parameters(model), lr=0.05) for model in models]
    for seed in range(3):
        step(models[0], optimizers[0], seed)
    file = tmp_path / "state.safetensors"
    states.write(file, "test", {"model": dict(models[0].state_dict()), "optimizer": optimizers[0].state_dict()})
    state = states.read(file, "test")
    models[1].load_state_dict(state["model"])
    optimizers[1].load_state_dict(state["optimizer"])
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 3)
    assert same(dict(models[1].state_dict()), dict(models[0].state_dict()))
    assert same(optimizers[1].state_dict(), optimizers[0].state_dict())


@pytest.mark.parametrize(
    "value", [{1.5: "a"}, {None: 1}, {1, 2}, object(), torch.float32, b"bytes"], ids=lambda v: type(v).__name__
)
def test_what_it_cannot_hold_is_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(TypeError, match="a state can hold"):
        states.write(tmp_path / "state.safetensors", "test", {"value": value})
    assert not list(tmp_path.iterdir())


def test_a_state_of_something_else_is_refused(tmp_path):
    states.write(tmp_path / "state.safetensors", "test", {"a": 1})
    with pytest.raises(ValueError, match="the state of 'test', expected that of 'other'"):
        states.read(tmp_path / "state.safetensors", "other")
    with pytest.raises(FileNotFoundError):
        states.read(tmp_path / "none", "test")
