"""A Trainer chooses columns by gradients of its first steps, and a training is resumed after the choice."""

from __future__ import annotations

import pytest
import torch

import sprand
from models import assert_same_bits
from peft_models import peft, positions, trainable
from sprand.peft import SprandConfig
from test_columns_scoring import DOORS
from test_columns_waiting import indices_of

trainers = pytest.importorskip("trainers", reason="these tests train with transformers.Trainer")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_trainer_chooses_in_its_first_steps(tmp_path, accumulated):
    """By all of its rows, as data in one batch, and goes on."""
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulated}
    fields = {"strategy": "token_fisher", "layout": "columns", "density": 0.3}
    model = peft.get_peft_model(trainers.llama(), SprandConfig(**fields, score_steps=4 // accumulated))
    trainer = trainers.trainer_of(model, tmp_path, max_steps=5, **rows)
    trainer.train()
    whole = torch.stack([row["input_ids"] for row in trainer.train_dataset])
    mask = sprand.select(trainers.llama(), **fields, data=[{"input_ids": whole, "labels": whole}])
    assert_same_bits(positions(model), dict(mask))
    assert all(p.any() for p in trainable(model))


@pytest.mark.parametrize("door", DOORS)
def test_a_trainer_is_resumed_after_the_choice_and_saves_nothing_before(tmp_path, door):
    def trained(folder, **options):
        model = DOORS[door](trainers.llama(), score_steps=2)
        return trainers.trained(folder, model, optimizer=None, **{"save_strategy": "steps", "max_steps": 5} | options)

    model, trainer = trained(tmp_path, save_steps=3)
    resumed, other = trained(tmp_path, save_strategy="no", resume=str(tmp_path / "checkpoint-3"))
    assert_same_bits(indices_of(resumed), indices_of(model))
    assert_same_bits(trainers.everything(resumed, other), trainers.everything(model, trainer))
    with pytest.raises(ValueError, match="are being chosen in the first steps of training"):
        trained(tmp_path / "early", save_steps=1)
