"""Columns: which inputs of a layer train, drawn or by scores, against a brute force over columns in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sprand
from models import EVERY_TARGET, MLP, EveryLayer, assert_same_bits, bits, built
from peft_models import llama
from sprand.layers.sites import weights_of
from sprand.layers.units import Units, whole_units
from sprand.selection import pattern
from test_pattern import assert_even, assert_uniform
from test_selection import MODULES, ORACLES, TARGETS, fields_of

SQUARED = ("magnitude", "gradient", "taylor_fo", "lift")  # the size of a signed number: squares add up over a column


def columns_of(shape, axis, indices):
    """The columns that indices are, looked up one by one in a mask; each is proven to be there in full."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[indices.long()] = True
    parts = [mask.view(shape).select(axis, number) for number in range(shape[axis])]
    assert all(bool(part.all()) == bool(part.any()) for part in parts)
    return [number for number, part in enumerate(parts) if part.all()]


def gpt2():
    transformers = pytest.importorskip("transformers", reason="Conv1D is a layer of transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))


KINDS = {  # module, its axis of inputs
    "linear": (lambda: nn.Linear(6, 4), 1),
    "embedding": (lambda: nn.Embedding(9, 6), 1),
    "bag": (lambda: nn.EmbeddingBag(9, 6), 1),
    "convolution": (lambda: nn.Conv2d(6, 4, 3), 1),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), 1),
    "transposed convolution": (lambda: nn.ConvTranspose1d(6, 4, 3), 0),
    "Conv1D": (lambda: gpt2().transformer.h[0].mlp.c_fc, 0),
    "norm": (lambda: nn.LayerNorm(6), None),
    "recurrent": (lambda: nn.LSTM(6, 4), None),
    "bilinear": (lambda: nn.Bilinear(6, 5, 4), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_is_all_that_reads_one_input(kind):
    make, axis = KINDS[kind]
    sites = weights_of(nn.ModuleDict({"only": make()}))
    weights = {name: site.column_axis for name, site in sites.items() if not name.endswith("bias")}
    assert set(weights.values()) == {axis}
    assert all(site.column_axis is None for name, site in sites.items() if name.endswith("bias"))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.data())
