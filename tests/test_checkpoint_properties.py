"""Round trips are identities, bit for bit, for any dtype, shape and choice of entries: save/load, merge/revert, diff/merge."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

import sprand
from checkpoints import assert_same, content_of, plain, tensors_of
from sprand.checkpoint.diff import diff
from sprand.checkpoint.merge import merge, verify
from sprand.checkpoint.revert import revert

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from any_weights import QUICK, Weights, adapted, finite_bits, models  # noqa: E402


@QUICK
@given(models(), st.booleans())
def test_save_and_load(case, tied):
    generator, tensors, chosen = case
    model = adapted(generator, tensors, chosen, tied)
    with tempfile.TemporaryDirectory() as folder:
        sprand.save(model, folder)
        fresh = sprand.load(Weights(tensors, tied), folder)
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert_same(dict(sprand.unmerge(fresh).state_dict()), dict(Weights(tensors, tied).state_dict()))


@QUICK
@given(models(), st.booleans())
def test_merge_and_revert(case, tied):
    generator, tensors, chosen = case
    model = adapted(generator, tensors, chosen, tied)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sprand.save(model, folder / "adapter")
        pairs = [(folder / "adapter", 1.0)]
        base = plain(folder / "base", tensors)
        merge(base, pairs, folder / "out")
        merged = {key: value for key, value in sprand.merge(model).state_dict().items() if key != "again"}
        assert_same(tensors_of(folder / "out"), merged)
        verify(base, pairs, folder / "out")
        revert(folder / "out", pairs, folder / "back")
        assert content_of(folder / "back") == content_of(base)


@QUICK
@given(models())
def test_diff_and_merge(case):
    generator, tensors, chosen = case
    tuned = {name: value.clone() for name, value in tensors.items()}
    for name, indices in chosen.items():
        other = finite_bits(generator, tensors[name].shape, tensors[name].dtype)
        tuned[name].view(-1)[indices] = other.view(-1)[indices]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, goal = plain(folder / "base", tensors), plain(folder / "tuned", tuned)
        hypothesis.assume(content_of(base) != content_of(goal))
        diff(base, goal, folder / "adapter")
        merge(base, [(folder / "adapter", 1.0)], folder / "out")
        assert_same(tensors_of(folder / "out"), tuned)
        assert content_of(folder / "out")["model.safetensors"] == content_of(goal)["model.safetensors"]
        fresh = sprand.load(Weights(tensors), folder / "adapter")
        assert_same(dict(sprand.merge(fresh).state_dict()), tuned)
        revert(folder / "out", [(folder / "adapter", 1.0)], folder / "back")
        assert content_of(folder / "back") == content_of(base)
