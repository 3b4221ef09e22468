"""A training of `sprand finetune` that is killed at a random step and resumed, again and again, ends as if it never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forks import one_thread, started, status_of

pytest.importorskip("trl")
pytest.importorskip("rich")

from transformers import TrainerCallback

from sprand.cli.finetune import data, methods, models, tasks, training
from sprand.cli.finetune.progress import Log
from sprand.cli.finetune.settings import Settings
from sprand.cli.finetune.training_checkpoints import ANEW, TrainingCheckpoints, identity

KILLS, STEPS = 8, 3  # times, and the most steps that a copy does


@pytest.fixture(autouse=True)
def single():
    with one_thread():
        yield


class Run:
    """What `sprand finetune` does between loading the model and saving the adapter; the model is loaded once."""

    def __init__(self, bert: Path, rows: Path, out: Path) -> None:
        self.settings = Settings(
            model=str(bert), train=rows, out=out, density=0.05, batch_size=4, max_steps=KILLS * STEPS + 5,
            checkpoint_every=1, eval_every=10**6, limit_eval=4, lr=0.01,
        )  # fmt: skip
        dataset = data.load(self.settings)
        self.model, tokenizer = models.load(str(bert), dataset.task, len(dataset.labels), "float32", "auto", 0)
        self.task = tasks.make(dataset, tokenizer, self.settings)

    def __call__(self, out: Path, stepped=lambda: None) -> None:
        """Go on from the newest checkpoint, if there is one, to the end."""
        method = methods.sparse(self.model, self.settings, None)
        checkpoints = TrainingCheckpoints(out / "checkpoints", identity(method, self.settings, self.task.train), keep=3)
        torch.manual_seed(self.settings.seed)
        out.mkdir(exist_ok=True)
        run = training.Training(method, self.task, self.settings, torch.device("cpu"), checkpoints)
        newest = checkpoints.newest()
        if newest is None:
            checkpoints.begin()
        log = Log(out / "metrics.jsonl", self.task.metric)
        log.console.quiet = True
        run.trainer.add_callback(After(stepped))
        run.run(log, resumed=checkpoints.resume(newest) if newest else ANEW)
        method.model.save_pretrained(out / "adapter")


class After(TrainerCallback):
    """Calls something after each step, before it is saved."""

    def __init__(self, stepped: Callable[[], None]) -> None:
        self.stepped = stepped

    def on_step_end(self, *arguments, **options) -> None:
        self.stepped()


def told(said: int) -> Callable[[], None]:
    """Says after each step that it was done; after the last that a copy may do, it waits for the end."""
    left = STEPS

    def stepped() -> None:
        nonlocal left
        os.write(said, b".")
        left -= 1
        while left < 0:
            signal.pause()

    return stepped


def newest(out: Path) -> int:
    found = TrainingCheckpoints(out / "checkpoints", {}).newest()
    return 0 if found is None else int(found.name.removeprefix("checkpoint-"))


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "adapter").iterdir()}


def losses(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.slow
def test_killed_many_times_in_a_row_and_resumed_to_the_bit(bert, rows, tmp_path):
    """Each copy of the process is killed some steps after it began, in a step or in a save; the model has dropout."""
    run, source, kills, seen = Run(bert, rows, tmp_path), random.Random(0), 0, []
    assert status_of(started(lambda: run(tmp_path / "whole"))) == 0
    while kills < KILLS:
        before, (heard, said) = newest(tmp_path / "killed"), os.pipe()
        child = started(lambda said=said: run(tmp_path / "killed", told(said)))
        os.close(said)
        for _ in range(source.randrange(1, STEPS + 1)):
            os.read(heard, 1)
        signal.sigtimedwait([], source.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL
        os.close(heard)
        seen.append(newest(tmp_path / "killed") - before)
        assert seen[-1] >= 0 and newest(tmp_path / "killed") < run.settings.max_steps
        kills += 1
    assert len(set(seen)) > 1
    assert status_of(started(lambda: run(tmp_path / "killed"))) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) > KILLS
    assert len(TrainingCheckpoints(tmp_path / "killed" / "checkpoints", {}).all()) == 3


def test_other_checkpoints_give_other_adapters(bert, rows, tmp_path):
    """What the test above compares does differ where a run is not the same: here its random state is lost."""
    run = Run(bert, rows, tmp_path)
    assert status_of(started(lambda: run(tmp_path / "whole"))) == 0

    def forgetful() -> None:
        torch.random.set_rng_state = lambda state: None
        run(tmp_path / "other")

    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    child = started(lambda: run(tmp_path / "other"))
    while newest(tmp_path / "other") < 10:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    status_of(child)
    assert status_of(started(forgetful)) == 0
    assert content(tmp_path / "other") != content(tmp_path / "whole")
