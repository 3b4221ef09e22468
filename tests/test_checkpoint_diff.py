"""The difference of two checkpoints merges back to the tuned one, bit for bit, whatever the change was."""

from __future__ import annotations

import json

import pytest
import torch

import sprand
from checkpoints import DTYPES, assert_same, llama, plain, tensors_of
from sprand.checkpoint.diff import diff, exact_deltas
from sprand.checkpoint.merge import merge, verify
from sprand.checkpoint.revert import revert

HARD = {  # base, tuned: in each dtype the float32 delta has to be found, or there is none
    "far smaller": (1.0, 1e-30),
    "far larger": (1e-30, 1.0),
    "to minus zero": (0.0, -0.0),
    "from minus zero": (-0.0, 0.0),
    "to the smallest number": (3.0, 1e-7),
    "from infinity": (float("inf"), 2.0),
    "from no number": (float("nan"), 2.0),
    "sign": (-1e4, 1e4),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("before", "after"), HARD.values(), ids=HARD)
def test_hard_changes_come_out_exactly(tmp_path, dtype, before, after):
    base, tuned = torch.full((4, 5), 0.5, dtype=dtype), torch.full((4, 5), 0.5, dtype=dtype)
    base[1, 2], tuned[1, 2] = before, after
    base[3, 4], tuned[3, 4] = 0.25, 0.375
    plain(tmp_path / "base", {"w": base})
    plain(tmp_path / "tuned", {"w": tuned})
    said = diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")
    assert said.kept == said.changed == 2
    merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "tuned"))
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(base.clone())
    sprand.load(model, tmp_path / "adapter")
    sprand.merge(model)
    assert_same(dict(model.state_dict()), {"w": tuned})


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=[*DTYPES, "fp64"])
def test_a_delta_is_found_wherever_rounding_allows_one(dtype):
    """Random bits as base and tuned: deltas that say they are exact are, and near values always have one."""
    generator = torch.Generator().manual_seed(0)
    size = torch.empty(0, dtype=dtype).element_size()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = torch.randint(-(2**15), 2**15, (2, 20000, size // 2), generator=generator, dtype=torch.int16)
    base, tuned = bits.view(integer).squeeze(-1).view(dtype)
    finite = torch.isfinite(base) & torch.isfinite(tuned)
    base, tuned = base[finite], tuned[finite]
    near = base * (1 + torch.randn(base.shape, generator=generator, dtype=torch.float64) * 1e-2).to(dtype)
    for goal, least in ((tuned, 0.0), (near, 0.999)):
        deltas, exact = exact_deltas(base, goal)
        result = (base.to(deltas.dtype) + deltas).to(dtype)
        result = torch.where(deltas != 0, result, base)
        assert torch.equal(result[exact].view(integer), goal[exact].view(integer))
        assert exact.double().mean() >= least


def test_a_tuned_language_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    base = llama(tmp_path, torch.bfloat16, "15KB")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(2):
        tokens = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(seed))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    said = diff(base, tmp_path / "tuned", tmp_path / "adapter")
    assert 0 < said.tensors <= said.compared == len(tensors_of(base)) and said.kept == said.changed > 10000
    merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "tuned"))
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    sprand.merge(sprand.load(fresh, tmp_path / "adapter"))
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))
    revert(tmp_path / "out", [(tmp_path / "adapter", 1.0)], tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(base))


def test_density_keeps_the_largest_changes_of_each_tensor(tmp_path):
    base = {"a": torch.zeros(10, 10), "b": torch.zeros(50)}
    tuned = {"a": torch.arange(100.0).view(10, 10), "b": torch.zeros(50)}
    tuned["b"][3] = 1e-3
    plain(tmp_path / "base", base)
    plain(tmp_path / "tuned", tuned)
    said = diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", density=0.05)
    assert (said.changed, said.kept, said.tensors) == (100, 6, 2)
    merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    expected = torch.where(tuned["a"] >= 95, tuned["a"], 0.0)
    assert_same(tensors_of(tmp_path / "out"), {"a": expected, "b": tuned["b"]})
    with pytest.raises(ValueError, match="density: expected a fraction"):
        diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", density=0)


def test_new_tensors_prefixes_and_other_shapes(tmp_path):
    """A classifier tuned from an encoder: its tensors have a prefix, a head is new."""
    torch.manual_seed(0)
    base = {"encoder.0.w": torch.randn(4, 4), "pooler.w": torch.randn(4)}
    tuned = {f"bert.{name}": value.clone() for name, value in base.items()} | {"classifier.w": torch.randn(2, 4)}
    tuned["bert.encoder.0.w"][0, 1] += 1
    plain(tmp_path / "base", base)
    plain(tmp_path / "tuned", tuned)
    said = diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")
    assert said.added == ("classifier.w",) and said.missing == ()
    merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    expected = {name.removeprefix("bert."): value for name, value in tuned.items()}
    assert_same(tensors_of(tmp_path / "out"), expected)
    verify(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")


REFUSED = {
    "nothing": (lambda w: w, "holds the same values"),
    "another dtype": (lambda w: w.half(), "w is F32 in .* and F16 in .*; save both in one dtype"),
    "not finite": (lambda w: w.clone().fill_(float("inf")), "w holds values that are no finite numbers"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_is_refused_and_nothing_is_written(tmp_path, change, message):
    weight = torch.randn(3, 4)
    plain(tmp_path / "base", {"w": weight, "counts": torch.arange(3)})
    plain(tmp_path / "tuned", {"w": change(weight), "counts": torch.arange(3)})
    with pytest.raises(ValueError, match=message):
        diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")
    plain(tmp_path / "counted", {"w": weight, "counts": torch.arange(1, 4)})
    with pytest.raises(ValueError, match="counts is I64 and differs"):
        diff(tmp_path / "base", tmp_path / "counted", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


OTHERS = {
    "other names": {"a.x": torch.ones(3, 4), "b.y": torch.ones(5)},
    "other shapes": {"w": torch.ones(4, 4), "v": torch.ones(6)},
    "some behind a prefix": {"bert.w": torch.ones(3, 4), "bert.u": torch.ones(5)},
}


@pytest.mark.parametrize("tensors", OTHERS.values(), ids=OTHERS)
def test_models_that_have_nothing_in_common_are_refused(tmp_path, tensors):
    plain(tmp_path / "base", {"w": torch.zeros(3, 4), "v": torch.zeros(5)})
    plain(tmp_path / "tuned", tensors)
    with pytest.raises(ValueError, match="base and .*tuned have nothing in common"):
        diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_adapter_says_where_it_comes_from(tmp_path):
    plain(tmp_path / "base", {"w": torch.zeros(4)})
    plain(tmp_path / "tuned", {"w": torch.ones(4)})
    diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")
    description = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert description["selection"] == {"strategy": "diff", "density": None}
    assert description["versions"]["format_version"] == 4
