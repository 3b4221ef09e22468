"""What `apply` targets, counts and refuses; merge, unmerge, switching, moving, copying: exact to the bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sprand
from models import EVERY_TARGET, MLP, EveryLayer, Tied, assert_same_bits, bits, built, points_and_labels, tokens_and_labels
from watch import WritesSeen


def trained(model, steps=3, lr=1e-2):
    x, y = tokens_and_labels() if isinstance(model, EveryLayer) else points_and_labels()
    optimizer = sprand.SparseAdamW(model, lr=lr)
    for _ in range(steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_apply_returns_the_same_object_with_the_same_names():
    model = built(MLP)
    names = [name for name, _ in model.named_parameters()]
    assert sprand.apply(model) is model
    assert type(model) is MLP
    assert isinstance(model.first, nn.Linear)
    assert [name for name, _ in model.named_parameters() if "sprand" not in name] == names
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{m}.sprand_delta" for m in ("first", "second", "third")
    }


def test_encoder_layer_in_evaluation_uses_the_trained_weights():
    """torch's inference path of TransformerEncoderLayer reads weights without calling the layers."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 16)
    sprand.apply(model, density=0.5)
    with torch.no_grad():
        for p in sprand.parameters(model):
            p.add_(0.3)
    expected = model(x).detach()
    for p in sprand.parameters(model):
        p.data.sub_(0.2)
    changed = model(x).detach()
    assert not torch.allclose(expected, changed)
    for p in sprand.parameters(model):
        p.data.add_(0.2)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_unmerges_are_bit_exact(dtype):
    model = built(MLP).to(dtype)
    model.second.weight.data[0, :8] = -0.0
    before = bits(model)
    for seed in range(50):
        sprand.apply(model, density=0.3, seed=seed)
        for p in sprand.parameters(model):
            p.data.normal_()
        sprand.write(model)
        sprand.unmerge(model)
    assert_same_bits(bits(model), before)
    assert type(model.second) is nn.Linear


def test_merged_equals_trained():
    model = trained(sprand.apply(built(EveryLayer), density=0.2, **EVERY_TARGET))
    x, _ = tokens_and_labels()
    expected = model(x)
    sprand.merge(model)
    assert torch.equal(model(x), expected)
    assert not any("sprand" in name for name in model.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.linear) is nn.Linear


def test_merge_writes_what_the_last_step_left():
    """Also after an optimizer that does not write weights."""
    x, y = points_and_labels()
    model = sprand.apply(built(MLP), density=0.5)
    optimizer = torch.optim.AdamW(sprand.parameters(model), lr=0.1, fused=True)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    reference = copy.deepcopy(model)
    saved = {k: v.clone() for k, v in model.state_dict().items() if "sprand" not in k}
    sprand.merge(model)
    assert_same_bits(saved, bits(model))
    assert torch.equal(reference(x), model(x))


def test_disabled_is_the_base_and_nothing_is_lost():
    base = built(EveryLayer)
    model = trained(sprand.apply(built(EveryLayer), density=0.2, **EVERY_TARGET))
    x, _ = tokens_and_labels()
    out, state = model(x), bits(model)
    with pytest.raises(KeyError), sprand.disabled(model):
        assert torch.equal(model(x), base(x))
        with sprand.disabled(model):
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))
        raise KeyError
    assert torch.equal(model(x), out)
    assert_same_bits(bits(model), state)


def test_all_layers_are_written_in_one_call(tmp_path):
    model = trained(sprand.apply(built(EveryLayer), density=0.2, **EVERY_TARGET))
    sprand.save(model, tmp_path)
    sprand.load(model, tmp_path, name="other")
    with WritesSeen() as seen:
        sprand.adapters.model.write(model)
        assert seen.names == ["patch_all_"]
        with sprand.disabled(model):
            assert seen.names == ["patch_all_"] * 2
        assert seen.names == ["patch_all_"] * 3
        sprand.switch(model, "default")
        assert seen.names == ["patch_all_"] * 5  # the base, then the other adapter
        sprand.unmerge(model)
        assert seen.names == ["patch_all_"] * 6


