"""Entries apart from those of other tasks: chosen exactly, evenly and alike everywhere; adapters side by side; the commands."""

from __future__ import annotations

import pytest
import torch

import sprand
from checkpoints import changed, redrawn
from models import EVERY_TARGET, MLP, EveryLayer, Tied, assert_same_bits, bits, built, points_and_labels, tokens_and_labels
from sprand.adapters.file import AdapterFile
from sprand.cli.main import run
from sprand.selection import pattern
from tiny_models import save_bert, save_rows


def taken(numel, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(numel, generator=generator) < share).nonzero().flatten().int()


def apart(one, two):
    """Whether two choices have no entry in common; they have weights in common."""
    assert set(one) & set(two)
    return not any(torch.isin(two[name], one[name]).any() for name in set(one) & set(two))


@pytest.mark.parametrize("strategy", pattern.RANDOM_STRATEGIES)
def test_every_free_position_is_drawn_as_often(strategy):
    avoided, draws, nnz = taken(24 * 16, 0.3), 1500, 40
    counts = torch.zeros(24 * 16)
    for seed in range(draws):
        indices = pattern.draw_free(strategy, "w", (24, 16), nnz, seed, avoided)
        assert indices.dtype == torch.int32 and indices.numel() == nnz
        pattern.check_indices("w", indices, 24 * 16)
        counts[indices.long()] += 1
    free = torch.ones(24 * 16, dtype=torch.bool)
    free[avoided.long()] = False
    assert counts[~free].sum() == 0
    share = nnz / int(free.sum())
    scores = (counts[free] - draws * share) / (draws * share * (1 - share)) ** 0.5
    assert scores.abs().max() < 4.5 and float(scores.square().mean()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_a_draw_fills_what_is_free(share):
    shape, avoided = (16, 24), taken(16 * 24, share)
    free = (~torch.isin(torch.arange(16 * 24), avoided.long())).nonzero().flatten()
    found = pattern.draw_free("random", "w", shape, free.numel(), 0, avoided)
    assert torch.equal(found.long(), free)
    with pytest.raises(ValueError, match=f"{free.numel() + 1:,} entries of w were asked for, but {free.numel():,} are free"):
        pattern.draw_free("random", "w", shape, free.numel() + 1, 0, avoided)
    half = pattern.draw_free("random", "w", shape, free.numel() // 2, 0, avoided)
    assert half.numel() == free.numel() // 2 and torch.isin(half.long(), free).all()


def test_tasks_side_by_side_have_no_entry_in_common():
    model, base = built(MLP), bits(built(MLP))
    weights = {}
    for number, name in enumerate("abc"):
        sprand.apply(model, name=name, density=0.2, seed=0, disjoint=True)
        assert_same_bits(bits(model), base)
        changed(model, number)
        weights[name] = bits(model)
    found = {name: adapter.indices for name, adapter in model._sprand.adapters.items()}
    assert apart(found["a"], found["b"]) and apart(found["a"], found["c"]) and apart(found["b"], found["c"])
    assert {name: sum(i.numel() for i in one.values()) for name, one in found.items()} == {"a": 211, "b": 211, "c": 211}
    sprand.switch(model, dict.fromkeys("abc", 1.0))
    sprand.switch(model, dict.fromkeys("ab", 1.0))
    both = bits(model)
    for name in both:
        assert torch.equal(both[name] != base[name], (weights["a"][name] != base[name]) | (weights["b"][name] != base[name]))
    sprand.switch(model, {"b": 1.0})
    assert_same_bits(bits(model), weights["b"])
    assert_same_bits(bits(sprand.unmerge(model)), base)


def test_saved_and_read_they_are_the_same_entries(tmp_path):
    model = sprand.apply(built(MLP), density=0.2, name="a")
    sprand.save(changed(model), tmp_path / "a")
    sprand.apply(model, density=0.2, name="b", disjoint=True)
    sprand.save(changed(model), tmp_path / "b")
    mask = sprand.select(built(MLP), density=0.2, disjoint=tmp_path / "a")
    others = [tmp_path / "a", mask, {"first.weight": torch.tensor([5, 3])}]
    for name, indices in model._sprand.adapters["b"].indices.items():
        assert torch.equal(mask[name], indices)
    adapter = AdapterFile.read(tmp_path / "b")
    assert adapter.config.strategy == "given"
    assert adapter.selection["disjoint"][0]["name"] == "a" and adapter.selection["disjoint"][0]["nnz"] == 211
    assert sprand.SparseConfig.from_json(adapter.config.to_json()).to_dict() == adapter.description["config"]
    fresh = sprand.load(built(MLP), tmp_path / "b")
    assert_same_bits(bits(fresh), bits(model))
    third = sprand.select(built(MLP), density=0.2, disjoint=others)
    assert apart(mask, third) and apart(model._sprand.adapters["a"].indices, third)
    assert not torch.isin(third["first.weight"], torch.tensor([3, 5])).any()
    assert [entry["name"] for entry in third.selection["disjoint"]] == ["a", "mask", "mask"]


@pytest.mark.parametrize("fields", [{"scope": "local"}, {"scope": "global"}, {"preserve_zeros": True}], ids=str)
def test_scores_are_ranked_over_what_is_free(fields):
    model = built(MLP)
    model.second.weight.data.view(-1)[::3] = 0
    first = sprand.select(model, strategy="magnitude", density=0.2, **fields)
    second = sprand.select(model, strategy="magnitude", density=0.2, disjoint=first, **fields)
    assert first.nnz == second.nnz and apart(first, second)
    both = sprand.select(model, strategy="magnitude", density=0.4, **fields)
    for name, indices in both.items():
        assert torch.equal(torch.cat([first[name], second[name]]).sort().values, indices)


def test_gradients_are_those_of_the_base():
    x, y = points_and_labels()
    fields = {"strategy": "gradient", "density": 0.1, "data": [(x, y)], "loss_fn": loss}
    model = changed(sprand.apply(built(MLP), **fields))
    avoided = sprand.adapters.state.mask_of(model)
    sprand.apply(model, name="second", disjoint=True, **fields)
    expected = sprand.select(built(MLP), disjoint=avoided, **fields)
    assert all(torch.equal(indices, expected[name]) for name, indices in model._sprand.adapters["second"].indices.items())


def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_random_draws_of_a_pruned_model_avoid_zeros_and_others():
    model = built(MLP)
    model.second.weight.data.view(-1)[::2] = 0
    first = sprand.select(model, density=0.5, preserve_zeros=True)
    second = sprand.select(model, density=0.5, preserve_zeros=True, disjoint=first)
    together = torch.cat([first["second.weight"], second["second.weight"]]).sort().values
    assert torch.equal(together.long(), torch.arange(1, 24 * 24, 2))
    with pytest.raises(ValueError, match="second.weight were asked for"):
        sprand.select(model, density=0.6, preserve_zeros=True, disjoint=first, target_modules=["second"])


def test_entries_that_a_redrawn_mask_left_behind_are_avoided(tmp_path):
    model = redrawn(changed(sprand.apply(built(MLP), density=0.3)))
    sprand.save(model, tmp_path)
    adapter = model._sprand.adapters["default"]
    frozen = {name: frozen.indices for name, frozen in adapter.frozen.items()}
    assert any(indices.numel() for indices in frozen.values())
    for mask in (sprand.select(built(MLP), density=0.3, disjoint=tmp_path), sprand.select(model, density=0.3, disjoint=True)):
        assert apart(frozen, mask) and apart(adapter.indices, mask)


def test_tied_weights_are_one_under_every_name():
    mask = sprand.select(built(Tied), density=0.5, disjoint={"out.weight": torch.arange(80)}, target_modules=["embed"])
    assert torch.equal(mask["embed.weight"].long(), torch.arange(80, 160))


def test_every_task_keeps_its_head_and_its_optimizer(tmp_path):
    x, y = tokens_and_labels()
    model = built(EveryLayer)
    heads, optimizers = {}, {}
    for name in "ab":
        sprand.apply(model, name=name, density=0.1, disjoint=True, **EVERY_TARGET)
        assert torch.equal(model.head.weight, built(EveryLayer).head.weight)
        optimizers[name] = sprand.SparseAdamW(model, lr=1e-2)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        sprand.write(model)
        heads[name] = bits(model)
    sprand.switch(model, "a")
    assert_same_bits(bits(model), heads["a"])
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizers["a"].step()
    assert not torch.equal(model.head.weight, heads["a"]["head.weight"])
    sprand.switch(model, "b")
    assert_same_bits(bits(model), heads["b"])
    assert_same_bits(bits(sprand.unmerge(model)), bits(built(EveryLayer)))


def test_what_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    model = changed(sprand.apply(built(MLP), density=0.6, name="a"))
    before = bits(model)
    wrong = {"third.weight": torch.arange(1000)}
    other = sprand.select(built(MLP, width=12), density=0.1)
    for options, match in (
        ({"density": 0.5, "disjoint": True}, "of first.weight were asked for, but 154 are free"),
        ({"density": 0.5, "disjoint": True, "strategy": "magnitude"}, "are free; lower the density or budget"),
        ({"density": 0.5, "disjoint": True, "strategy": "magnitude", "scope": "global"}, "all targets together"),
        ({"density": 0.1, "disjoint": wrong}, "disjoint: third.weight: index"),
        ({"density": 0.1, "disjoint": {"fourth.weight": torch.arange(3)}}, "this one has no parameter 'fourth.weight'"),
        ({"density": 0.1, "disjoint": other}, r"first.weight is \[24, 16\] here and \[12, 16\] there"),
        ({"density": 0.1, "disjoint": [3]}, "disjoint: expected True, folders of adapters, masks or indices by name, got int"),
        (
            {"strategy": sprand.adapters.state.mask_of(model), "disjoint": True},
            "given entries of first.weight are among those",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            sprand.apply(model, name="b", **options)
        assert_same_bits(bits(model), before)
        assert set(model._sprand.adapters) == {"a"} and model._sprand.active == "a"
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        sprand.apply(model, name="b", density=0.1, disjoint=tmp_path / "nothing")
    with pytest.raises(ValueError, match="already trains entries, as adapter 'a'; give another name"):
        sprand.apply(model, name="a", density=0.1)
    assert sum(p.numel() for p in sprand.parameters(model)) == round(0.6 * (16 * 24 + 24 * 24 + 24 * 4))


def test_the_commands_leave_out_the_entries_of_adapters(tmp_path, capsys):
    model, rows = str(save_bert(tmp_path / "model")), str(save_rows(tmp_path / "rows.tsv"))
    options = ["--model", model, "--train", rows, "--max-steps", "2", "--batch-size", "8", "--density", "0.1"]
    assert run(["finetune", *options, "--out", str(tmp_path / "a")]) == 0
    a, b = tmp_path / "a" / "adapter", tmp_path / "b" / "adapter"
    assert run(["finetune", *options, "--out", str(tmp_path / "b"), "--disjoint", str(a), "--verify"]) == 0
    assert run(["finetune", *options, "--out", str(tmp_path / "b"), "--disjoint", str(a), "--resume"]) == 0
    assert run(["finetune", *options, "--out", str(tmp_path / "b"), "--resume"]) == 2
    assert "is of another run" in capsys.readouterr().err
    selected = ["select", model, "--task", "classification", "--density", "0.1", "--strategy", "magnitude"]
    assert run([*selected, "--out", str(tmp_path / "c"), "--disjoint", f"{a},{b}"]) == 0
    mask = sprand.Mask.load(tmp_path / "c")
    assert [entry["name"] for entry in mask.selection["disjoint"]] == ["a/adapter", "b/adapter"]
    out = ["--base", model, "-o", str(tmp_path / "both"), "--drop-heads"]
    assert run(["combine", str(a), str(b), *out]) == 0
    assert "1 x b/adapter: no entry in common with others" in capsys.readouterr().out
    together = AdapterFile.read(tmp_path / "both")
    assert apart({name: together.entries(name)[0] for name in mask}, mask)
    assert run(["finetune", *options, "--out", str(tmp_path / "d"), "--disjoint", str(tmp_path / "none")]) == 2
    assert "no adapter at" in capsys.readouterr().err
