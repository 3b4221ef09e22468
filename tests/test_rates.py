"""`suggest_lr`: what it follows, what a model gives it, what it cannot read, and that `sprand finetune` takes it."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import ranks
import sprand
from ranks import HALVES, adamw, made, train
from sprand.training import magnitude, rates
from tiny_models import save_bert, save_rows

STRATEGIES = (None, "random", "gradient", "fisher", "snip")


def weights(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))


def rms_of(*tensors: torch.Tensor) -> float:
    values = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    return values.square().mean().sqrt().item()


def linear_rms(model: nn.Module) -> float:
    return rms_of(*(module.weight for module in model.modules() if isinstance(module, nn.Linear)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_rises_as_density_falls_and_in_proportion_to_the_weights(strategy):
    densities = (3e-4, 1e-3, 3e-3, 1e-2, 5e-2, 0.3, 1.0)
    found = [rates.rate(0.1, density, strategy) for density in densities]
    if strategy in (None, "random", "snip"):  # the shift of the others fades
        assert found == sorted(found, reverse=True) and len(set(found)) == len(found)
    small = [rates.rate(0.025, density, strategy) for density in densities]
    assert small == pytest.approx([rate / 4 for rate in found], rel=1e-12)
    assert rates.rate(0.1, 1e-9, strategy) == found[0]


def test_narrow_models_get_a_higher_rate():
    found = [sprand.suggest_lr(density=0.01, rms=0.1, width=width) for width in (64, 128, 256, 384)]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)
    assert sprand.suggest_lr(density=0.01, rms=0.1, width=16) == found[0]
    assert sprand.suggest_lr(density=0.01, rms=0.1, width=4096) == sprand.suggest_lr(density=0.01, rms=0.1) == found[-1]


def test_gradient_masks_get_a_lower_rate_until_all_entries_train():
    for density in (1e-3, 1e-2, 5e-2):
        plain = rates.rate(0.1, density)
        for strategy in ("gradient", "fisher"):
            assert rates.rate(0.1, density, strategy) < plain / 2
            assert rates.rate(0.1, 1.0, strategy) == rates.rate(0.1, 1.0)


def test_gradient_masks_of_large_weights_get_no_more_until_all_entries_train():
    for strategy in ("gradient", "fisher"):
        assert rates.rate(0.4, 0.01, strategy) == pytest.approx(rates.rate(0.1, 0.01, strategy), rel=1e-12)
        assert rates.rate(0.4, 1.0, strategy) == rates.rate(0.4, 1.0)
    assert rates.rate(0.4, 0.01) == pytest.approx(4 * rates.rate(0.1, 0.01), rel=1e-12)


def test_a_model_gives_density_size_of_weights_and_strategy():
    base = weights()
    rms = linear_rms(base)
    model = sprand.apply(copy.deepcopy(base), density=0.02)
    assert sprand.suggest_lr(model) == sprand.suggest_lr(density=0.02, rms=rms, width=64)
    data, loss = [torch.randn(8, 128)], lambda m, x: m(x).square().mean()
    model = sprand.apply(copy.deepcopy(base), density=0.02, strategy="gradient", data=data, loss_fn=loss)
    assert sprand.suggest_lr(model) == sprand.suggest_lr(density=0.02, rms=rms, width=64, strategy="gradient")
    given = sprand.suggest_lr(model, strategy="random", rms=0.5, density=0.1, width=200)
    assert given == sprand.suggest_lr(density=0.1, rms=0.5, width=200)


@pytest.mark.parametrize("strategy", ["random", "gradient"])
def test_whole_columns_get_the_rate_of_single_entries(strategy):
    base = weights()
    data, loss = [torch.randn(8, 128)], lambda m, x: m(x).square().mean()
    fields = {"density": 0.05, "strategy": strategy, "layout": "columns", "data": data, "loss_fn": loss}
    mask = sprand.select(copy.deepcopy(base), **fields)
    expected = sprand.suggest_lr(density=mask.nnz / (2 * 64 * 128), rms=linear_rms(base), strategy=strategy, width=64)
    assert sprand.suggest_lr(sprand.apply(copy.deepcopy(base), **fields)) == expected


@pytest.mark.parametrize("factor", [2.0**-6, 2.0, 10.0])
def test_larger_weights_get_a_larger_rate_in_proportion(factor):
    model = weights()
    before = sprand.suggest_lr(sprand.apply(copy.deepcopy(model), density=0.02))
    for module in model[::2]:
        module.weight.data.mul_(factor)
    assert sprand.suggest_lr(sprand.apply(model, density=0.02)) == pytest.approx(factor * before, rel=0.05)  # of two digits


def test_embeddings_biases_and_norms_do_not_count_beside_linear_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(512, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Conv1d(64, 32, 3))
    rms = rms_of(model[2].weight, model[3].weight)
    assert rms < 0.2 < rms_of(model[0].weight)
    every = ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight"]
    applied = sprand.apply(copy.deepcopy(model), density=0.1, target_modules=None, target_parameters=every)
    assert sprand.suggest_lr(applied, density=0.1) == sprand.suggest_lr(density=0.1, rms=rms, width=64)
    norm = sprand.apply(copy.deepcopy(model), density=0.5, target_modules=None, target_parameters=["1.weight"])
    assert sprand.suggest_lr(norm) == sprand.suggest_lr(density=0.5, rms=1.0)


def test_a_tied_weight_is_the_embedding_that_it_is():
    model = nn.ModuleDict({"embed": nn.Embedding(32, 16), "body": nn.Linear(16, 16), "head": nn.Linear(16, 32, bias=False)})
    model["head"].weight = model["embed"].weight
    applied = sprand.apply(model, density=0.25, target_modules=["head", "body"])
    assert sprand.suggest_lr(applied) == sprand.suggest_lr(density=0.25, rms=rms_of(model["body"].weight), width=16)


def learned(model: nn.Module) -> nn.Module:
    """The model with large deltas in its weights."""
    with torch.no_grad():
        for delta in sprand.parameters(model):
            delta.fill_(100.0)
    sprand.write(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_the_entries_have_learned_changes_nothing(dtype, monkeypatch):
    monkeypatch.setattr(magnitude, "CHUNK", 1000)
    model = sprand.apply(weights().to(dtype), density=0.02)
    base = linear_rms(model)
    before = magnitude.root_mean_square(sprand.layers.sites.sites_of(model), {})
    assert before == pytest.approx(base, rel=1e-5)
    after = learned(model)
    assert linear_rms(after) > 10 * base
    assert magnitude.root_mean_square(sprand.layers.sites.sites_of(after), {}) == before


def test_what_an_earlier_mask_left_changes_nothing():
    model = sprand.apply(weights(), density=0.02)
    before = sprand.suggest_lr(model)
    optimizer = sprand.SparseAdamW(model, lr=1.0)
    moving = sprand.DynamicMask(model, optimizer, every=2, grow="random")
    for _ in range(9):
        model(torch.randn(4, 128)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moving.step()
    assert linear_rms(model) > 2 * rms_of(*(module.weight for module in weights()[::2]))
    assert sprand.suggest_lr(model) == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "expected a model of sprand.apply, or density and rms"),
        ({"density": 0.1}, "density and rms"),
        ({"rms": 0.1}, "density and rms"),
        ({"density": 0.0, "rms": 0.1}, "density: expected a fraction"),
        ({"density": 1.5, "rms": 0.1}, "density: expected a fraction"),
        ({"density": 0.1, "rms": 0.0}, "rms: expected the root mean square"),
        ({"density": 0.1, "rms": math.inf}, "rms: expected the root mean square"),
        ({"density": 0.1, "rms": 0.1, "width": 0}, "width: expected the hidden size"),
        ({"density": 0.1, "rms": math.nan}, "rms: expected the root mean square"),
    ],
)
def test_what_it_cannot_know_is_said(given, said):
    with pytest.raises(ValueError, match=said):
        sprand.suggest_lr(**given)


def test_weights_without_values_are_said():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    model = sprand.apply(model, density=0.1)
    with pytest.raises(
        ValueError, match=r"0\.weight, which is on the meta device \(or offloaded\); load the weights first, or give rms"
    ):
        sprand.suggest_lr(model)
    assert sprand.suggest_lr(model, rms=0.1) == pytest.approx(sprand.suggest_lr(density=0.1, rms=0.1, width=64), rel=0.03)
    for value in (0.0, math.nan):
        model = sprand.apply(weights(), density=0.1)
        for module in model[::2]:
            module.weight.data.fill_(value)
            module.sprand_base.fill_(value)
        with pytest.raises(ValueError, match="rms: expected the root mean square of the targeted weights, a positive number"):
            sprand.suggest_lr(model)


@pytest.mark.parametrize("asked", [[], ["--lr", "auto"]])
def test_finetune_takes_it(asked: list[str], tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    from sprand.cli.main import run

    folder, rows = save_bert(tmp_path / "bert"), save_rows(tmp_path / "rows.tsv")
    arguments = ["--model", str(folder), "--train", str(rows), "--density", "0.05", "--max-steps", "3", "--warmup", "0"]
    assert run(["finetune", *arguments, "--out", str(tmp_path / "out"), *asked]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    highest = max(line["lr"] for line in lines if "lr" in line)
    model = sprand.apply(transformers.AutoModelForSequenceClassification.from_pretrained(folder), density=0.05)
    assert highest == sprand.suggest_lr(model)


def test_finetune_counts_targets_that_a_mask_leaves_empty():
    pytest.importorskip("peft", reason="the command trains a PEFT model")
    from sprand.cli.finetune import methods
    from sprand.cli.finetune.settings import Settings

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    rms = rms_of(model[0].weight)
    indices = {"0.weight": torch.arange(0, 64 * 64, 16, dtype=torch.int32), "1.weight": torch.empty(0, dtype=torch.int32)}
    mask = sprand.Mask(indices, {name: (64, 64) for name in indices})
    method = methods.sparse(model, Settings(model="m", train=Path("t"), out=Path("o")), mask)
    assert method.lr == sprand.suggest_lr(density=1 / 32, rms=rms, width=64)


def test_a_peft_model_gives_them_too():
    peft = pytest.importorskip("peft", reason="the model is one of PEFT's")
    from sprand.peft import SprandConfig

    base = weights()
    rms = linear_rms(base)
    model = peft.get_peft_model(copy.deepcopy(base), SprandConfig(density=0.02))
    assert sprand.suggest_lr(model) == sprand.suggest_lr(density=0.02, rms=rms, width=64)
    mask = sprand.Mask({"0.weight": torch.arange(40)}, {"0.weight": (64, 128)}, {"strategy": "gradient"})
    chosen = peft.get_peft_model(copy.deepcopy(base), SprandConfig(mask=mask))
    first = rms_of(base[0].weight)
    assert sprand.suggest_lr(chosen) == sprand.suggest_lr(density=40 / 8192, rms=first, width=64, strategy="gradient")
    with chosen.disable_adapter(), pytest.raises(ValueError, match="no adapter of this PEFT model is active"):
        sprand.suggest_lr(chosen)


def test_adapters_of_a_peft_model_that_have_learned_or_are_merged_change_nothing():
    peft = pytest.importorskip("peft", reason="the model is one of PEFT's")
    from sprand.peft import SprandConfig

    base = weights()
    model = peft.get_peft_model(copy.deepcopy(base), SprandConfig(density=0.02, seed=1))
    model.add_adapter("other", SprandConfig(density=0.05, seed=2))
    model.base_model.set_adapter(["default", "other"])
    expected = sprand.suggest_lr(density=0.07, rms=linear_rms(base), width=64)
    assert sprand.suggest_lr(model) == pytest.approx(expected, rel=0.03)  # each count is rounded to whole entries
    before = sprand.suggest_lr(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "sprand_delta" in name:
                p.fill_(100.0)
    model(torch.randn(2, 128))
    assert sprand.suggest_lr(model) == before
    model.merge_adapter()
    assert sprand.suggest_lr(model) == before


def same_rate_as_one_process(rank, folder):
    """FSDP2, before and after steps; every rank comes to the rate of the whole model."""
    from torch.distributed.fsdp import fully_shard

    whole = made()
    rms = rms_of(whole.linear.weight, whole.conv.weight)
    expected = sprand.suggest_lr(whole)
    assert expected == sprand.suggest_lr(whole, rms=rms)
    for again in (True, False):
        model = made()
        for layer in (model.embed, model.linear, model.conv):
            fully_shard(layer, reshard_after_forward=again)
        fully_shard(model, reshard_after_forward=again)
        assert sprand.suggest_lr(model) == expected
        train(model, adamw(model), HALVES[rank : rank + 1])
        assert sprand.suggest_lr(model) == expected


def fsdp1_gathers_what_it_flattened(rank, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(made(), use_orig_params=True, device_id=torch.device("cpu"))
    assert sprand.suggest_lr(model) == sprand.suggest_lr(made())
    train(model, adamw(model), HALVES[rank : rank + 1])
    assert sprand.suggest_lr(model) == sprand.suggest_lr(made())
    with pytest.raises(ValueError, match=r"suggest_lr: expected the FullyShardedDataParallel wrapper itself \(FSDP1\)"):
        sprand.suggest_lr(model.module)


test_two_ranks = ranks.test_of([same_rate_as_one_process, fsdp1_gathers_what_it_flattened])


DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_page_states_the_law():
    page = (DOCS / "learning_rate.md").read_text()
    law = f"lr = {rates.FACTOR:g} rms / density^{rates.EXPONENT:g} x ({rates.NARROW} / width)^{rates.STEEPNESS:g}"
    assert law in page and f"below {rates.LEAST_DENSITY:.2%}".replace("%", " %") in page


@pytest.mark.parametrize("recipe", ["axolotl", "llama_factory"])
def test_recipes_show_a_rate_that_the_law_gives(recipe):
    page = (DOCS / "recipes" / f"{recipe}.md").read_text()
    shown = re.findall(r"^(?:base_model|model_name_or_path|learning_rate): (\S+)", page, re.MULTILINE)
    smollm2 = 0.19338  # the root mean square of its linear weights
    assert shown == [
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        f"{sprand.suggest_lr(density=0.01, rms=smollm2):.1e}".replace("e-0", "e-"),
    ]


def test_compared_methods_take_one_rate_up_to_the_widest_model_measured_and_less_beyond():
    pytest.importorskip("transformers")
    from sprand.cli.finetune.settings import PEER_RATES, WIDE, peer_rate

    for method, rate in PEER_RATES.items():
        assert peer_rate(method, rates.NARROW) == peer_rate(method, WIDE) == rate
        assert peer_rate(method, rates.NARROW // 2) > rate
        assert peer_rate(method, 2 * WIDE) == pytest.approx(rate / 2)