def test_a_weight_of_two_modules_is_left_as_the_last_of_them_writes_it():
    model = sprand.apply(built(Tied), density=0.5, target_modules=["embed", "mix"])
    for p in sprand.parameters(model):
        p.data.add_(1.0)
    states = []
    for first, second in ((False, True), (True, False)):
        model.embed._sprand_active, model.out._sprand_active = first, second
        sprand.adapters.model.write(model)
        states.append(model.embed.weight.clone())
    base = sprand.unmerge(model).embed.weight
    assert torch.equal(states[1], base)
    assert not torch.equal(states[0], base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_back_and_forth(tmp_path, dtype):
    base = built(EveryLayer).to(dtype)
    x, _ = tokens_and_labels()
    outputs, weights = {None: base(x)}, {None: bits(base)}
    for seed, name in enumerate("ab"):
        model = sprand.apply(copy.deepcopy(base), density=0.2, seed=seed, **EVERY_TARGET)
        for p in sprand.parameters(model):
            p.data.add_(torch.randn(p.shape).to(p.dtype))
        outputs[name], weights[name] = model(x), bits(model)
        sprand.save(model, tmp_path / name)
    model = copy.deepcopy(base)
    for name in "ab":
        sprand.load(model, tmp_path / name, name=name)
    for name in ["a", "b", None, "b", "a", None] * 8:
        sprand.switch(model, name)
        assert torch.equal(model(x), outputs[name])
        assert_same_bits(bits(model), weights[name])


@pytest.mark.parametrize("door", ["apply", "load"])
def test_what_one_adapter_trains_in_part_and_another_in_full_comes_back(tmp_path, door):
    """The first is active, its entries in the weight, when the second one comes."""
    fields = {"density": 0.1, "target_modules": ["first"], "modules_to_save": ["third"]}
    sprand.save(trained(sprand.apply(built(MLP), **fields)), tmp_path)
    model = built(MLP)
    base = bits(model)
    sprand.apply(model, name="part", density=0.5, target_modules=["third"])
    trained(model)
    part = bits(model)
    if door == "load":
        sprand.load(model, tmp_path, name="full")
    else:
        sprand.apply(model, name="full", **fields)
        trained(model)
    with sprand.disabled(model):
        assert_same_bits(bits(model), base)
    sprand.switch(model, "part")
    assert_same_bits(bits(model), part)
    sprand.unmerge(model)
    assert_same_bits(bits(model), base)


def test_an_optimizer_survives_switching(tmp_path):
    x, y = points_and_labels()
    model = trained(sprand.apply(built(MLP), density=0.2, seed=1))
    sprand.save(model, tmp_path)
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    sprand.load(model, tmp_path, name="other")
    sprand.switch(model, "default")
    before = [p.clone() for p in sprand.parameters(model)]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(sprand.parameters(model), before, strict=True))


