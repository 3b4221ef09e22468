"""States of models that train entries: complete, each tensor once, and nothing loaded of one that cannot be meant."""

from __future__ import annotations

import copy

import pytest
import torch

import sprand
from models import MLP, Tied, assert_same_bits, bits, built, points_and_labels


def changed(model):
    """A model whose deltas are not zero."""
    with torch.no_grad():
        for p in sprand.parameters(model):
            p.normal_(0, 0.1)
    return model


def test_state_dict_is_complete_and_loads_into_another_pattern():
    x, _ = points_and_labels()
    model = changed(sprand.apply(built(MLP), density=0.3))
    other = sprand.apply(built(MLP, seed=9), density=0.3, seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    base = built(MLP)
    with sprand.disabled(other):
        assert torch.equal(other(x), base(x))


def test_a_checkpoint_without_entries_is_a_new_base():
    x, _ = points_and_labels()
    other = built(MLP, seed=4)
    model = sprand.apply(built(MLP), density=0.3)
    model.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(model(x), other(x))


def test_a_checkpoint_without_entries_is_refused_before_it_is_loaded_where_all_keys_are_asked_for():
    model, plain = sprand.apply(built(MLP), density=0.3), built(MLP, seed=4).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for loaded in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"the state has first\.weight and none of the entries.*strict=False"):
            loaded.load_state_dict(plain)
        assert_same_bits(loaded.state_dict(), before)
        with pytest.raises(RuntimeError, match="Missing key"):
            loaded.load_state_dict({"third.bias": plain["third.bias"]})
    missing = model.load_state_dict(plain, strict=False).missing_keys
    assert "first.sprand_delta" in missing
    sprand.unmerge(model).load_state_dict(plain)


def test_what_modules_share_is_in_a_state_once_and_stays_shared():
    model = sprand.apply(built(Tied), density=0.2, target_modules=["embed", "mix"])
    state = changed(model).state_dict()
    assert [name for name in state if "sprand" in name and "mix" not in name] == [
        "embed.sprand_delta", "embed.sprand_indices", "embed.sprand_base"
    ]  # fmt: skip
    twice = state | {name.replace("embed", "out"): value for name, value in state.items() if name.startswith("embed.sprand")}
    for given in (state, twice):
        for assign in (False, True):
            other = sprand.apply(built(Tied, seed=3), density=0.2, seed=7, target_modules=["embed", "mix"])
            other.load_state_dict(given, assign=assign)
            assert_same_bits(other.state_dict(), state)
            names = ("sprand_delta", "sprand_indices", "sprand_base")
            assert all(getattr(other.embed, name) is getattr(other.out, name) for name in names)
    other.load_state_dict(built(Tied, seed=5).state_dict(), strict=False)
    assert other.embed.sprand_base is other.out.sprand_base
    assert_same_bits(bits(sprand.unmerge(other)), bits(built(Tied, seed=5)))