def test_entries_and_columns_are_two_names_of_the_same(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    axis = data.draw(st.sampled_from([0, 1]))
    chosen = torch.tensor(sorted(data.draw(st.sets(st.integers(0, shape[axis] - 1)))), dtype=torch.int32)
    units = Units.of(shape, axis)
    indices = units.entries(chosen)
    expected = torch.zeros(shape, dtype=torch.bool).index_fill(axis, chosen.long(), True).flatten().nonzero().flatten()
    assert indices.dtype == torch.int32 and torch.equal(indices.long(), expected)
    assert torch.equal(units.whole(indices), chosen)
    assert torch.equal(units.holding(indices), chosen.long())
    if indices.numel() > 1:
        lost = data.draw(st.integers(0, indices.numel() - 1))
        others = torch.cat([indices[:lost], indices[lost + 1 :]])
        assert units.size == 1 or units.whole(others) is None


@pytest.mark.parametrize("strategy", ["random", "uniform"])
def test_every_column_is_drawn_as_often(strategy):
    draws = []
    for seed in range(3000):
        indices = pattern.draw(strategy, "w", (3, 24), 15, seed, axis=1)
        draws.append(torch.tensor(columns_of((3, 24), 1, indices)))
    draws = torch.stack(draws)
    assert draws.shape == (3000, 5)
    assert_even(draws, 24)
    picked = torch.randint(5, (len(draws), 1), generator=torch.Generator().manual_seed(0))
    assert_uniform(draws.gather(1, picked).squeeze(1), 24)


def test_other_names_seeds_and_layouts_are_other_draws():
    def drawn(name="a", seed=0, strategy="random", axis=1):
        return pattern.draw(strategy, name, (8, 512), 8 * 64 if axis == 1 else 512 * 4, seed, axis=axis)

    here = columns_of((8, 512), 1, drawn())
    for other in (drawn(name="b"), drawn(seed=1), drawn(strategy="uniform")):
        assert len(set(here) & set(columns_of((8, 512), 1, other))) < 32
    assert torch.equal(drawn(), drawn())
    assert len(columns_of((8, 512), 0, drawn(axis=0))) == 4
    assert drawn().dtype == torch.int32
    assert pattern.draw("random", "a", (8, 512), 512, 0, "meta", 1).shape == (512,)
    with pytest.raises(ValueError, match="w: expected whole columns of 8 entries, got 12 entries"):
        pattern.draw("random", "w", (8, 512), 12, 0, axis=1)


@pytest.mark.parametrize("strategy", ["random", "uniform", "magnitude"])
def test_every_target_gets_its_share_in_whole_columns(strategy):
    model = sprand.apply(built(EveryLayer), density=0.2, layout="columns", strategy=strategy, **EVERY_TARGET)
    indices = model._sprand.current.indices
    axes = {name: 1 for name in ("embed.weight", "linear.weight", "conv.weight")}
    total = sum(math.prod(model.get_parameter(name).shape) for name in indices)
    sizes = []
    for name, chosen in indices.items():
        shape = tuple(model.get_parameter(name).shape)
        size = math.prod(shape) // shape[axes[name]] if name in axes else 1
        if name in axes:
            assert len(columns_of(shape, axes[name], chosen)) * size == len(chosen)
        assert abs(len(chosen) - 0.2 * math.prod(shape)) < size
        sizes.append(size)
    count = sum(map(len, indices.values()))
    assert round(0.2 * total) - max(sizes) < count <= round(0.2 * total)


def column_scores(strategy, score):
    return (score.double() ** 2 if strategy in SQUARED and strategy != "taylor_fo" else score.double()).sum(0)


@pytest.mark.parametrize("strategy", ORACLES)
def test_a_local_choice_is_the_columns_with_the_largest_sums(strategy):
    chosen = sprand.select(built(MLP), density=0.3, layout="columns", **fields_of(strategy))
    for name, score, count in zip(TARGETS, ORACLES[strategy](), (5, 7, 7), strict=True):
        columns = columns_of(score.shape, 1, chosen[name])
        sums = column_scores(strategy, score.detach())
        assert abs(len(columns) - count) <= 1
        assert set(columns) == set(sums.topk(len(columns)).indices.tolist())


@pytest.mark.filterwarnings("ignore:force:UserWarning")
@pytest.mark.parametrize("strategy", ORACLES)
def test_a_global_choice_is_by_what_an_entry_brings_in_the_mean(strategy):
    """The columns of the three weights have 24, 24 and 4 entries: those that fit are taken in the order of their means."""
    chosen = sprand.select(built(MLP), budget=201, scope="global", layout="columns", **fields_of(strategy))
    ranked = []
    for place, (name, score) in enumerate(zip(TARGETS, ORACLES[strategy](), strict=True)):
        means = column_scores(strategy, score.detach()) / score.shape[0]
        ranked += [(-mean, place, column, name, score.shape[0]) for column, mean in enumerate(means.tolist())]
    left, expected = 201, {name: [] for name in TARGETS}
    for _, _, column, name, size in sorted(ranked):
        if size <= left:
            expected[name].append(column)
            left -= size
    shapes = {name: built(MLP).get_parameter(name).shape for name in TARGETS}
    assert {name: columns_of(shapes[name], 1, chosen[name]) for name in TARGETS} == {
        name: sorted(columns) for name, columns in expected.items()
    }
    assert left < 24


def test_limits_of_a_global_choice_hold_in_columns():
    fields = {"strategy": "magnitude", "density": 0.3, "scope": "global", "layout": "columns"}
    shapes = {"first.weight": (24, 16), "second.weight": (24, 24), "third.weight": (4, 24)}
    free = sprand.select(built(MLP), target_modules=MODULES, **fields)
    bound = sprand.select(built(MLP), target_modules=MODULES, min_density=0.25, max_density=0.5, **fields)
    counts = [{name: len(columns_of(shapes[name], 1, mask[name])) for name in TARGETS} for mask in (free, bound)]
    assert counts[0] != counts[1]
    for name, (_, columns) in shapes.items():
        assert int(0.25 * columns) <= counts[1][name] <= math.ceil(0.5 * columns)
    assert 317 - 24 < bound.nnz <= 317


def test_a_callable_says_whether_squares_add_up():
    weight = torch.tensor([[3.0, 2.0, 0.0], [0.0, 2.0, 1.0]])
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model[0].weight.data.copy_(weight)

    def size(name, weight, stats):
        return weight.abs()

    def chosen():
        mask = sprand.select(model, strategy=size, budget=2, layout="columns")
        return columns_of((2, 3), 1, mask["0.weight"])

    assert chosen() == [1]  # sums 3, 4, 1
    size.squares = True
    assert chosen() == [0]  # sums of squares 9, 8, 1


def test_small_gradients_do_not_vanish():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model[0].weight.data.copy_(1e-30 * torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]]))
    mask = sprand.select(model, strategy="magnitude", budget=4, layout="columns")
    assert columns_of((2, 3), 1, mask["0.weight"]) == [1, 2]


