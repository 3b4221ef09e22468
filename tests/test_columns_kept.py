"""Whole columns are kept by their numbers: no tensor of positions is as large as the entries, and states of either kind load."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sprand
from models import MLP, Tied, assert_same_bits, bits, built, points_and_labels
from sprand.layers.sites import sites_of
from sprand.layers.units import Pattern

FIELDS = {"layout": "columns", "density": 0.25, "seed": 3}


def integers_alive() -> list[Tensor]:
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    return [tensor for tensor in tensors if tensor.dtype in (torch.int32, torch.int64)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x, y = points_and_labels(seed)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def applied(width: int = 60, **fields: object) -> nn.Module:
    return sprand.apply(built(MLP, width=width), **FIELDS | fields)


def through_peft() -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig

    return peft.get_peft_model(built(MLP, width=60), SprandConfig(**FIELDS))


def loaded(folder) -> nn.Module:
    sprand.save(applied(strategy="magnitude"), folder)
    return sprand.load(built(MLP, width=60), folder)


def set_aside() -> nn.Module:
    model = applied()
    sprand.apply(model, name="second", **FIELDS | {"seed": 4})
    return sprand.switch(model, "default")


def moved() -> nn.Module:
    model = applied()
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    mask = sprand.DynamicMask(model, optimizer, every=2, fraction=0.5, steps=1)
    for seed in range(4):
        step(model, optimizer, seed)
        mask.step()
    assert mask.changes == 2
    return model


MADE = {"apply": applied, "peft": through_peft, "set aside": set_aside, "moved": moved, "loaded": loaded}


@pytest.mark.parametrize("how", MADE)
def test_nothing_as_large_as_the_entries_is_kept_of_their_positions(how, tmp_path):
    before = {id(tensor): tensor for tensor in integers_alive()}
    model = MADE[how](tmp_path) if how == "loaded" else MADE[how]()
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    step(model, optimizer)
    assert max(site.entries.delta.numel() for site in sites_of(model)) == 900
    assert max(tensor.numel() for tensor in integers_alive() if id(tensor) not in before) < 100


def written(model: nn.Module) -> dict[str, Tensor]:
    """What the weights hold, by name."""
    sprand.write(model)
    return {site.name: site.weight.detach().clone() for site in sites_of(model)}


def trained(model: nn.Module, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> nn.Module:
    optimizer = optimizer_of(model)
    for seed in range(3):
        step(model, optimizer, seed)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_steps_of_columns_are_those_of_their_entries_bit_for_bit(fused, dtype):
    """Of the same gradients: those of columns and of entries are sums in different orders."""

    def stepped(as_entries: bool) -> nn.Module:
        model = sprand.apply(built(MLP).to(dtype), **FIELDS)
        for site in sites_of(model) if as_entries else ():
            site.module.put_entries("weight", Pattern(site.entries.indices), site.entries.base.clone())
        parameters = sprand.parameters(model)
        optimizer = sprand.SparseAdamW(model, lr=1e-2) if fused else torch.optim.AdamW(parameters, lr=1e-2)
        for seed in range(3):
            for p in sprand.parameters(model):
                p.grad = torch.sin(torch.arange(p.numel()) + float(seed))
            optimizer.step()
        assert all((site.entries.pattern.columns is None) == as_entries for site in sites_of(model))
        return model

    one, other = stepped(False), stepped(True)
    x, _ = points_and_labels(0, dtype)
    assert torch.equal(one(x), other(x))
    assert_same_bits(written(one), written(other))
    assert_same_bits(bits(sprand.unmerge(one)), bits(built(MLP).to(dtype)))


def flat_state(model: nn.Module) -> dict[str, Tensor]:
    """A state in which every position is named, as versions wrote it that kept no columns."""
    state = copy.deepcopy(model.state_dict())
    for site in sites_of(model):
        state[f"{site.module_name}.sprand_indices"] = site.entries.indices
    return state


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("into", ["columns", "entries"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_state_of_either_kind_loads_into_a_model_of_either_kind(flat, into, assign):
    model = trained(applied(), lambda m: sprand.SparseAdamW(m, lr=1e-2))
    state = flat_state(model) if flat else model.state_dict()
    other = applied(seed=9) if into == "columns" else sprand.apply(built(MLP, width=60), density=0.25, seed=9)
    assert [site.entries.pattern.nnz for site in sites_of(other)] == [site.entries.pattern.nnz for site in sites_of(model)]
    other.load_state_dict(state, assign=assign)
    for mine, theirs in zip(sites_of(other), sites_of(model), strict=True):
        assert mine.entries.pattern.is_same(theirs.entries.pattern) and mine.entries.pattern.columns is not None
    x, _ = points_and_labels()
    assert torch.equal(other(x), model(x))
    again = [trained(m, lambda m: sprand.SparseAdamW(m, lr=1e-2)) for m in (model, other)]
    assert_same_bits(written(again[0]), written(again[1]))


def test_a_state_of_single_entries_loads_into_a_model_of_columns():
    model = trained(sprand.apply(built(MLP, width=60), density=0.25, seed=9), lambda m: sprand.SparseAdamW(m, lr=1e-2))
    other = applied()
    other.load_state_dict(model.state_dict())
    assert all(site.entries.pattern.columns is None for site in sites_of(other))
    x, _ = points_and_labels()
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("given", [False, True])
def test_columns_come_back_from_the_meta_device(given):
    fields = {"strategy": "magnitude", "layout": "columns", "density": 0.25} if given else FIELDS
    model = sprand.apply(built(MLP), **fields)
    before = {site.name: site.entries.indices for site in sites_of(model)}
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(built(MLP).state_dict(), strict=False)
    assert {site.name: site.entries.indices.tolist() for site in sites_of(model)} == {n: i.tolist() for n, i in before.items()}
    assert all(site.entries.pattern.columns is not None for site in sites_of(model))
    base = built(MLP)
    assert_same_bits(written(model), {name: base.get_parameter(name).detach() for name in before})


def test_a_mask_that_is_drawn_anew_may_have_columns_or_not():
    model = applied(width=24)
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    sizes = {site.name: (site.shape, site.entries.pattern.nnz) for site in sites_of(model)}

    def first(model: nn.Module) -> dict[str, Tensor]:
        return {name: torch.arange(nnz) * 2 for name, (_, nnz) in sizes.items()}

    def columns(model: nn.Module) -> dict[str, Tensor]:
        masks = {}
        for name, (shape, nnz) in sizes.items():
            masks[name] = torch.zeros(shape, dtype=torch.bool)
            masks[name][:, : nnz // shape[0]] = True
        return masks

    turns = iter((first, columns))
    mask = sprand.DynamicMask(model, optimizer, every=1, mode="recompute", strategy=lambda model: next(turns)(model))
    for in_columns in (False, True):
        step(model, optimizer)
        before = written(model)
        assert mask.step()
        assert all((site.entries.pattern.columns is not None) == in_columns for site in sites_of(model))
        assert_same_bits(written(model), before)
    step(model, optimizer)
    for name, after in written(model).items():
        changed = (after != before[name]).any(0).nonzero().flatten().tolist()
        assert changed == list(range(sizes[name][1] // sizes[name][0][0])), name


def test_owners_of_a_tied_weight_share_the_numbers():
    model = sprand.apply(built(Tied), target_modules=["embed", "out"], **FIELDS)
    one, other = model.embed.sparse_entries(), model.out.sparse_entries()
    assert one.pattern.chosen is other.pattern.chosen and one.pattern.columns == other.pattern.columns is not None
    x = torch.arange(12).view(3, 4)
    dense = built(Tied).double()
    for trained in (model.double(), dense):
        trained(x).square().sum().backward()
    expected = dense.embed.weight.grad.flatten()[one.indices.long()]
    torch.testing.assert_close(model.embed.sprand_delta.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_the_gradient_of_an_embeddings_columns_is_that_of_its_entries(padding_idx):
    torch.manual_seed(0)
    layer = nn.Embedding(30, 16, padding_idx=padding_idx).double()
    tokens, dense = torch.randint(0, 30, (4, 9)), copy.deepcopy(layer)
    model = sprand.apply(nn.Sequential(layer), target_modules=["0"], **FIELDS)
    assert layer.sparse_entries().pattern.columns is not None
    grad = torch.randn(4, 9, 16, dtype=torch.float64)
    model(tokens).backward(grad)
    dense(tokens).backward(grad)
    expected = dense.weight.grad.flatten()[layer.sparse_entries().indices.long()]
    torch.testing.assert_close(layer.sprand_delta.grad, expected, rtol=1e-12, atol=1e-12)


def test_what_is_changed_in_place_is_drawn_anew_or_refused():
    model = applied()
    layer = next(site.module for site in sites_of(model))
    before = layer.sparse_entries().indices
    layer.sprand_indices += 1
    assert torch.equal(layer.sparse_entries().indices, before)
    given = applied(strategy="magnitude")
    layer = next(site.module for site in sites_of(given))
    layer.sprand_indices -= 1
    with pytest.raises(ValueError, match="the positions of its trained entries were changed in place"):
        given(points_and_labels()[0])


def test_a_module_says_how_many_entries_it_trains():
    model = applied()
    for site in sites_of(model):
        count = site.shape[0] * len(site.entries.pattern.chosen)
        assert f"trains {count:,} of weight" in repr(site.module)
