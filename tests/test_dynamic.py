"""Dynamic masks: equal to a literal reference, resumable to the bit, exact on disk, and without a dense gradient."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sprand
from dynamic_masks import LR, MODES, OPTIMIZERS, Drawn, pair, train
from models import EVERY_TARGET, MLP, EveryLayer, Tied, assert_same_bits, bits, built, points_and_labels, tokens_and_labels
from sprand.kernels import schedule
from sprand.kernels.topk import largest, order_keys
from watch import WatchSizes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_regrowth_equals_the_reference_over_50_steps(optimizer, steps):
    model, optimizer, reference = pair(optimizer)
    mask = sprand.DynamicMask(model, optimizer, every=7, steps=steps, fraction=0.3, decay="cosine", until=60)
    for count in range(1, 51):
        change = -(-count // 7) * 7

        def exchanged(nnz, change=change):
            return round(0.3 / 2 * (1 + math.cos(math.pi * change / 60)) * nnz)

        train(model, optimizer, mask, 1, count - 1)
        reference.step(count, count > change - steps, exchanged)
        if count == change:
            reference.regrow(exchanged)
        reference.check(model)
    assert mask.changes == 7


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_recomputation_equals_the_reference_over_50_steps(optimizer):
    model, optimizer, reference = pair(optimizer)
    mask = sprand.DynamicMask(model, optimizer, every=9, mode="recompute", strategy=Drawn())
    again = Drawn()
    for count in range(1, 51):
        train(model, optimizer, mask, 1, count - 1)
        reference.step(count, False, None)
        if count % 9 == 0:
            reference.recompute(again(model))
        reference.check(model)
    assert mask.changes == 5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [6, 10, 11])
def test_resume_equals_never_stopped(tmp_path, mode, stop):
    """Stopped right after a change, and inside of the steps that look for candidates."""
    whole = sprand.apply(built(MLP), density=0.2)
    optimizer = sprand.SparseAdamW(whole, lr=LR)
    mask = sprand.DynamicMask(whole, optimizer, **MODES[mode]())
    train(whole, optimizer, mask, stop)
    file = io.BytesIO()
    torch.save([item.state_dict() for item in (whole, optimizer, mask)], file)
    train(whole, optimizer, mask, 20 - stop, stop)
    file.seek(0)
    resumed = sprand.apply(built(MLP), density=0.2, seed=1)
    again = sprand.SparseAdamW(resumed, lr=LR)
    other = sprand.DynamicMask(resumed, again, **MODES[mode](changes=1))
    for item, state in zip((resumed, again, other), torch.load(file, weights_only=True), strict=True):
        item.load_state_dict(state)
    train(resumed, again, other, 20 - stop, stop)
    assert_same_bits(whole.state_dict(), resumed.state_dict())
    for p, q in zip(sprand.parameters(whole), sprand.parameters(resumed), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], again.state[q]["exp_avg"])
    sprand.save(resumed, tmp_path)
    assert_same_bits(bits(sprand.load(built(MLP), tmp_path)), bits(whole))


def test_a_state_of_a_mask_with_other_options_is_refused_and_changes_nothing():
    model = sprand.apply(built(MLP), density=0.2)
    optimizer = sprand.SparseAdamW(model, lr=LR)
    mask = sprand.DynamicMask(model, optimizer, every=5, steps=4)
    train(model, optimizer, mask, 4)
    state = mask.state_dict()
    assert state["candidates"]
    for options in ({"every": 9, "steps": 2}, {"every": 5, "grow": "random"}, {"every": 5, "until": 4}):
        other = sprand.DynamicMask(model, optimizer, **options)
        with pytest.raises(ValueError, match="looks for entries to grow after step 4, this mask does not"):
            other.load_state_dict(state)
        assert (other.count, other.state_dict()["candidates"]) == (0, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_after_changes_reproduces_the_model(tmp_path, mode, dtype, device):
    def fresh():
        return built(MLP).to(device, dtype)

    model = sprand.apply(fresh(), density=0.2)
    optimizer = sprand.SparseAdamW(model, lr=LR)
    train(model, optimizer, sprand.DynamicMask(model, optimizer, **MODES[mode]()), 20)
    x = points_and_labels(0, dtype)[0].to(device)
    sprand.save(model, tmp_path)
    loaded = sprand.load(fresh(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert_same_bits(bits(loaded), bits(model))
    for either in (model, loaded):
        trained = bits(either)
        with sprand.disabled(either):
            assert_same_bits(bits(either), bits(fresh()))
            with sprand.disabled(either):
                pass
            assert_same_bits(bits(either), bits(fresh()))
        assert_same_bits(bits(either), trained)
        name = either._sprand.active
        sprand.switch(either, None)
        assert_same_bits(bits(either), bits(fresh()))
        sprand.switch(either, name)
        assert_same_bits(bits(either), trained)
    sprand.load(loaded, tmp_path)
    assert_same_bits(bits(loaded), trained)
    assert_same_bits(bits(sprand.unmerge(loaded)), bits(fresh()))
    assert_same_bits(bits(sprand.merge(model)), trained)


def test_dropped_entries_go_back_to_their_base():
    model = sprand.apply(built(MLP), density=0.2)
    optimizer = sprand.SparseAdamW(model, lr=LR)
    train(model, optimizer, sprand.DynamicMask(model, optimizer, fraction=0.5, every=3), 12)
    for name, module in model.named_modules():
        if isinstance(module, sprand.SparseModule):
            base = built(MLP).get_submodule(name).weight.flatten()
            changed = (module.weight.flatten() != base).nonzero().flatten()
            assert torch.isin(changed, module.sprand_indices).all()


@pytest.mark.parametrize("mode", ["regrow", "recompute"])
def test_every_kind_of_layer_keeps_its_count(mode, tmp_path):
    model = sprand.apply(built(EveryLayer), density=0.2, **EVERY_TARGET)
    optimizer = sprand.SparseAdamW(model, lr=LR)
    counts = {name: value.numel() for name, value in model.state_dict().items() if "sprand_indices" in name}
    before = {name: value.clone() for name, value in model.state_dict().items() if "sprand_indices" in name}

    def strategy(model):
        return {
            name: torch.randperm(indices.max() + 1)[: indices.numel()] for name, indices in model._sprand.current.indices.items()
        }

    options = {"fraction": 0.3} if mode == "regrow" else {"mode": mode, "strategy": strategy}
    mask = sprand.DynamicMask(model, optimizer, every=4, **options)
    x, y = tokens_and_labels()
    for _ in range(9):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        mask.step()
        optimizer.zero_grad()
    after = model.state_dict()
    for name, count in counts.items():
        assert after[name].unique().numel() == count
        assert not torch.equal(after[name], before[name])
    sprand.save(model, tmp_path)
    fresh = sprand.load(built(EveryLayer), tmp_path)
    assert_same_bits(bits(fresh), bits(model))
    assert torch.equal(fresh(x), model(x))


def test_tied_weights_move_together():
    model = sprand.apply(built(Tied), density=0.2, target_modules=["embed", "mix"])
    optimizer = sprand.SparseAdamW(model, lr=LR)
    mask = sprand.DynamicMask(model, optimizer, every=3, fraction=0.3)
    tokens = torch.randint(0, 20, (4, 6))
    for _ in range(7):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        mask.step()
        optimizer.zero_grad()
    assert torch.equal(model.embed.sprand_indices, model.out.sprand_indices)
    assert torch.equal(model.embed.sprand_base, model.out.sprand_base)
    assert model.embed.sprand_delta is model.out.sprand_delta


@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_no_dense_gradient_is_made(monkeypatch, layer):
    """Candidates come from chunks of rows: of 200 here, at most 10 at a time."""
    monkeypatch.setattr(schedule, "CHUNK_ROWS", 1)
    monkeypatch.setattr(schedule, "CHUNK_BYTES", 10 * 300 * 4)
    if layer == "linear":
        model, x = nn.Sequential(nn.Linear(300, 200)), torch.randn(6, 300)
        sprand.apply(model, density=0.01)
    else:
        model, x = nn.Sequential(nn.Embedding(200, 300)), torch.randint(0, 200, (6,))
        sprand.apply(model, density=0.01, target_modules=["0"])
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    mask = sprand.DynamicMask(model, optimizer, every=2, steps=2)
    before = model[0].sprand_indices.clone()
    with WatchSizes(11 * 300) as watch:
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            mask.step()
            optimizer.zero_grad()
    assert not watch.seen
    assert not torch.equal(model[0].sprand_indices, before)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_chunks_do_not_change_the_choice(monkeypatch, size):
    results = []
    monkeypatch.setattr(schedule, "CHUNK_ROWS", 1)
    for chunk in (size * 4, 1 << 20):
        monkeypatch.setattr(schedule, "CHUNK_BYTES", chunk)
        model = sprand.apply(built(MLP, width=8), density=0.1)
        optimizer = sprand.SparseAdamW(model, lr=LR)
        train(model, optimizer, sprand.DynamicMask(model, optimizer, every=2, fraction=0.3), 4)
        results.append(model.second.sprand_indices.clone())
    assert torch.equal(*results)


def test_equal_scores_go_to_the_lower_position():
    assert largest(order_keys(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0])), 3).tolist() == [0, 1, 3]
    assert largest(order_keys(torch.zeros(1000)), 4).tolist() == [0, 1, 2, 3]
    assert largest(order_keys(torch.ones(3)), 0).tolist() == []


def test_overflow_grows_nothing():
    """Gradients that are not finite choose nobody: the mask stays, and so does every value."""
    model = sprand.apply(built(MLP), density=0.2)
    optimizer = torch.optim.SGD(sprand.parameters(model), lr=0.0)
    mask = sprand.DynamicMask(model, optimizer, every=1)
    before = model.second.sprand_indices.clone()
    x, y = points_and_labels()
    (F.cross_entropy(model(x), y) * float("inf")).backward()
    mask.step()
    assert torch.equal(model.second.sprand_indices, before)


def test_until_ends_the_changes_and_the_search():
    model = sprand.apply(built(MLP), density=0.2)
    optimizer = sprand.SparseAdamW(model, lr=LR)
    mask = sprand.DynamicMask(model, optimizer, every=2, until=5, decay="linear")
    train(model, optimizer, mask, 12)
    assert mask.changes == 2
    assert model.second.sparse_entries().candidates is None


BAD = {
    "fraction zero": ({"fraction": 0}, "fraction: expected a number in"),
    "fraction one": ({"fraction": 1.0}, "fraction: expected a number in"),
    "every": ({"every": 0}, "every: expected a positive int"),
    "steps": ({"every": 3, "steps": 4}, "steps: expected at most every=3, got 4"),
    "drop": ({"drop": "weights"}, "drop: expected one of delta_change, delta"),
    "decay": ({"decay": "cosine"}, "give until"),
    "mode": ({"mode": "speft"}, "mode: expected one of regrow, recompute"),
    "no strategy": ({"mode": "recompute"}, "strategy: mode='recompute' needs"),
    "strategy": ({"strategy": {}}, "only for mode='recompute'"),
    "whole mask": ({"mode": "recompute", "strategy": {}, "fraction": 0.1}, "leave them out"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_options_out_of_range(options, message):
    model = sprand.apply(built(MLP), density=0.2)
    with pytest.raises(ValueError, match=message):
        sprand.DynamicMask(model, sprand.SparseAdamW(model), **options)


def test_models_and_optimizers_that_do_not_fit():
    with pytest.raises(ValueError, match="no trained entries"):
        sprand.DynamicMask(built(MLP))
    model = sprand.apply(built(MLP), density=0.2)
    with pytest.raises(ValueError, match=r"does not hold the trained entries of second.weight \(2 of 3 weights\)"):
        sprand.DynamicMask(model, torch.optim.AdamW([model.first.sprand_delta]))
    mask = sprand.DynamicMask(model, every=1)
    with pytest.raises(RuntimeError, match="no optimizer"):
        mask.step()
    mask.bind(sprand.SparseAdamW(model))
    with pytest.raises(RuntimeError, match="no gradient was seen"):
        mask.step()
    blocks = torch.optim.AdamW(sprand.parameters(model))
    blocks.state[model.second.sprand_delta]["absmax"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"AdamW keeps a state of \[3\]"):
        sprand.DynamicMask(model, blocks, every=1, grow="random").step()
    with pytest.raises(ValueError, match="expected a state for the entries"):
        mask.load_state_dict(sprand.DynamicMask(sprand.apply(built(MLP), density=0.3)).state_dict())
    sprand.switch(model, None)
    with pytest.raises(RuntimeError, match="another adapter is active"):
        mask.step()
    with pytest.raises(ValueError, match="no sparse entries that are active"):
        sprand.DynamicMask(model)


@pytest.mark.parametrize("picked", [{}, {"first.weight": [0]}, None, {"first.weight": torch.arange(10**4)}])
def test_a_strategy_that_does_not_fit_changes_nothing(picked):
    model = sprand.apply(built(MLP), density=0.2)
    optimizer = sprand.SparseAdamW(model, lr=LR)
    mask = sprand.DynamicMask(model, optimizer, every=2, mode="recompute", strategy=lambda model: picked)
    train(model, optimizer, mask, 1)
    before = bits(model)
    with pytest.raises(ValueError, match="expected|out of range"):
        mask.step()
    assert_same_bits(bits(model), before)
    assert not model._sprand.current.frozen
