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

from .. import CliError, Stopped
from .methods import Method
from .peak_memory import PeakMemory
from .progress import Log
from .settings import Settings
from .tasks import Task, batches
from .training_checkpoints import TrainingCheckpoints, diverged

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


def total_steps(settings: Settings, rows: int) -> int:
    """How many optimizer steps the options ask for."""
    per_epoch = math.ceil(math.ceil(rows / settings.batch_size) / settings.grad_accumulation)
    return settings.max_steps or max(1, round(settings.epochs * per_epoch))


def rate_factor(settings: Settings, step: int, steps: int) -> float:
    """What the highest learning rate is multiplied by in a step (counted from 0): warm-up, then the schedule down to 0."""
    warmup = round(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "constant": 1.0}[settings.schedule]


def train(
    method: Method, task: Task, settings: Settings, device: torch.device, log: Log, before: dict[str, float] | None = None,
    checkpoints: TrainingCheckpoints | None = None, done: int = 0, history: list[dict[str, Any]] | None = None,
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
        done: steps done before, by the run that is resumed.
        history: its metrics.

    Raises:
        TrainingFailed: the loss or the gradient is no finite number.
        Stopped: a signal asked to; the checkpoint of the last step is written.
    """
    steps = total_steps(settings, len(task.train))
    per_epoch = math.ceil(math.ceil(len(task.train) / settings.batch_size) / settings.grad_accumulation)
    evaluate_every = settings.eval_every or math.ceil(steps / 3)
    checkpoint_every = settings.checkpoint_every or per_epoch
    history = log.restart(method.name, history or [])
    if not history:
        before = before or task.evaluate(method.model, settings.batch_size, device)
        log.write(history, method=method.name, step=0, **{f"eval_{k}": v for k, v in before.items()})
    supply = batches(task.train, settings.batch_size, settings.seed, start=done * settings.grad_accumulation)
    seconds, timed = 0.0, 0
    method.model.train()
    with log.progress(method, steps, done) as bar, stop_signals() as stopped, PeakMemory(device) as memory:
        for step in range(done, steps):
            started = time.perf_counter()
            lr = method.lr * rate_factor(settings, step, steps)
            loss, norm = _step(method, task, settings, device, lr, list(itertools.islice(supply, settings.grad_accumulation)))
            spent = time.perf_counter() - started
            if step - done >= UNTIMED_STEPS or steps - done <= UNTIMED_STEPS:
                seconds, timed = seconds + spent, timed + 1
            bad = next(
                (
                    f"the {what} became {value}"
                    for what, value in (("loss", loss), ("gradient's norm", norm))
                    if not math.isfinite(value)
                ),
                None,
            )
            if bad:
                raise diverged(bad, step + 1, method, checkpoints)
            log.write(history, method=method.name, step=step + 1, loss=loss, lr=lr, grad_norm=norm, seconds=round(spent, 4))
            bar.advance(step + 1, loss)
            if (step + 1) % evaluate_every == 0 or step + 1 == steps:
                with memory.paused():
                    measured = task.evaluate(method.model, settings.batch_size, device)
                log.write(history, method=method.name, step=step + 1, **{f"eval_{k}": v for k, v in measured.items()})
                bar.measured(measured[task.metric])
            asked = stopped()
            if checkpoints and ((step + 1) % checkpoint_every == 0 or step + 1 == steps or asked):
                checkpoints.save(method, step + 1, history)
            if asked and step + 1 < steps:
                name = "Ctrl-C" if asked == signal.SIGINT else asked.name
                raise Stopped(f"Stopped by {name} after step {step + 1} of {steps} ({method.name}).", 128 + asked)
    measures = [line for line in history if f"eval_{task.metric}" in line]
    first, last = ({k.removeprefix("eval_"): v for k, v in measures[i].items() if k.startswith("eval_")} for i in (0, -1))
    if not timed:  # a run that is resumed at its end
        past = [line["seconds"] for line in history if "seconds" in line]
        seconds, timed = sum(past), len(past)
    return Outcome(first, last, steps, seconds / max(1, timed), memory.peak, history)


def pick_device(name: str) -> torch.device:
    """The device of an option: "auto" takes a GPU if there is one.

    Raises:
        CliError: this torch does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CliError(f"--device {name}: {str(error).splitlines()[0]}.") from None
    return device


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
    for group in method.optimizer.param_groups:
        group["lr"] = lr
    if getattr(method.optimizer, "max_grad_norm", None) is not None:
        method.optimizer.step()
        norm = float(method.optimizer.grad_norm)
    else:
        norm = float(torch.nn.utils.clip_grad_norm_(list(method.trained.values()), settings.max_grad_norm))
        method.optimizer.step()
    method.optimizer.zero_grad()
    return total, norm
