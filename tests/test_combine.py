"""What each way of combining gives, beside PEFT's own functions; what is refused; `sprand combine`."""

from __future__ import annotations

import json

import pytest
import torch

import sprand
from checkpoints import changed, plain, redrawn
from models import MLP, assert_same_bits, bits, built
from sprand.adapters.combining import Part, Rule, combined
from sprand.adapters.file import AdapterFile
from sprand.checkpoint.combine import combine, remove
from sprand.checkpoint.inspect import inspect
from sprand.cli.main import run

NUMEL = 400


def parts(count=3, seed=0, weights=(1.0, 0.3, -0.7)):
    """Adapters of one weight that overlap, with equal sizes, zeros and opposite changes among their deltas."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        indices = torch.randperm(NUMEL, generator=generator)[: 150 + 10 * number].sort().values.int()
        delta = torch.randn(indices.shape, generator=generator)
        delta[::7] = 0
        made.append(Part(number, weights[number], indices, delta))
    return made


def dense(whole):
    result = torch.zeros(NUMEL)
    result[whole.indices.long()] = whole.delta
    return result


def one(rule, own):
    return combined(rule, len(own), {"w": own})["w"]


@pytest.mark.parametrize("signs", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_that_of_peft(signs, density):
    utils = pytest.importorskip("peft.utils.merge_utils")
    own, generator = [], torch.Generator().manual_seed(1)
    indices = torch.arange(3, NUMEL, 2)
    for number, weight in enumerate((1.0, 0.3, -0.7)):
        own.append(Part(number, weight, indices, torch.randn(indices.shape, generator=generator)))
    expected = utils.ties([part.delta for part in own], torch.tensor([part.weight for part in own]), density, signs)
    assert torch.equal(one(Rule("ties", density, signs=signs), own).delta, expected)


def test_ties_of_adapters_that_overlap_in_part():
    utils = pytest.importorskip("peft.utils.merge_utils")
    own = parts()
    rows = torch.zeros(3, NUMEL)
    for row, part in zip(rows, own, strict=True):
        row[part.indices.long()] = utils.prune(part.delta, 0.5, "magnitude")
    votes = utils.calculate_majority_sign_mask(rows)
    expected = utils.disjoint_merge(rows * torch.tensor([part.weight for part in own])[:, None], votes)
    found = one(Rule("ties", 0.5), own)
    assert torch.equal(dense(found), expected)
    assert torch.equal(found.indices.long(), torch.cat([part.indices for part in own]).unique().long())


def test_sum_and_mean():
    own = parts()
    total = torch.zeros(NUMEL)
    mean = torch.zeros(NUMEL)
    for part in own:
        total[part.indices.long()] += part.delta * part.weight
        mean[part.indices.long()] += part.delta * (part.weight / 3)
    assert torch.equal(dense(one(Rule(), own)), total)
    assert torch.equal(dense(one(Rule("mean"), own)), mean)


def test_dare_keeps_a_share_and_is_right_in_the_mean():
    (part,) = parts(1)
    expected = torch.zeros(NUMEL)
    expected[part.indices.long()] = part.delta
    total, counts, draws = torch.zeros(NUMEL), [], 400
    for seed in range(draws):
        found = dense(one(Rule("dare", 0.25, seed), [part]))
        kept = found != 0
        assert torch.equal(found[kept], (expected / 0.25)[kept])
        total += found
        counts.append(int((one(Rule("dare", 0.25, seed), [Part(0, 1.0, part.indices, torch.ones(150))]).delta != 0).sum()))
    assert set(counts) == {37, 38}  # of 37.5
    error = (total / draws - expected)[expected != 0] / expected[expected != 0]
    assert error.abs().max() < 5 * (3 / draws) ** 0.5  # the standard deviation of kept / density is sqrt(1 / density - 1)


def test_dare_draws_by_seed_name_and_place_alone():
    part = parts(1)[0]
    ones = torch.ones(150)

    def drawn(seed=0, name="w", number=0, scale=1.0):
        rule, own = Rule("dare", 0.5, seed), Part(number, scale, part.indices, ones)
        return combined(rule, 2, {name: [own]})[name].delta != 0

    assert torch.equal(drawn(), drawn(scale=3.0))
    assert drawn().nonzero().flatten()[:8].tolist() == drawn().nonzero().flatten()[:8].tolist()
    for other in (drawn(seed=1), drawn(name="v"), drawn(number=1)):
        assert not torch.equal(drawn(), other)
        assert 20 < int((drawn() & other).sum()) < 55  # of 75 kept, as if drawn apart


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "svd"}, "method: expected one of sum, mean, ties, dare, got 'svd'"),
        ({"method": "ties"}, "density: expected a fraction"),
        ({"method": "sum", "density": 0.5}, "None for the others"),
        ({"method": "dare", "density": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"method": "dare", "density": 0.5, "seed": 0.5}, "seed: expected an int"),
        ({"method": "ties", "density": 0.5, "signs": "most"}, "signs: expected one of total, frequency"),
    ],
)
def test_rules_that_are_none(options, match):
    with pytest.raises(ValueError, match=match):
        Rule(**options)


def fields(seed, head):
    return {"density": 0.2, "seed": seed, "target_modules": ["first", "second"], "modules_to_save": ["third"] if head else None}


@pytest.fixture
def three(tmp_path):
    """A base, and adapters a, b (apart from a) and c (with a head)."""
    plain(tmp_path / "base", bits(built(MLP)))
    sprand.save(changed(sprand.apply(built(MLP), **fields(0, False)), 0), tmp_path / "a")
    sprand.save(changed(sprand.apply(built(MLP), **fields(1, False), disjoint=tmp_path / "a"), 1), tmp_path / "b")
    sprand.save(changed(sprand.apply(built(MLP), **fields(2, True)), 2), tmp_path / "c")
    return tmp_path


def test_heads_are_refused_or_left_out(three):
    pairs = [(three / "a", 1.0), (three / "c", 1.0)]
    with pytest.raises(ValueError, match=r"c trained whole modules \(third.bias, third.weight\), .* \(--drop-heads\)"):
        combine(pairs, three / "base", three / "out")
    assert not (three / "out").exists()
    said = combine(pairs, three / "base", three / "out", drop_heads=True)
    assert said.left_out == ("third.bias", "third.weight")
    model = built(MLP)
    for name in "ac":
        sprand.load(model, three / name, name=name)
    with pytest.raises(ValueError, match="drop_heads=True"):
        sprand.combine(model, {"a": 1.0, "c": 1.0})
    assert model._sprand.active == "c" and set(model._sprand.adapters) == {"a", "c"}
    sprand.combine(model, {"a": 1.0, "c": 1.0}, drop_heads=True)
    fresh = sprand.load(built(MLP), three / "out")
    assert_same_bits(bits(model), bits(fresh))
    assert torch.equal(fresh.third.weight, built(MLP).third.weight)


def test_a_combined_adapter_trains_on_and_is_told_of(three):
    model = built(MLP)
    for name in "ab":
        sprand.load(model, three / name, name=name)
    before = {name: delta.clone() for name, delta in model._sprand.adapters["a"].deltas.items()}
    sprand.combine(model, {"a": 1.0, "b": 0.5}, name="both")
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
    sprand.save(model, three / "both")
    assert sprand.adapters.state.mask_of(model).selection["strategy"] == "combine"
    assert all(torch.equal(delta, before[name]) for name, delta in model._sprand.adapters["a"].deltas.items())
    assert inspect(three / "both", three / "base").chosen == "sum of 1 x a, 0.5 x b"
    with pytest.raises(ValueError, match=r"both was trained further since .*/a was combined into it"):
        remove(three / "both", three / "a", three / "base", three / "out")


def test_what_cannot_be_combined_or_taken_out(three):
    a, b, c, base, out = (three / name for name in ("a", "b", "c", "base", "out"))
    sprand.save(redrawn(changed(sprand.apply(built(MLP), density=0.1))), three / "moved")
    with pytest.raises(ValueError, match="has frozen entries"):
        combine([(a, 1.0), (three / "moved", 1.0)], base, out)
    with pytest.raises(ValueError, match="weights: expected finite numbers, got nan"):
        combine([(a, float("nan"))], base, out)
    with pytest.raises(ValueError, match="is one of the adapters that are read"):
        combine([(a, 1.0), (b, 1.0)], base, a)
    other = bits(built(MLP))
    other["second.weight"][0] += 1
    with pytest.raises(ValueError, match="trained on another base"):
        combine([(a, 1.0), (b, 1.0)], plain(three / "other", other), out)
    combine([(a, 1.0), (c, 1.0)], base, three / "ac", drop_heads=True)
    with pytest.raises(ValueError, match=r"entries of .*/a are in other parts of .*/ac as well"):
        remove(three / "ac", a, base, out)
    combine([(a, 1.0), (b, 1.0)], base, three / "mean", method="mean")
    with pytest.raises(ValueError, match="was made by mean; only an adapter that sprand combine --method sum wrote"):
        remove(three / "mean", a, base, out)
    with pytest.raises(ValueError, match="was made alone"):
        remove(a, b, base, out)
    combine([(a, 1.0), (b, 1.0)], base, three / "ab")
    with pytest.raises(ValueError, match=r"c is not in .*ab, which was made of a, b"):
        remove(three / "ab", c, base, out)
    remove(three / "ab", a, base, three / "only")
    with pytest.raises(ValueError, match="nothing would be left"):
        remove(three / "only", b, base, out)
    assert not out.exists()


def test_adapters_of_a_model_that_cannot_be_combined(three):
    model = built(MLP)
    for name in "ab":
        sprand.load(model, three / name, name=name)
    for weights, name, match in (
        ({"a": 1.0, "x": 1.0}, "new", "no adapter 'x' is loaded; there are a, b"),
        ({"a": 1.0}, "b", "'b' is loaded already"),
        ({}, "new", "of at least one adapter"),
        ({"a": float("inf")}, "new", "expected finite weights"),
    ):
        with pytest.raises(ValueError, match=match):
            sprand.combine(model, weights, name=name)
    assert set(model._sprand.adapters) == {"a", "b"} and model._sprand.active == "b"


def test_the_command(three, capsys):
    a, b, base = (str(three / name) for name in ("a", "b", "base"))
    assert run(["combine", a, b, "--base", base, "-o", str(three / "ab"), "--weights", "1,0.5"]) == 0
    said = capsys.readouterr().out
    assert "0.5 x b: no entry in common with others" in said and "entries written" in said
    config = json.loads((three / "ab" / "adapter_config.json").read_text())
    assert [source["weight"] for source in config["selection"]["sources"]] == [1.0, 0.5]
    assert (
        run(["combine", a, b, "--base", base, "-o", str(three / "d"), "--method", "dare", "--density", "0.5", "--seed", "4"]) == 0
    )
    assert json.loads((three / "d" / "adapter_config.json").read_text())["selection"]["seed"] == 4
    assert run(["combine", str(three / "ab"), "--base", base, "--remove", b, "-o", str(three / "left")]) == 0
    left, own = AdapterFile.read(three / "left"), AdapterFile.read(a)
    assert all(torch.equal(left.entries(name)[1], own.entries(name)[1]) for name in own.targets)
    assert run(["inspect", str(three / "ab"), "--base", base]) == 0
    assert "sum of 1 x a, 0.5 x b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--weights", "1"], "--weights: expected one for each of 2 adapters, got 1"),
        (["--method", "ties"], "density: expected a fraction"),
        (["--seed", "1"], "--seed: only --method dare draws at random"),
        (["--remove", "a"], "--remove: expected one combined adapter and no other option of combining; got 2"),
    ],
)
def test_the_command_refuses(three, capsys, more, match):
    a, b, base = (str(three / name) for name in ("a", "b", "base"))
    assert run(["combine", a, b, "--base", base, "-o", str(three / "out"), *more]) == 2
    assert match in capsys.readouterr().err
    assert not (three / "out").exists()