def test_weighted_sum_of_adapters(tmp_path):
    base = built(MLP)
    deltas = {}
    for seed, name in enumerate("ab"):
        model = sprand.apply(copy.deepcopy(base), density=0.4, seed=seed)
        for p in sprand.parameters(model):
            p.data.normal_()
        sprand.write(model)
        deltas[name] = model.second.weight.double() - base.second.weight.double()
        dense = torch.zeros(24 * 24, dtype=torch.float64)
        dense[model.second.sprand_indices.long()] = model.second.sprand_delta.detach().double()
        deltas[name] = dense.view(24, 24)
        sprand.save(model, tmp_path / name)
    model = copy.deepcopy(base)
    for name in "ab":
        sprand.load(model, tmp_path / name, name=name)
    sprand.switch(model, {"a": 0.5, "b": -2.0})
    expected = base.second.weight.double() + 0.5 * deltas["a"] - 2.0 * deltas["b"]
    torch.testing.assert_close(model.second.weight.double(), expected, rtol=2**-22, atol=2**-22)
    sprand.save(model, tmp_path / "sum")
    sprand.switch(model, None)
    assert torch.equal(model.second.weight, base.second.weight)
    fresh = sprand.load(copy.deepcopy(base), tmp_path / "sum")
    sprand.switch(model, {"a": 0.5, "b": -2.0})
    assert torch.equal(fresh.second.weight, model.second.weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_train_on_their_own(copied):
    model = trained(sprand.apply(built(EveryLayer), density=0.2, **EVERY_TARGET))
    x, _y = tokens_and_labels()
    out = model(x)
    other = copied(model)
    assert torch.equal(other(x), out)
    trained(other)
    assert not torch.equal(other(x), out)
    assert torch.equal(model(x), out)
    assert other.linear.sprand_delta is not model.linear.sprand_delta


def test_moving_between_dtypes_keeps_deltas_in_float32():
    model = trained(sprand.apply(built(MLP), density=0.3), lr=1e-4)
    deltas = [p.detach().clone() for p in sprand.parameters(model)]
    model.to(torch.bfloat16)
    assert [p.dtype for p in sprand.parameters(model)] == [torch.float32] * 3
    assert all(torch.equal(p, d) for p, d in zip(sprand.parameters(model), deltas, strict=True))
    assert model.second.sprand_base.dtype == torch.bfloat16
    x, _ = points_and_labels(dtype=torch.bfloat16)
    base = built(MLP).to(torch.bfloat16)
    with sprand.disabled(model):
        assert torch.equal(model(x), base(x))


def test_deltas_cast_by_others_still_train():
    """TRL casts every trained parameter to bfloat16 on some paths."""
    x, y = points_and_labels()
    model = sprand.apply(built(MLP), density=0.3)
    for p in sprand.parameters(model):
        p.data = p.data.to(torch.bfloat16)
    first = F.cross_entropy(model(x), y).item()
    trained(model, steps=20)
    assert F.cross_entropy(model(x), y).item() < 0.9 * first


def test_meta_device_counts_and_materialises():
    with torch.device("meta"):
        model = MLP()
    sprand.apply(model, density=0.1, seed=2)
    real = sprand.apply(built(MLP), density=0.1, seed=2)
    assert [p.shape for p in sprand.parameters(model)] == [p.shape for p in sprand.parameters(real)]
    model.to_empty(device="cpu")
    assert torch.equal(model.second.sprand_indices, real.second.sprand_indices)
    model.load_state_dict(built(MLP).state_dict(), strict=False)
    x, _ = points_and_labels()
    assert torch.equal(model(x), real(x))


GIVEN = {"second.weight": torch.tensor([500, 3, 77]), "third.bias": torch.tensor([True, False, False, True])}


def filled(model):
    """The model off the meta device, with the values of a real one."""
    model.to_empty(device="cpu")
    model.load_state_dict(built(MLP).state_dict(), strict=False)
    return model


@pytest.mark.parametrize("moved", ["made there", "sent there", "sent there twice"])
def test_given_entries_come_back_from_the_meta_device(moved):
    real = sprand.apply(built(MLP), strategy=GIVEN)
    with torch.device("meta" if moved == "made there" else "cpu"):
        model = MLP()
    sprand.apply(model, strategy=GIVEN)
    for _ in range({"made there": 1, "sent there": 1, "sent there twice": 2}[moved]):
        model.to("meta")
        assert model.second.sprand_indices.is_meta
        filled(model)
    assert torch.equal(model.second.sprand_indices, torch.tensor([3, 77, 500]))
    assert torch.equal(model.third.sprand_indices_bias, torch.tensor([0, 3]))
    x, y = points_and_labels()
    for trained in (model, real):
        F.cross_entropy(trained(x), y).backward()
        sprand.SparseAdamW(trained, lr=1e-2).step()
    assert torch.equal(model(x), real(x))
    assert_same_bits(bits(sprand.unmerge(model)), bits(built(MLP)))


def test_a_checkpoint_is_not_loaded_into_entries_on_the_meta_device():
    with torch.device("meta"):
        model = sprand.apply(MLP(), strategy=GIVEN)
    with pytest.raises(RuntimeError, match=r"second.weight is on the meta device.*model.to_empty\(device=...\) first"):
        model.load_state_dict(built(MLP).state_dict(), strict=False, assign=True)
    assert torch.equal(filled(model).second.sprand_indices, torch.tensor([3, 77, 500]))


def test_adapters_set_aside_come_back_from_the_meta_device():
    with torch.device("meta"):
        model = MLP()
    real = built(MLP)
    for trained in (model, real):
        sprand.apply(trained, name="given", strategy=GIVEN)
        sprand.apply(trained, name="drawn", density=0.1, seed=3)
        sprand.apply(trained, name="last", density=0.2, seed=4)
    filled(model)
    for name in ("given", "drawn", "last"):
        one, other = (sprand.switch(trained, name)._sprand.current for trained in (model, real))
        assert_same_bits(one.indices, other.indices)
        assert_same_bits({key: delta.data for key, delta in one.deltas.items()}, {key: d.data for key, d in other.deltas.items()})


def test_entries_that_nothing_knows_are_refused():
    layer = nn.Linear(4, 4, device="meta")
    with pytest.raises(ValueError, match="its indices are on the meta device, where they have no values"):
        sprand.layers.attached.attach(layer, "weight", sprand.layers.units.Pattern(torch.arange(3, device="meta")))
    assert type(layer) is nn.Linear and layer.weight.requires_grad


def test_tied_weights_stay_tied():
    model = built(Tied)
    sprand.apply(model, density=0.5, target_modules=["embed", "mix"])
    tokens = torch.arange(12)
    optimizer = sprand.SparseAdamW(model, lr=1e-1)
    F.cross_entropy(model(tokens), tokens).backward()
    optimizer.step()
    assert model.out.weight is model.embed.weight
    sprand.merge(model)
    assert model.out.weight is model.embed.weight


def test_summary_and_the_line_people_grep_for(capsys):
    model = sprand.apply(built(MLP), density=0.1, modules_to_save=["third"])
    sprand.print_trainable_parameters(model)
    total = sum(p.numel() for p in built(MLP).parameters())
    count = round(0.1 * (16 * 24 + 24 * 24)) + 24 * 4 + 4
    assert (
        capsys.readouterr().out
        == f"trainable params: {count:,} || all params: {total:,} || trainable%: {100 * count / total:.4f}\n"
    )
    table = sprand.summary(model)
    assert "second.weight" in table
    assert "24x24" in table
    assert "in full" in table
