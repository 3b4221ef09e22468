"""Choosing by score: every strategy is the top-k of its formula in float64, counts are exact, bad input is named."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sprand
from models import MLP, built, points_and_labels

DENSITY = 0.2
MODULES = ["first", "second", "third"]
TARGETS = ("first.weight", "second.weight", "third.weight")


def batches(size: int = 8):
    x, y = points_and_labels()
    return list(zip(x.split(size), y.split(size), strict=True))


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)


def double():
    """The model in float64, and its mean loss over all data by the name of what divides the logits."""
    model = built(MLP).double()
    x, y = points_and_labels(dtype=torch.float32)
    weights = [model.get_parameter(name) for name in TARGETS]
    return model, weights, lambda temperature=1.0: F.cross_entropy(model(x.double()) / temperature, y)


def mean_gradient():
    _, weights, loss = double()
    return weights, torch.autograd.grad(loss(), weights)


def oracle_fisher():
    model, weights, _ = double()
    x, y = points_and_labels()
    total = [torch.zeros_like(w) for w in weights]
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        for into, g in zip(total, torch.autograd.grad(loss, weights), strict=True):
            into += g**2 / len(x)
    return total


def oracle_grasp(temperature=200.0):
    _, weights, loss = double()
    g = torch.autograd.grad(loss(temperature), weights, create_graph=True)
    product = torch.autograd.grad(sum((a * a.detach()).sum() for a in g), weights)
    return [-h * w for h, w in zip(product, weights, strict=True)]


def oracle_synflow():
    model, weights, _ = double()
    a, b, c = (w.abs().detach().requires_grad_() for w in weights)
    ones = torch.ones(1, 16, dtype=torch.float64)
    hidden = F.linear(F.linear(ones, a, model.first.bias.abs()), b)
    flow = torch.autograd.grad(F.linear(hidden, c, model.third.bias.abs()).sum(), (a, b, c))
    return [(g * w).abs() for g, w in zip(flow, (a, b, c), strict=True)]


def oracle_lift(rank=4):
    def approximation(w):
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return ((u[:, :rank] * s[:rank]) @ v[:rank]).abs()

    return [approximation(w.detach()) for w in double()[1]]


def oracle_off_principal(rank=4):
    scaled = (
        [p / p.square().mean().sqrt() for p in parts] for parts in ([w.detach().abs() for w in double()[1]], oracle_lift(rank))
    )
    return [-torch.minimum(small, low) for small, low in zip(*scaled, strict=True)]


ORACLES = {
    "magnitude": lambda: [w.abs() for w in double()[1]],
    "gradient": lambda: [g.abs() for g in mean_gradient()[1]],
    "snip": lambda: [(w * g).abs() for w, g in zip(*mean_gradient(), strict=True)],
    "force": lambda: [-w * g for w, g in zip(*mean_gradient(), strict=True)],
    "taylor_fo": lambda: [(w * g) ** 2 for w, g in zip(*mean_gradient(), strict=True)],
    "fisher": oracle_fisher,
    "grasp": oracle_grasp,
    "synflow": oracle_synflow,
    "lift": oracle_lift,
    "off_principal": oracle_off_principal,
}
OPTIONS = {name: {"rank": 4} for name in ("lift", "off_principal")}


def fields_of(strategy):
    needs_none = strategy in ("magnitude", "synflow", "lift", "off_principal")
    given = {} if needs_none else {"data": batches(), "loss_fn": loss_fn}
    return given | {
        "strategy": strategy,
        "strategy_options": OPTIONS.get(strategy),
        "target_modules": MODULES,
    }


def assert_top(chosen, score, eps=1e-5):
    """The chosen entries are the largest of the oracle's, but for those that float32 cannot tell from the last of them."""
    score = score.detach().flatten()
    last = score.sort(descending=True).values[len(chosen) - 1].item()
    near = eps * score.abs().max().item()
    mask = torch.zeros(score.shape, dtype=torch.bool)
    mask[chosen.long()] = True
    assert (score[mask] >= last - near).all() and (score[~mask] <= last + near).all()
    assert (score > last + near).sum() < len(chosen) <= (score >= last - near).sum()


