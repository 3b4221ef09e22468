"""Entries that get no gradient, or a part of it: what is certain is refused, the rest is said, through both doors."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

import sprand
from models import built
from weight_readers import BOTH, DOORS, NOTHING_SAID, Pair, ReadAndCalled, first_changed, prune_half

pytestmark = NOTHING_SAID


COMPUTED = {
    "prune": (prune_half, r"from weight_orig .* target_parameters=\['0.weight_orig'\]"),
    "weight_norm by a hook": (weight_norm, "from weight_g, weight_v"),
    "weight_norm": (parametrizations.weight_norm, "from parametrizations.weight.original0, parametrizations.weight.original1"),
}


@pytest.mark.parametrize("targets", ["all-linear", r"\d", ["0"], ["0", "2"]], ids=str)
@pytest.mark.parametrize("change", COMPUTED.values(), ids=COMPUTED)
def test_both_doors_refuse_a_weight_that_is_computed_and_say_from_what(change, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig

    model = first_changed(change[0])
    flags, said = [p.requires_grad for p in model.parameters()], []
    for door in (sprand.apply, lambda model, **fields: peft.get_peft_model(model, SprandConfig(**fields))):
        with pytest.raises(ValueError, match=f"the weight of 0 .* is computed anew in every forward, {change[1]}") as refused:
            door(model, target_modules=targets, density=0.5)
        said.append(str(refused.value))
        assert [p.requires_grad for p in model.parameters()] == flags and not hasattr(model, "_sprand")
    assert said[0] == said[1]
    assert list(sprand.select(model, exclude_modules=["0"], density=0.5)) == ["2.weight"]


@DOORS
@pytest.mark.parametrize("change", [prune_half, weight_norm, parametrizations.weight_norm], ids=lambda change: change.__module__)
def test_a_tool_that_takes_a_weight_away_after_sprand_is_named_in_the_next_forward(door, change):
    model = built(ReadAndCalled)
    door(model, BOTH)
    change(model.a.base_layer if hasattr(model.a, "base_layer") else model.a)
    with pytest.raises(
        ValueError, match="a.weight has entries that train, and another tool has put other parameters in its place"
    ):
        model(torch.randn(3, 6))


class Bypassed(Pair):
    """A layer whose weight is kept where nobody sees that it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.product = functools.partial(F.linear, weight=self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(torch.tanh(self.a(x)))


UNSEEN = "sprand: the first backward gave the entries of 1 of 2 weights no gradient: b.weight. Either this loss"


@DOORS
def test_the_first_backward_names_what_it_gave_no_gradient_and_says_it_once(door):
    model, x = built(Bypassed), torch.randn(3, 6)
    door(model, BOTH)
    with pytest.warns(UserWarning, match=UNSEEN):
        model(x).sum().backward()
    model(x).sum().backward()
    copy.deepcopy(model)(x).sum().backward()


class BypassedBesideOneInFull(Bypassed):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.whole(x))


@DOORS
def test_where_only_modules_in_full_have_gradients_that_is_said(door):
    model = built(BypassedBesideOneInFull)
    door(model, ["b.weight"], modules_to_save=["whole"])
    with pytest.warns(UserWarning, match="gave the entries of 1 of 1 weights no gradient: b.weight"):
        model(torch.randn(3, 6)).sum().backward()


class Held(Pair):
    """A model that keeps weights in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.a.weight, self.b.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + x @ self.weights[0].t() @ self.weights[1].t()


@DOORS
def test_weights_that_a_model_keeps_in_a_list_are_named_before_anything_trains(door):
    told = (
        r"sprand: weights that train are held beside their modules as well, a.weight in Held.weights, b.weight in Held.weights;"
    )
    with pytest.warns(UserWarning, match=told):
        door(built(Held), BOTH)


class BypassedInSegments(Bypassed):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=True)


def test_gradients_of_backwards_inside_of_another_are_looked_at_when_an_optimizer_steps():
    model, x = sprand.apply(built(BypassedInSegments), density=0.5), torch.randn(3, 6, requires_grad=True)
    optimizer = torch.optim.SGD(sprand.parameters(model), lr=0.1)
    model(x).sum().backward()
    with pytest.warns(UserWarning, match=UNSEEN):
        optimizer.step()
    optimizer.step()


@DOORS
def test_a_loss_that_reads_a_weight_outside_of_any_forward_is_told_what_it_loses(door):
    model, x = built(ReadAndCalled), torch.randn(3, 6)
    door(model, BOTH)
    loss = model(x).sum()
    with pytest.warns(UserWarning, match=r"sprand: a\.weight is read outside of any forward while its gradient is still to come"):
        loss = loss + model.a.weight.square().sum()
    with torch.no_grad():
        model.a.weight.norm()
    loss.backward()
    model.a.weight.norm()


@DOORS
def test_both_doors_refuse_torchscript_in_words(door):
    model = nn.ModuleDict({"inner": torch.jit.trace(nn.Linear(6, 8), torch.randn(2, 6))})
    with pytest.raises(ValueError, match="inner is TorchScript, whose code reads weights where no entries can train; give the"):
        door(model, ["inner.weight"])
