"""The training loop: learning rate, accumulation, clipping, evaluation, checkpoints, and the stop when numbers go bad."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...training.divergence import is_worth_a_look, rate_to_try, stays_above_start
from .. import Stopped
from .methods import Method
from .peak_memory import PeakMemory
from .progress import Log
from .settings import Settings
from .tasks import Task, batches
from .training_checkpoints import Resumed, TrainingCheckpoints, diverged, rate_option

ANEW = Resumed()
UNTIMED_STEPS = 2  # the first steps make buffers and warm caches


@dataclasses.dataclass
class Outcome:
    """What training one method came to.

    Attributes:
        before, after: loss and metric on the evaluation rows.
        steps: optimizer steps in all.
        seconds_per_step: mean over the steps of this process but the first two, evaluation left out.
        peak_bytes: highest memory while training, above that before; None where it cannot be read.
        history: the lines of the metrics file.
    """

    before: dict[str, float]
    after: dict[str, float]
    steps: int
    seconds_per_step: float
    peak_bytes: int | None
    history: list[dict[str, Any]]


def steps_per_epoch(settings: Settings, rows: int) -> int:
    """How many optimizer steps go once through the training rows."""
    batches_per_epoch = math.ceil(rows / settings.batch_size)
    return math.ceil(batches_per_epoch / settings.grad_accumulation)


def total_steps(settings: Settings, rows: int) -> int:
    """How many optimizer steps the options ask for."""
    return settings.max_steps or max(1, round(settings.epochs * steps_per_epoch(settings, rows)))


def rate_factor(settings: Settings, step: int, steps: int) -> float:
    """What the highest learning rate is multiplied by in a step (counted from 0): warm-up, then the schedule down to 0."""
    warmup = round(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 1 - done if settings.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)


def train(
    method: Method, task: Task, settings: Settings, device: torch.device, log: Log, before: dict[str, float] | None = None,
    checkpoints: TrainingCheckpoints | None = None, resumed: Resumed = ANEW,
) -> Outcome:  # fmt: skip
    """Train a method to its end.

    Args:
        method: a model made ready.
        task: its rows, loss and metric.
        settings: the options.
        device: where the model is.
        log: takes the metrics, and shows progress.
        before: measured already, on an equal model.
        checkpoints: where to write them; None for none.
        resumed: how far the run has come that is gone on with.

    Raises:
        TrainingFailed: The loss or the gradient is no finite number.
        Stopped: A signal asked to stop; the checkpoint of the last step is written.
    """
    steps = total_steps(settings, len(task.train))
    evaluate_every = settings.eval_every or math.ceil(steps / 3)
    checkpoint_every = settings.checkpoint_every or steps_per_epoch(settings, len(task.train))
    history, done = log.restart(method.name, resumed.history), resumed.done
    if not history:
        before = before or task.evaluate(method.model, settings.batch_size, device)
        log.write(history, method=method.name, step=0, **_of_evaluation(before))
    supply = batches(task.train, settings.batch_size, settings.seed, start=done * settings.grad_accumulation)
    pace = Pace(steps - done)
    method.model.train()
    with log.progress(method, steps, done) as bar, stop_signals() as stopped, PeakMemory(device) as memory:
        for step in range(done + 1, steps + 1):
            lr = method.lr * rate_factor(settings, step - 1, steps)
            with pace:
                rows = list(itertools.islice(supply, settings.grad_accumulation))
                loss, norm = _step(method, task, settings, device, lr, rows)
            _prove_finite(loss, norm, step, method, checkpoints)
            log.write(history, method=method.name, step=step, loss=loss, lr=lr, grad_norm=norm, seconds=round(pace.last, 4))
            bar.advance(step, loss)
            if is_worth_a_look(step, step - 1, steps):
                _warn_of_rate(method, history, log)
            if step % evaluate_every == 0 or step == steps:
                with memory.paused():
                    measured = task.evaluate(method.model, settings.batch_size, device)
                log.write(history, method=method.name, step=step, **_of_evaluation(measured))
                bar.measured(measured[task.metric])
            asked = stopped()
            if checkpoints and (step % checkpoint_every == 0 or step == steps or asked):
                checkpoints.save(method, step, history)
            if asked and step < steps:
                name = "Ctrl-C" if asked == signal.SIGINT else asked.name
                raise Stopped(f"Stopped by {name} after step {step} of {steps} ({method.name}).", 128 + asked)
    evaluations = [_evaluation(line) for line in history if f"eval_{task.metric}" in line]
    return Outcome(evaluations[0], evaluations[-1], steps, pace.mean(history), memory.peak, history)


class Pace:
    """Times steps, each in a `with` block.

    Args:
        steps: how many there will be.

    Attributes:
        last: seconds of the last step.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.last = steps, 0.0
        self._all: list[float] = []

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.last = time.perf_counter() - self._started
        self._all.append(self.last)

    def mean(self, history: list[dict[str, Any]]) -> float:
        """Seconds per step, the first ones left out; of a run that is resumed at its end, those of its history."""
        seconds = self._all if self.steps <= UNTIMED_STEPS else self._all[UNTIMED_STEPS:]
        seconds = seconds or [line["seconds"] for line in history if "seconds" in line]
        return sum(seconds) / max(1, len(seconds))