@pytest.mark.parametrize("strategy", ORACLES)
def test_a_local_choice_is_the_top_of_the_formula(strategy):
    chosen = sprand.select(built(MLP), density=DENSITY, **fields_of(strategy))
    for name, score in zip(TARGETS, ORACLES[strategy](), strict=True):
        assert chosen[name].dtype == torch.int32 and (chosen[name].diff() > 0).all()
        assert abs(len(chosen[name]) - DENSITY * score.numel()) < 1
        assert_top(chosen[name], score)


@pytest.mark.parametrize("strategy", ORACLES)
def test_a_global_choice_is_the_top_over_all_targets(strategy):
    chosen = sprand.select(built(MLP), budget=201, scope="global", **fields_of(strategy))
    scores = ORACLES[strategy]()
    starts = [0, scores[0].numel(), scores[0].numel() + scores[1].numel()]
    joined = torch.cat([chosen[name].long() + start for name, start in zip(TARGETS, starts, strict=True)])
    assert len(joined) == 201
    assert_top(joined, torch.cat([score.flatten() for score in scores]))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_snip_and_taylor_fo_are_one_mask_and_gradient_and_fisher_two():
    masks = {s: sprand.select(built(MLP), density=DENSITY, **fields_of(s)) for s in ("snip", "taylor_fo", "gradient", "fisher")}
    assert same(masks["snip"], masks["taylor_fo"])
    assert not same(masks["gradient"], masks["fisher"])


def test_how_data_is_cut_into_batches_does_not_matter():
    one = sprand.select(built(MLP), density=DENSITY, **fields_of("snip") | {"data": batches(32)})
    score = ORACLES["snip"]()
    uneven = sprand.select(built(MLP), density=DENSITY, **fields_of("snip") | {"data": batches(5)})
    for name, s in zip(TARGETS, score, strict=True):
        assert_top(one[name], s)
        assert_top(uneven[name], s)


def test_a_callable_sees_the_mean_gradient():
    seen = {}

    def score(name, weight, stats):
        seen[name] = stats.gradient.clone()
        assert stats.examples == 32
        return weight * stats.gradient

    chosen = sprand.select(built(MLP), density=DENSITY, **fields_of("snip") | {"strategy": score})
    for name, w, g in zip(TARGETS, *mean_gradient(), strict=True):
        assert torch.allclose(seen[name].double(), g, rtol=0, atol=1e-6)
        assert_top(chosen[name], w * g)
    without = sprand.select(built(MLP), strategy=lambda name, w, stats: -w.abs(), density=0.1)
    assert len(without["second.weight"]) == 58


def test_apply_with_a_strategy_trains_saves_and_loads_without_data(tmp_path):
    model = sprand.apply(built(MLP), density=DENSITY, **fields_of("snip"))
    picked = sprand.select(built(MLP), density=DENSITY, **fields_of("snip"))
    assert torch.equal(model.second.sprand_indices, picked["second.weight"])
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    before = loss_fn(model, batches(32)[0]).item()
    for _ in range(5):
        loss_fn(model, batches(32)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_fn(model, batches(32)[0]).item() < before
    sprand.save(model, tmp_path)
    fresh = sprand.load(built(MLP), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))


