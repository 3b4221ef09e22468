"""A rate that is too high is said: by `LearningRateCallback` in a `Trainer`, by `sprand finetune`, and never by noise."""

from __future__ import annotations

import copy
import random
import re
import warnings

import pytest
import torch

import sprand
from sprand.training.divergence import is_worth_a_look, rate_to_try, stays_above_start
from tiny_models import save_bert, save_rows
from trainers import llama, losses, rows, trainer_of

transformers = pytest.importorskip("transformers")

from sprand.integrations.transformers import LearningRateCallback  # noqa: E402


def noisy(seed: int, count: int, start: float, end: float, noise: float) -> list[float]:
    """Losses that go from one value to another within the first quarter, with noise as large at any time."""
    generator = random.Random(seed)
    way = [min(1.0, 4 * step / count) for step in range(count)]
    return [start + (end - start) * done + generator.gauss(0, noise) for done in way]


@pytest.mark.parametrize("count", [20, 40, 400])
@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_losses_that_rise_and_stay_are_told(count, noise):
    rising = [noisy(seed, count, 2.0, 8.0, noise) for seed in range(100)]
    assert all(stays_above_start(curve) is not None for curve in rising)
    said = stays_above_start(rising[0])
    assert re.fullmatch(r"the training loss stays above its start: (\S+) at first, (\S+) to (\S+) lately", said)
    late = sorted(rising[0][-(count // 4) :])
    assert said.endswith(f"{rising[0][0]:.3g} at first, {late[0]:.3g} to {late[-1]:.3g} lately")


@pytest.mark.parametrize("count", [20, 40, 400])
@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
def test_noisy_losses_that_fall_are_not(count, noise):
    assert not any(stays_above_start(noisy(seed, count, 2.0, 2.0 - 3 * noise, noise)) for seed in range(1000))


def test_noise_alone_is_seldom_told():
    assert sum(stays_above_start(noisy(seed, 40, 2.0, 2.0, 0.3)) is not None for seed in range(2000)) <= 4
    assert not any(stays_above_start(noisy(seed, 100, 2.0, 2.0, 0.3)) for seed in range(1000))


def test_a_peak_on_the_way_and_few_losses_say_nothing():
    peak = [2.0] * 5 + [9.0] * 20 + [1.9] * 15
    assert stays_above_start(peak) is None
    assert stays_above_start([1.0, *[9.0] * 18]) is None and stays_above_start([1.0, *[9.0] * 19]) is not None


def test_losses_are_looked_at_after_half_of_the_steps_and_at_the_end():
    for every, expected in ((1, [5, 9]), (2, [6]), (4, [8])):
        logged, before, looked = range(every, 10, every), 0, []
        for step in logged:
            if is_worth_a_look(step, before, 9):
                looked.append(step)
                before = step
        assert looked == expected
    assert rate_to_try(0.0155) == 0.0052


@pytest.fixture(scope="module")
def knowing():
    """A model that has learned its rows by heart, so that a training can spoil it."""
    model = llama()
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train(folder, callbacks, model=None, **options):
    trainer = trainer_of(sprand.apply(model or llama(), density=0.05), folder, callbacks, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_a_trainer_warns_of_a_rate_that_keeps_the_loss_up(tmp_path, knowing, logging_steps):
    options = {"max_steps": 40, "logging_steps": logging_steps}
    with pytest.warns(UserWarning, match="LearningRateCallback: the training loss stays above its start") as said:
        train(tmp_path, [LearningRateCallback()], copy.deepcopy(knowing), learning_rate=3.0, **options)
    assert str(said[-1].message).endswith("The learning rate (3) may be too high: try learning_rate=1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for model in (None, copy.deepcopy(knowing)):
            train(tmp_path, [LearningRateCallback()], model, **options)


def test_it_changes_nothing_of_a_training(tmp_path):
    with_it, without = (train(tmp_path, callbacks) for callbacks in ([LearningRateCallback()], []))
    assert losses(with_it) == losses(without)
    for a, b in zip(sprand.parameters(with_it.model), sprand.parameters(without.model), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_trainer_stops_at_a_loss_that_is_not_finite(tmp_path, logging_steps):
    class TurnsBad(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                for delta in sprand.parameters(kwargs["model"]):
                    delta.data.fill_(torch.nan)

    options = {"logging_steps": logging_steps, "max_steps": 20}
    with pytest.raises(RuntimeError, match=r"the loss became nan by step 3.*\(0.01\) may be too high; try learning_rate=0.0033"):
        train(tmp_path, [TurnsBad(), LearningRateCallback()], **options)


def test_a_gradient_that_is_not_finite_stops_it_and_under_fp16_does_not(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), learning_rate=0.01, report_to="none", use_cpu=True)
    state, control = transformers.TrainerState(max_steps=100, global_step=7), transformers.TrainerControl()
    logs = {"loss": 1.0, "grad_norm": float("inf")}
    with pytest.raises(RuntimeError, match="the norm of the gradient became inf by step 7"):
        LearningRateCallback().on_log(args, state, control, logs)
    args.fp16 = True
    LearningRateCallback().on_log(args, state, control, logs)


@pytest.fixture
def finetune(tmp_path, capsys):
    """What `sprand finetune` says, and its exit code."""
    from sprand.cli.main import run

    def said(*options):
        code = run(["finetune", *map(str, options), "--out", str(tmp_path / "out"), "--overwrite"])
        printed = capsys.readouterr()
        return code, " ".join((printed.out + printed.err).split())

    return said


def test_finetune_warns_of_it(tmp_path, finetune, monkeypatch):
    from sprand.cli.finetune import tasks

    folder, texts = save_bert(tmp_path / "bert"), save_rows(tmp_path / "rows.tsv")
    options = ["--model", folder, "--train", texts, "--density", 0.3, "--max-steps", 40, "--lr", 0.003]
    code, said = finetune(*options)
    assert code == 0 and "stays above its start" not in said
    loss, calls = tasks.Task.loss, []

    def rises(self, model, batch):
        total, terms, right = loss(self, model, batch)
        calls.append(model.training)
        return total * 5 if sum(calls) > 2 else total, terms, right

    monkeypatch.setattr(tasks.Task, "loss", rises)
    code, said = finetune(*options)
    assert code == 0 and "warning: sprand: the training loss stays above its start: 0.6" in said
    assert "The learning rate (0.003) may be too high: try --lr 0.001." in said
