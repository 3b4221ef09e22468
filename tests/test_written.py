"""After a fused step a forward does not write the weight again, unless it may hold anything else than the values that train."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

import sprand
from models import Tied
from watch import WritesSeen

STEPS = 2  # so that versions of a copy and of its original may meet


def stepped() -> tuple[nn.Module, torch.Tensor]:
    """A model of which a fused step has just written the weight, and its input."""
    torch.manual_seed(0)
    model = sprand.apply(nn.Sequential(nn.Linear(12, 6)), density=0.3)
    optimizer, x = sprand.SparseAdamW(model, lr=0.1), torch.randn(4, 12)
    for _ in range(STEPS):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, x


def assert_uses_its_deltas(model: nn.Module, x: torch.Tensor) -> None:
    """A training forward is that of a dense layer with the values that train in their places."""
    layer = model[0]
    weight = layer.get_parameter("weight").detach().clone().flatten()
    weight[layer.sprand_indices.long()] = layer.sprand_base + layer.sprand_delta.detach()
    wanted = nn.functional.linear(x, weight.view(layer.out_features, -1), layer.bias)
    assert torch.equal(model(x), wanted)


def test_a_forward_after_a_fused_step_writes_nothing():
    model, x = stepped()
    with WritesSeen() as seen:
        model(x)
    assert seen.names == []
    assert_uses_its_deltas(model, x)


def call_with_other_deltas(model, x):
    functional_call(model, {"0.sprand_delta": torch.full_like(model[0].sprand_delta, 5.0)}, (x,))


def call_with_the_same_values_elsewhere(model, x):
    functional_call(model, {"0.sprand_delta": model[0].sprand_delta.detach().clone().requires_grad_()}, (x,))


def replace_data(model, x):
    model[0].sprand_delta.data = torch.ones_like(model[0].sprand_delta)


def vector_to_parameters(model, x):
    nn.utils.vector_to_parameters(torch.ones(model[0].sprand_delta.numel()), sprand.parameters(model))


def change_in_place(model, x):
    with torch.no_grad():
        model[0].sprand_delta.add_(1.0)


def change_in_place_through_data(model, x):
    model[0].sprand_delta.data.mul_(2.0)


def copy_an_average(model, x):
    """As torch_ema, EMA of diffusers and Lookahead do."""
    torch._foreach_copy_([p.data for p in sprand.parameters(model)], [p * 0.5 for p in sprand.parameters(model)])


def overwrite_the_weight(model, x):
    with torch.no_grad():
        model[0].weight.mul_(2.0)


def replace_the_weight(model, x):
    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight), requires_grad=False)


def replace_the_data_of_the_weight(model, x):
    model[0].weight.data = torch.zeros_like(model[0].weight)


CHANGES = (
    call_with_other_deltas, call_with_the_same_values_elsewhere, replace_data, vector_to_parameters, change_in_place,
    change_in_place_through_data, copy_an_average, overwrite_the_weight, replace_the_weight, replace_the_data_of_the_weight,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_after_a_fused_step_is_seen_by_the_next_forward(change):
    model, x = stepped()
    change(model, x)
    assert_uses_its_deltas(model, x)


@pytest.mark.parametrize("change", CHANGES[2:7], ids=lambda change: change.__name__)
@pytest.mark.parametrize("gradients", [True, False])
def test_a_compiled_forward_sees_it_too(change, gradients):
    model, x = stepped()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(gradients):
        compiled(x)
        sprand.SparseAdamW(model, lr=0.1).step()
        change(model, x)
        y = compiled(x)
    assert_uses_its_deltas(model, x)
    assert torch.equal(y, model(x))


def test_a_call_with_another_weight_uses_the_entries_in_it():
    model, x = stepped()
    delta, indices = model[0].sprand_delta.detach(), model[0].sprand_indices.long()
    other = torch.zeros(6, 12)
    y = functional_call(model, {"0.weight": other}, (x,))
    dense = torch.zeros(72)
    dense[indices] = model[0].sprand_base + delta
    assert torch.equal(y, nn.functional.linear(x, dense.view(6, 12), model[0].bias))
    assert_uses_its_deltas(model, x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("changes", range(4))
def test_a_copy_does_not_take_over_what_its_original_knows(copied, changes):
    """Whatever the versions of its deltas are."""
    model, x = stepped()
    other = copied(model)
    with torch.no_grad():
        for _ in range(changes):
            other[0].sprand_delta.fill_(1.0)
    assert_uses_its_deltas(other, x)
    assert_uses_its_deltas(model, x)


@pytest.mark.parametrize("called", ["embed", "out"])
def test_a_write_through_one_of_two_modules_is_seen_by_the_other(called):
    """Tied weights: the step declares them written once, and either module may write other values."""
    torch.manual_seed(0)
    model = sprand.apply(Tied(), density=0.5, target_modules=["embed"])
    optimizer, tokens = sprand.SparseAdamW(model, lr=0.1), torch.arange(8)
    model(tokens).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        wanted = copy.deepcopy(model)(tokens)
    input = tokens if called == "embed" else torch.randn(3, 8)
    other = torch.full_like(model.embed.sprand_delta, 5.0).requires_grad_()
    functional_call(getattr(model, called), {"sprand_delta": other}, (input,))
    apart = model.out if called == "embed" else model.embed
    input = torch.eye(8) if called == "embed" else torch.arange(20)
    rows = apart(input).T if called == "embed" else apart(input)
    merged = sprand.merge(copy.deepcopy(model)).embed.weight
    assert torch.equal(rows, merged)
    assert torch.equal(model(tokens), wanted)