def test_least_and_largest_density_of_each_target():
    fields = fields_of("gradient") | {"scope": "global", "density": 0.1}
    free = sprand.select(built(MLP), **fields)
    bound = sprand.select(built(MLP), **fields, min_density=0.05, max_density=0.15)
    sizes = {"first.weight": 384, "second.weight": 576, "third.weight": 96}
    assert sum(map(len, free.values())) == sum(map(len, bound.values())) == 106
    assert any(len(free[name]) < 0.05 * size or len(free[name]) > 0.15 * size for name, size in sizes.items())
    for name, size in sizes.items():
        assert int(0.05 * size) <= len(bound[name]) <= -(-0.15 * size // 1)
        assert_top(bound[name], dict(zip(TARGETS, ORACLES["gradient"](), strict=True))[name])


def test_a_global_budget_may_leave_a_target_empty():
    def score(name, weight, stats):
        return weight.abs() + (name == "second.weight")

    model = sprand.apply(built(MLP), strategy=score, scope="global", budget=9, target_modules=["first", "second"])
    assert isinstance(model.second, sprand.SparseModule) and not isinstance(model.first, sprand.SparseModule)


@pytest.mark.filterwarnings("ignore:force")
@pytest.mark.parametrize("strategy", ["random", "uniform", "given", *ORACLES])
def test_a_pruned_model_keeps_its_zeros(strategy):
    """2:4: of every four entries of a row the two smallest are zero."""
    model = built(MLP)
    for name in TARGETS:
        w = model.get_parameter(name).data
        w.view(-1, 4).scatter_(1, w.view(-1, 4).abs().argsort(1)[:, :2], 0.0)
    zeros = {name: model.get_parameter(name) == 0 for name in TARGETS}
    fields = fields_of(strategy) if strategy in ORACLES else {"strategy": strategy, "target_modules": MODULES}
    if strategy == "given":
        fields = {"strategy": {name: torch.ones_like(zero) for name, zero in zeros.items()}}
    else:
        fields["density"] = 1.0
    sprand.apply(model, preserve_zeros=True, **fields)
    for name in TARGETS:
        indices = model.get_submodule(name.rpartition(".")[0]).sprand_indices
        assert torch.equal(indices.long(), (~zeros[name]).flatten().nonzero().flatten())
    for p in sprand.parameters(model):
        p.data += 0.01
    sprand.merge(model)
    assert all(torch.equal(model.get_parameter(name) == 0, zero) for name, zero in zeros.items())


@pytest.mark.parametrize("strategy", ["random", "uniform"])
def test_a_random_draw_of_nonzero_entries_is_exact_and_saved(strategy, tmp_path):
    def pruned():
        model = built(MLP)
        model.second.weight.data[::2] = 0
        return model

    model = sprand.apply(pruned(), strategy=strategy, budget=100, target_modules=["second"], preserve_zeros=True)
    assert len(model.second.sprand_indices.unique()) == 100
    sprand.save(model, tmp_path)
    fresh = sprand.load(pruned(), tmp_path)
    assert torch.equal(fresh.second.sprand_indices, model.second.sprand_indices)


def test_force_says_when_too_few_scores_are_positive():
    with pytest.warns(UserWarning, match=r"force: 1,056 entries were asked for, but \d+ of the chosen have no positive score"):
        chosen = sprand.select(built(MLP), density=1.0, **fields_of("force"))
    assert sum(map(len, chosen.values())) == 1056
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sprand.select(built(MLP), density=0.1, **fields_of("force"))


def test_the_recipe_of_speft():
    config = sprand.SparseConfig.speft(0.02, target_modules=["second"])
    assert (config.strategy, config.scope, config.density) == ("gradient", "global", 0.02)
    assert sprand.SparseConfig.from_json(config.to_json()) == config
    assert sprand.SparseConfig.speft(budget=1000).budget == 1000
    assert len(sprand.select(built(MLP), config, data=batches(), loss_fn=loss_fn)["second.weight"]) == 12


def test_a_callable_is_named_in_json_not_stored():
    assert sprand.SparseConfig(strategy=lambda *_: None, density=0.2).to_dict()["strategy"] == "given"


def nan_in_third_batch(model, batch):
    return loss_fn(model, batch) * (float("nan") if batch[0][0, 0] == 7 else 1.0)


MARKED = batches()
MARKED[2][0][0, 0] = 7

BAD = {
    "no data": ({"strategy": "snip"}, "'snip' needs data"),
    "no labels": ({"strategy": "snip", "data": [torch.randn(2, 16)]}, "no loss for batch 0; expected batches with labels"),
    "no batches": ({"strategy": "snip", "data": [], "loss_fn": loss_fn}, "at least one batch"),
    "batch of words": ({"strategy": "snip", "data": ["a"], "loss_fn": loss_fn}, "expected batches with tensors, got str"),
    "loss of each example": (
        {"strategy": "snip", "data": batches(), "loss_fn": lambda m, b: m(b[0])},
        r"expected one number .*got shape \[8, 4\] for batch 0",
    ),
    "nan gradient": (
        {"strategy": "snip", "data": MARKED, "loss_fn": nan_in_third_batch},
        r"gradient of first.weight is not finite at batch 2",
    ),
    "nan score": ({"strategy": lambda name, w, s: w * float("nan")}, r"scores of first.weight are NaN"),
    "score shape": ({"strategy": lambda name, w, s: w[0]}, r"score of shape \[24, 16\] for first.weight, got \[16\]"),
    "score no tensor": ({"strategy": lambda name, w, s: 3}, "got int"),
    "an iterator read twice": (
        {"strategy": "grasp", "data": iter(batches()), "loss_fn": loss_fn},
        "2 passes are needed, and an iterator can be read once",
    ),
    "memory for nothing": (
        {"strategy": "snip", "data": batches(), "loss_fn": loss_fn, "calibration_memory": 100},
        "accumulator of first.weight alone takes 1,536 bytes, got 100",
    ),
    "memory of grasp": (
        {"strategy": "grasp", "data": batches(), "loss_fn": loss_fn, "calibration_memory": 5000},
        "holds the gradients of all targets at once",
    ),
    "memory a word": ({"strategy": "snip", "calibration_memory": "all"}, "calibration_memory: expected 'auto' or"),
    "accumulator dtype": ({"strategy": "snip", "calibration_dtype": torch.float16}, "calibration_dtype: expected"),
    "examples": ({"strategy": "snip", "calibration_examples": 0}, "calibration_examples: expected"),
    "budget too large": ({"strategy": "magnitude", "budget": 10**6}, "1,000,000 entries were asked for"),
    "unknown option": ({"strategy": "grasp", "strategy_options": {"heat": 3}}, "strategy_options: expected temperature"),
    "layout": ({"strategy": "snip", "layout": "run2"}, "runs of adjacent entries .*layout='columns'"),
    "bounds": ({"strategy": "snip", "scope": "global", "min_density": 0.5, "max_density": 0.1}, "0 <= min <= max <= 1"),
    "local bounds": ({"strategy": "snip", "min_density": 0.5}, "expected scope='global'"),
    "bounds that exclude": ({"strategy": "magnitude", "scope": "global", "min_density": 0.5}, "together the targets train"),
    "mask of another shape": (
        {"strategy": {"second.weight": torch.ones(3, 3, dtype=torch.bool)}},
        r"second.weight: expected a mask of shape \[24, 24\]",
    ),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(fields, message):
    fields = {"target_modules": MODULES} | fields
    for call in (sprand.select, sprand.apply):
        model = built(MLP)
        with pytest.raises(ValueError, match=message):
            call(model, **fields)
        assert type(model.second) is nn.Linear and not hasattr(model, "_sprand")


def test_a_model_that_trains_entries_or_has_no_values_is_refused():
    with pytest.raises(ValueError, match="trains entries already"):
        sprand.select(sprand.apply(built(MLP)), strategy="magnitude")
    with pytest.raises(ValueError, match="first.weight is on the meta device"):
        sprand.select(copy.deepcopy(built(MLP)).to("meta"), strategy="magnitude")
