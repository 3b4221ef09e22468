"""Which parameters `apply` targets, how many of their entries train, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sprand
from models import MLP, Tied, assert_same_bits, bits, built
from sprand.layers.sites import sites_of


@pytest.mark.parametrize("density", [0.0007, 0.01, 0.37, 1.0])
def test_count_is_exact(density):
    model = sprand.apply(built(MLP), density=density)
    total = 16 * 24 + 24 * 24 + 24 * 4
    assert sum(p.numel() for p in sprand.parameters(model)) == round(density * total)


@pytest.mark.parametrize("budget", [1, 2, 100, 1056])
def test_budget_is_exact(budget):
    model = sprand.apply(built(MLP), budget=budget)
    assert sum(p.numel() for p in sprand.parameters(model)) == budget


def test_budget_as_a_fraction_counts_all_parameters():
    model = built(MLP)
    everything = sum(p.numel() for p in model.parameters())
    sprand.apply(model, budget=0.05, target_modules=["second"])
    assert sum(p.numel() for p in sprand.parameters(model)) == round(0.05 * everything)


def test_a_weight_without_entries_costs_nothing():
    model = sprand.apply(built(MLP), budget=1)
    assert sum(isinstance(m, sprand.SparseModule) for m in model.modules()) == 1


def test_targets():
    model = built(MLP)
    sprand.apply(model, target_modules=r"(first|third)", density=0.5)
    assert [site.name for site in sites_of(model)] == ["first.weight", "third.weight"]
    model = sprand.apply(built(MLP), target_modules="all-linear", exclude_modules=["second"], density=0.5)
    assert [site.name for site in sites_of(model)] == ["first.weight", "third.weight"]
    model = sprand.apply(built(MLP), target_modules=None, target_parameters=["bias"], density=0.5)
    assert [site.name for site in sites_of(model)] == ["first.bias", "third.bias"]


def test_given_masks_and_indices():
    mask = torch.zeros(24, 24, dtype=torch.bool)
    mask[3, 5] = mask[0, 0] = True
    model = sprand.apply(built(MLP), strategy={"second.weight": mask, "first.weight": torch.tensor([9, 2, 40])})
    assert model.second.sprand_indices.tolist() == [0, 3 * 24 + 5]
    assert model.first.sprand_indices.tolist() == [2, 9, 40]


def test_same_seed_same_positions_and_names_make_them_independent():
    one, two = (sprand.apply(built(MLP, seed=s), density=0.1, seed=7) for s in (0, 1))
    other = sprand.apply(built(MLP), density=0.1, seed=8)
    assert torch.equal(one.second.sprand_indices, two.second.sprand_indices)
    assert not torch.equal(one.second.sprand_indices, other.second.sprand_indices)
    model = sprand.apply(nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}), budget=800)
    assert model["a"].sprand_indices.shape == model["b"].sprand_indices.shape
    assert not torch.equal(model["a"].sprand_indices, model["b"].sprand_indices)


def test_a_tied_head_trains_in_full_under_every_name(tmp_path):
    tokens = torch.arange(20).reshape(4, 5)
    for name in ("out", "embed"):
        model = sprand.apply(built(Tied), density=0.2, modules_to_save=[name])
        assert [site.name for site in sites_of(model)] == ["mix.weight"]
        assert model.embed.weight.requires_grad and model.out.weight is model.embed.weight
        optimizer = torch.optim.SGD(sprand.parameters(model), lr=0.1)
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        assert not torch.equal(model.out.weight, built(Tied).out.weight)
        sprand.save(model, tmp_path / name)
        loaded = sprand.load(built(Tied), tmp_path / name)
        assert torch.equal(loaded(tokens), model(tokens))
        assert_same_bits(bits(sprand.unmerge(loaded)), bits(built(Tied)))


BAD = {
    "a percentage": ({"density": "1%"}, r"density: expected a fraction in \(0, 1\], got '1%'; write 0.01 for 1 %"),
    "nothing matches": ({"target_modules": ["q_prj"]}, r"'q_prj' matches no module.*closest.*all-linear"),
    "regex matches nothing": ({"target_modules": "nope.*"}, "matches no module.*all-linear"),
    "no such parameter": ({"target_parameters": ["secnd.weight"]}, "'secnd.weight' matches nothing.*second.weight"),
    "no such head": ({"modules_to_save": ["clasifier"]}, "'clasifier' matches nothing"),
    "density zero": ({"density": 0}, r"density: expected a fraction in \(0, 1\], got 0"),
    "density negative": ({"density": -0.1}, "density: expected"),
    "density above one": ({"density": 1.01}, "density: expected"),
    "density nan": ({"density": float("nan")}, "density: expected"),
    "density a word": ({"density": "1%"}, "density: expected"),
    "density so small": ({"density": 1e-9}, "rounds to no entry; raise it"),
    "both": ({"density": 0.1, "budget": 5}, "density or budget, not both"),
    "budget too large": ({"budget": 10**6}, "1,000,000 entries were asked for, but the targets hold 1,056"),
    "budget zero": ({"budget": 0}, "at least 1"),
    "strategy": ({"strategy": "lottery"}, "strategy: expected one of random, uniform"),
    "layout": ({"layout": "run3"}, "layout: expected one of unstructured, columns, got 'run3'"),
    "layout of a mask": (
        {"strategy": {"second.weight": torch.ones(24, 24, dtype=torch.bool)}, "layout": "columns"},
        "layout: a dict of masks or indices fixes the positions; leave out layout='columns'",
    ),
    "runs": ({"layout": "run8"}, r"layout: runs of adjacent entries \('run8'\) are drawn no more; give layout='columns'"),
    "scope": ({"scope": "global"}, "scope: expected 'local'"),
    "seed": ({"seed": 1.5}, "seed: expected an int"),
    "mask shape": (
        {"strategy": {"second.weight": torch.ones(3, 3, dtype=torch.bool)}},
        r"second.weight: expected a mask of shape \[24, 24\]",
    ),
    "index twice": ({"strategy": {"second.weight": torch.tensor([3, 3])}}, "index 3 .* appears twice"),
    "index out of range": ({"strategy": {"second.weight": torch.tensor([576])}}, "index 576 .* out of range"),
    "empty mask": ({"strategy": {"second.weight": torch.zeros(24, 24, dtype=torch.bool)}}, "chooses no entry at all"),
    "mask of nothing": ({"strategy": {"nope.weight": torch.tensor([3])}}, "no parameter 'nope.weight'"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD.keys())
def test_bad_configurations_are_refused_and_leave_the_model_alone(fields, message):
    model = built(MLP)
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        sprand.apply(model, **fields)
    assert not any(isinstance(m, sprand.SparseModule) for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert_same_bits(bits(model), before)


def test_misuse_is_refused():
    model = built(MLP)
    for call in (sprand.merge, sprand.unmerge, sprand.parameters, sprand.summary, lambda m: sprand.switch(m, "a")):
        with pytest.raises(ValueError, match="no trained entries"):
            call(model)
    sprand.apply(model)
    with pytest.raises(ValueError, match="already trains entries"):
        sprand.apply(model)
    with pytest.raises(ValueError, match="no adapter 'b'"):
        sprand.switch(model, "b")
    with pytest.raises(ValueError, match="at least one adapter"):
        sprand.switch(model, {})


def test_the_output_projection_of_an_attention_is_a_linear_layer_that_trains():
    """`torch.nn.MultiheadAttention` reads its weight and does not call it."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    sprand.apply(model, target_parameters=["in_proj_weight"], density=0.2)
    model(torch.randn(2, 5, 16)).square().sum().backward()
    names = dict(sprand.named_parameters(model))
    assert "self_attn.out_proj.sprand_delta" in names and len(names) == 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names.values())


