"""`suggest_lr`: what it follows, what a model gives it, and that `sprand finetune` takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import sprand
from tiny_models import save_bert, save_rows


def test_it_rises_as_density_and_width_fall():
    rates = [sprand.suggest_lr(density=d, width=384) for d in (3e-4, 1e-3, 3e-3, 1e-2, 5e-2, 0.3, 1.0)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)
    widths = [sprand.suggest_lr(density=0.01, width=w) for w in (64, 128, 384, 768, 4096)]
    assert widths == sorted(widths, reverse=True)
    assert sprand.suggest_lr(density=0.01, width=768) == pytest.approx(sprand.suggest_lr(density=0.01, width=384) / 2, rel=0.03)
    assert sprand.suggest_lr(density=0.01, width=16) == sprand.suggest_lr(density=0.01, width=64)


def test_gradient_masks_get_a_lower_rate_until_all_entries_train():
    for density in (1e-3, 1e-2, 5e-2):
        random, gradient = (sprand.suggest_lr(density=density, width=384, strategy=name) for name in ("random", "gradient"))
        assert gradient < random / 2
    assert sprand.suggest_lr(density=1.0, width=384, strategy="fisher") == sprand.suggest_lr(density=1.0, width=384)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))


def test_a_model_gives_density_width_and_strategy():
    model = sprand.apply(two_layers(), density=0.02)
    assert sprand.suggest_lr(model) == sprand.suggest_lr(density=0.02, width=128)
    data = [torch.randn(8, 128)]
    model = sprand.apply(two_layers(), density=0.02, strategy="gradient", data=data, loss_fn=lambda m, x: m(x).square().mean())
    assert sprand.suggest_lr(model) == sprand.suggest_lr(density=0.02, width=128, strategy="gradient")
    assert sprand.suggest_lr(model, strategy="random", width=64) == sprand.suggest_lr(density=0.02, width=64)


def test_a_hidden_size_in_the_configuration_counts_first(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(save_bert(tmp_path / "bert"))
    assert sprand.suggest_lr(sprand.apply(model, density=0.1)) == sprand.suggest_lr(density=0.1, width=32)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "expected a model of sprand.apply, or density and width"),
        ({"density": 0.1}, "density and width"),
        ({"density": 0.0, "width": 384}, "density: expected a fraction"),
        ({"density": 1.5, "width": 384}, "density: expected a fraction"),
        ({"density": 0.1, "width": 0}, "width: expected the hidden size"),
    ],
)
def test_what_it_cannot_know_is_said(given, said):
    with pytest.raises(ValueError, match=said):
        sprand.suggest_lr(**given)


@pytest.mark.parametrize("asked", [[], ["--lr", "auto"]])
def test_finetune_takes_it(asked: list[str], tmp_path: Path):
    pytest.importorskip("transformers")
    from sprand.cli.main import run

    folder, rows = save_bert(tmp_path / "bert"), save_rows(tmp_path / "rows.tsv")
    arguments = ["--model", str(folder), "--train", str(rows), "--density", "0.05", "--max-steps", "3", "--warmup", "0"]
    assert run(["finetune", *arguments, "--out", str(tmp_path / "out"), *asked]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    highest = max(line["lr"] for line in lines if "lr" in line)
    assert highest == pytest.approx(sprand.suggest_lr(density=0.05, width=32), rel=0.03)  # the count is rounded to whole entries


def test_finetune_counts_targets_that_a_mask_leaves_empty():
    from sprand.cli.finetune import methods
    from sprand.cli.finetune.settings import Settings

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    indices = {"0.weight": torch.arange(0, 64 * 64, 16, dtype=torch.int32), "1.weight": torch.empty(0, dtype=torch.int32)}
    mask = sprand.Mask(indices, {name: (64, 64) for name in indices})
    made = methods.sparse(model, Settings(model="m", train=Path("t"), out=Path("o")), mask)
    assert made.lr == sprand.suggest_lr(density=1 / 32, width=64) != sprand.suggest_lr(density=1 / 16, width=64)


def test_a_peft_model_gives_them_too():
    peft = pytest.importorskip("peft", reason="the model is one of PEFT's")
    from sprand.peft import SprandConfig

    model = peft.get_peft_model(nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128)), SprandConfig(density=0.02))
    assert sprand.suggest_lr(model) == sprand.suggest_lr(density=0.02, width=sprand.training.rates.width_of(model))
    mask = sprand.Mask({"0.weight": torch.arange(40)}, {"0.weight": (64, 128)}, {"strategy": "gradient"})
    chosen = peft.get_peft_model(nn.Sequential(nn.Linear(128, 64)), SprandConfig(mask=mask))
    assert sprand.suggest_lr(chosen) == sprand.suggest_lr(density=40 / 8192, width=128, strategy="gradient")
    with chosen.disable_adapter(), pytest.raises(ValueError, match="no adapter of this PEFT model is active"):
        sprand.suggest_lr(chosen)
