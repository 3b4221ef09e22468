"""Combining adapters and taking one out again are exact, bit for bit, for any dtype, shape and choice of entries."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

import sprand
from checkpoints import assert_same, plain, tensors_of
from sprand.adapters.file import AdapterFile
from sprand.checkpoint.combine import combine, remove
from sprand.checkpoint.merge import merge

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from any_weights import QUICK, Weights, adapted, models  # noqa: E402

METHODS = (
    {"method": "sum"},
    {"method": "mean"},
    {"method": "ties", "density": 0.6},
    {"method": "dare", "density": 0.6, "seed": 3},
)


def saved(generator, tensors, chosen, folder, tied=False):
    """An adapter of these entries, some of whose deltas are zero, in a folder; and the weights it gives."""
    model = adapted(generator, tensors, chosen, tied)
    for p in sprand.parameters(model):
        p.data[::5] = 0
    sprand.write(model)
    sprand.save(model, folder)
    return dict(sprand.merge(model).state_dict())


def split(generator, chosen):
    """The chosen entries, each given to one of two adapters, either of which has some."""
    sides = {name: torch.rand(indices.numel(), generator=generator) < 0.5 for name, indices in chosen.items()}
    halves = [{name: indices[sides[name] == side] for name, indices in chosen.items()} for side in (True, False)]
    halves = [{name: indices for name, indices in half.items() if indices.numel()} for half in halves]
    hypothesis.assume(all(halves))
    return halves


@QUICK
@given(models(), st.booleans())
def test_a_part_is_taken_out_of_disjoint_adapters(case, tied):
    generator, tensors, chosen = case
    halves = split(generator, chosen)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = plain(folder / "base", tensors)
        alone = [saved(generator, tensors, half, folder / str(i), tied) for i, half in enumerate(halves)]
        combine([(folder / "0", 1.0), (folder / "1", 1.0)], base, folder / "both")
        for i in (0, 1):
            remove(folder / "both", folder / str(1 - i), base, folder / f"without{i}")
            left, own = AdapterFile.read(folder / f"without{i}"), AdapterFile.read(folder / str(i))
            assert_same(left.tensors, own.tensors)
            assert left.targets == own.targets
            fresh = sprand.load(Weights(tensors, tied), folder / f"without{i}")
            assert_same(dict(sprand.merge(fresh).state_dict()), alone[i])
        model = Weights(tensors, tied)
        for i in (0, 1):
            sprand.load(model, folder / str(i), name=str(i))
        sprand.switch(model, {"0": 1.0, "1": 1.0})
        for i in (0, 1):
            sprand.switch(model, {str(i): 1.0})
            assert_same({key: value for key, value in model.state_dict().items() if "sprand" not in key}, alone[i])
        assert_same(dict(sprand.unmerge(model).state_dict()), dict(Weights(tensors, tied).state_dict()))


@QUICK
@given(models(), st.sampled_from(METHODS), st.sampled_from(((1.0, 1.0), (0.7, -1.3))))
def test_files_and_models_combine_alike(case, options, weights):
    generator, tensors, chosen = case
    again = {name: torch.randperm(tensors[name].numel(), generator=generator)[: len(chosen[name])] for name in list(chosen)[:2]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, model = plain(folder / "base", tensors), Weights(tensors)
        for i, entries in enumerate((chosen, again)):
            saved(generator, tensors, entries, folder / str(i))
            sprand.load(model, folder / str(i), name=str(i))
        pairs = [(folder / str(i), weight) for i, weight in enumerate(weights)]
        combine(pairs, base, folder / "file", **options)
        sprand.combine(model, {str(i): weight for i, weight in enumerate(weights)}, **options)
        sprand.save(model, folder / "model")
        one, two = AdapterFile.read(folder / "file"), AdapterFile.read(folder / "model")
        assert_same(one.tensors, two.tensors)
        assert one.targets == two.targets and one.selection == two.selection
        union = {n: torch.cat([chosen[n], again.get(n, chosen[n][:0])]).unique() for n in chosen}
        assert all(torch.equal(one.entries(n)[0].long(), indices) for n, indices in union.items())
        merged = dict(sprand.merge(model).state_dict())
        merge(base, [(folder / "file", 1.0)], folder / "out")
        assert_same(tensors_of(folder / "out"), merged)
        if options["method"] == "sum":
            merge(base, pairs, folder / "summed")
            assert_same(tensors_of(folder / "summed"), merged)


@QUICK
@given(models(), st.booleans())
def test_one_adapter_stays_itself(case, tied):
    generator, tensors, chosen = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved(generator, tensors, chosen, folder / "a", tied)
        combine([(folder / "a", 1.0)], plain(folder / "base", tensors), folder / "same")
        assert_same(AdapterFile.read(folder / "same").tensors, AdapterFile.read(folder / "a").tensors)