PAPER_COUNTS = {
    "gemma-2b": (
        "GemmaConfig",
        {"vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
         "num_key_value_heads": 1, "head_dim": 256},
        25_061_724,
    ),
    "Qwen2.5-0.5B": (
        "Qwen2Config",
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2, "tie_word_embeddings": True},
        4_940_328,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "sizes", "expected"), PAPER_COUNTS.values(), ids=PAPER_COUNTS.keys())
def test_sparta_recipe_trains_as_many_weights_as_the_paper(config, sizes, expected):
    """arXiv 2502.15975: 1 % of the whole model, all of it in the value and output projections."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(getattr(transformers, config)(**sizes))
    sprand.apply(model, sprand.SparseConfig.sparta(0.99))
    deltas = {name: p for name, p in sprand.named_parameters(model) if name.endswith("sprand_delta")}
    assert sum(p.numel() for p in deltas.values()) == expected
    assert all(name.split(".")[-2] in ("v_proj", "o_proj") for name in deltas)
    assert model.score.weight.requires_grad


def test_config_survives_json():
    config = sprand.SparseConfig(density=0.02, target_modules=["q", "v"], exclude_modules="x.*", seed=4)
    assert sprand.SparseConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="unknown field alpha"):
        sprand.SparseConfig.from_json('{"alpha": 16}')


def test_what_could_be_meant_is_named_once():
    with pytest.raises(ValueError, match="the closest names are q_proj, 0.q_proj, or") as said:
        sprand.apply(nn.Sequential(nn.ModuleDict({"q_proj": nn.Linear(4, 4)})), target_modules=["q_prj"])
    assert str(said.value).count(" q_proj") == 1
    with pytest.raises(ValueError, match=r"it has no linear layer; name modules with a weight \(0\) in target_modules, or"):
        sprand.apply(nn.Sequential(nn.Conv1d(3, 4, 2)))


def test_an_option_of_lora_is_answered_in_its_terms():
    with pytest.raises(TypeError, match=r"no option is called 'r'; expected fields of SparseConfig, .*a rank of LoRA"):
        sprand.apply(nn.Linear(4, 4), r=16)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_an_embedding_with_options_trains_and_is_left_with_its_base(options):
    torch.manual_seed(0)
    layer, tokens = nn.Embedding(20, 8, **options), torch.arange(12).repeat(3)
    base = layer.weight.detach().clone()
    model = sprand.apply(nn.Sequential(layer), target_modules=["0"], density=0.5)
    optimizer = sprand.SparseAdamW(model, lr=0.1)
    with sprand.disabled(model):
        disabled = model(tokens)
    for _ in range(3):
        model(tokens).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model(tokens), disabled)
    with sprand.disabled(model):
        assert torch.equal(model(tokens), disabled)
    if "max_norm" in options:
        assert model(tokens).norm(dim=-1).max() <= 1.0 + 1e-6
    assert torch.equal(sprand.unmerge(model)[0].weight, base)
    torch.testing.assert_close(model(tokens), disabled)