def _of_evaluation(measured: dict[str, float]) -> dict[str, float]:
    """What a line of the history says of an evaluation."""
    return {f"eval_{name}": value for name, value in measured.items()}


def _evaluation(line: dict[str, Any]) -> dict[str, float]:
    """The evaluation that a line of the history tells of."""
    return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}


def _prove_finite(loss: float, norm: float, step: int, method: Method, checkpoints: TrainingCheckpoints | None) -> None:
    for what, value in (("loss", loss), ("gradient's norm", norm)):
        if not math.isfinite(value):
            raise diverged(f"the {what} became {value}", step, method, checkpoints)


def _warn_of_rate(method: Method, history: list[dict[str, Any]], log: Log) -> None:
    """Say that a rate is too high, where the losses do."""
    said = stays_above_start([line["loss"] for line in history if "loss" in line])
    if said is not None:
        advice = f"try {rate_option(method)}{rate_to_try(method.lr):g}"
        log.say(f"warning: {method.name}: {said}. The learning rate ({method.lr:g}) may be too high: {advice}.")


@contextmanager
def stop_signals() -> Iterator[Callable[[], signal.Signals | None]]:
    """Turn Ctrl-C and SIGTERM into a wish that is asked for between steps; a second one stops at once."""
    asked: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def remember(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number))
        os.write(2, b"sprand: stopping after this step; once more stops at once, without a checkpoint.\n")  # print may be at work

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _step(
    method: Method, task: Task, settings: Settings, device: torch.device, lr: float, micro: list[list[dict[str, Any]]]
) -> tuple[float, float]:
    """One optimizer step; the loss is the mean over all terms of the micro-batches. Returns the loss and the gradient norm."""
    collated = [{k: v.to(device) for k, v in task.collate(rows).items()} for rows in micro]
    terms = max(1, sum(task.terms(batch) for batch in collated))
    total = 0.0
    for batch in collated:
        loss = task.loss(method.model, batch)[0] / terms
        total += float(loss.detach())
        if not math.isfinite(total):
            return total, 0.0
        loss.backward()
    optimizer = method.optimizer
    for group in optimizer.param_groups:
        group["lr"] = lr
    if getattr(optimizer, "max_grad_norm", None) is not None:
        optimizer.step()
        norm = float(optimizer.grad_norm)
    else:
        norm = float(torch.nn.utils.clip_grad_norm_(list(method.trained.values()), settings.max_grad_norm))
        optimizer.step()
    optimizer.zero_grad()
    return total, norm