@pytest.mark.parametrize(
    "fields", [{}, {"strategy": "uniform"}, {"strategy": "magnitude"}, {"strategy": "magnitude", "scope": "global"}]
)
def test_columns_that_others_train_are_left_out_whole(fields):
    model = sprand.apply(built(MLP), name="a", density=0.1)
    sprand.switch(model, None)
    sprand.apply(model, name="b", density=0.3, layout="columns", disjoint=[{"second.weight": torch.tensor([5, 30])}], **fields)
    columns = columns_of((24, 24), 1, model._sprand.adapters["b"].indices["second.weight"])
    assert columns and 5 not in columns and 6 not in columns
    everything = {"second.weight": torch.arange(24)}
    if "scope" in fields:
        mask = sprand.select(built(MLP), density=0.3, layout="columns", disjoint=everything, **fields)
        assert not mask["second.weight"].numel() and 317 - 24 < mask.nnz <= 317
    else:
        with pytest.raises(ValueError, match="entries of second.weight were asked for, but 0 are free"):
            sprand.select(built(MLP), density=0.3, layout="columns", disjoint=everything, **fields)


def test_columns_of_one_task_leave_none_of_another():
    model = sprand.apply(built(MLP), name="a", density=0.3, layout="columns")
    sprand.apply(model, name="b", density=0.3, layout="columns", disjoint=True)
    one, two = (model._sprand.adapters[name].indices for name in "ab")
    for name in TARGETS:
        assert not torch.isin(one[name], two[name]).any()


BAD = {
    "no column for all": (
        {"density": 0.03, "layout": "columns"},
        r"layout 'columns': 32 of 1,056 entries leave no whole column to .*; from a density of 0.0625 \(a budget of 66\) on",
    ),
    "no column by score": ({"density": 0.01, "layout": "columns", "strategy": "magnitude"}, "no whole column to first.weight"),
    "zeros": ({"layout": "columns", "preserve_zeros": True}, "preserve_zeros: a whole column trains, and the zeros in it"),
    "mask": (
        {"strategy": {"second.weight": torch.tensor([3])}, "layout": "columns"},
        "layout: a dict of masks or indices fixes the positions; leave out layout='columns'",
    ),
    "layout": ({"layout": "column"}, "layout: expected one of unstructured, columns, got 'column'"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_the_model_left_alone(fields, message):
    model = built(MLP)
    with pytest.raises(ValueError, match=message):
        sprand.apply(model, **fields)
    assert_same_bits(bits(model), bits(built(MLP)))
    assert not hasattr(model, "_sprand")


@pytest.mark.parametrize(
    "make", [lambda: built(MLP), lambda: built(EveryLayer), llama, gpt2], ids=["mlp", "every", "llama", "gpt2"]
)
def test_the_smallest_density_that_is_named_works(make):
    fields = {"target_modules": "all-linear", "layout": "columns"}
    with pytest.raises(ValueError, match="leave no whole column") as refused:
        sprand.apply(make(), density=1e-2, **fields)
    said = str(refused.value)
    density = float(said.partition("density of ")[2].partition(" ")[0])
    budget = int(said.partition("budget of ")[2].partition(")")[0].replace(",", ""))
    for amount in ({"density": density}, {"budget": budget}, {"density": min(1.0, 1.01 * density)}):
        model = sprand.apply(make(), **amount, **fields)
        assert all(indices.numel() for indices in model._sprand.current.indices.values())
    sprand.select(make(), strategy="magnitude", scope="global", density=1e-2, **fields)


def test_whole_columns_are_found_only_where_they_are():
    assert whole_units((4,), torch.arange(4)) is None
    assert whole_units((1, 4), torch.tensor([1, 2])) is None  # of one entry each
    assert whole_units((2, 4), torch.tensor([1, 2])) is None
    assert whole_units((2, 4), torch.tensor([5, 1])) is None  # in no order
    assert whole_units((2, 4), torch.tensor([], dtype=torch.int32)) is None
    axis, columns = whole_units((2, 4), torch.tensor([1, 5]))
    assert axis == 1 and columns.tolist() == [1]
    axis, rows = whole_units((2, 4), torch.tensor([4, 5, 6, 7]))
    assert axis == 0 and rows.tolist() == [1]


def test_a_mask_of_columns_is_drawn_anew(tmp_path):
    model = sprand.apply(built(MLP), density=0.2, layout="columns")
    others = sprand.select(built(MLP), density=0.2, seed=1, layout="columns")
    optimizer = torch.optim.SGD(sprand.parameters(model), lr=0.1)
    mask = sprand.DynamicMask(model, optimizer, every=1, mode="recompute", strategy=lambda model: others)
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    mask.step()
    assert_same_bits(model._sprand.current.indices, others)
    sprand.save(model, tmp_path)
    assert_same_bits(bits(sprand.load(built(MLP), tmp_path)), bits(model))
