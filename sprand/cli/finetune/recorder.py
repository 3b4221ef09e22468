"""What a run takes note of while a trainer works: metrics.jsonl, progress and pace; and when it has to end before its time."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...training.divergence import is_worth_a_look, rate_to_try, stays_above_start
from .methods import Method
from .progress import Bar, Lines, Log
from .training_checkpoints import TrainingCheckpoints, diverged, rate_option

UNTIMED_STEPS = 2  # the first steps make buffers and warm caches
NAMES = {"learning_rate": "lr", "mean_token_accuracy": "token_accuracy"}  # of metrics.jsonl, by the trainers' names
LEFT_OUT = ("epoch", "num_tokens", "total_flos", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class Recorder(TrainerCallback):
    """Writes a line for each logged step and evaluation, and has the last step logged, measured and saved.

    Args:
        trainer: what it listens to.
        method: what trains.
        log: takes the lines.
        bar: shows them.
        history: the lines so far, added to.
        checkpoints: what is said to be kept where numbers go bad; None where there are none.
        stopped: the signal that asked to stop, if any.

    Attributes:
        asked: the signal that ended the training.
    """

    def __init__(
        self, trainer: Trainer, method: Method, log: Log, bar: Bar | Lines, history: list[dict[str, Any]],
        checkpoints: TrainingCheckpoints | None, stopped: Callable[[], signal.Signals | None],
    ) -> None:  # fmt: skip
        self.trainer, self.method, self.log, self.bar, self.history = trainer, method, log, bar, history
        self.checkpoints, self.stopped = checkpoints, stopped
        self.asked: signal.Signals | None = None
        self._started, self._seconds, self._looked = 0.0, [], None

    def pace(self) -> float:
        """Seconds per step, the first ones left out; of a run that is resumed at its end, those of its history."""
        seconds = self._seconds[UNTIMED_STEPS:] or self._seconds
        seconds = seconds or [line["seconds"] for line in self.history if "seconds" in line]
        return sum(seconds) / max(1, len(seconds))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the time, and decide what is due; what is saved is logged, so that no bad number is."""
        self._seconds.append(time.perf_counter() - self._started)
        self.asked = self._agreed(self.stopped())
        last = state.global_step >= state.max_steps
        if last:  # what it ends with the run measures itself, but for the best checkpoint this one is one of those to choose from
            control.should_evaluate = args.load_best_model_at_end
        control.should_save |= self.checkpoints is not None and (last or bool(self.asked))
        control.should_training_stop |= bool(self.asked)
        control.should_log |= control.should_save or last
        self.bar.advance(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Write the line of a loss or an evaluation.

        Raises:
            TrainingFailed: The loss, or the norm of the gradient, is no finite number.
        """
        entry = state.log_history[-1]
        if "loss" in entry:
            entry["seconds"] = round(self._seconds[-1], 4)
            self._prove_finite(entry, args)
            self.bar.loss(entry["step"], entry["loss"])
        elif not any(name.startswith("eval_") for name in entry):
            return
        line = line_of(entry, self.method.name)
        self.log.write(self.history, **line)
        if "loss" not in line:
            self.bar.measured(line[f"eval_{self.log.metric}"])
        elif is_worth_a_look(state.global_step, self._looked or state.global_step - 1, state.max_steps):
            self._warn_of_rate()
        self._looked = state.global_step

    def _prove_finite(self, entry: dict[str, Any], args: TrainingArguments) -> None:
        for name, what in (("loss", "loss"), ("grad_norm", "gradient's norm")):
            value = float(entry.get(name, 0.0))
            if not math.isfinite(value) and not (args.fp16 and name == "grad_norm"):  # under fp16 such a step is skipped
                raise diverged(f"the {what} became {value}", entry["step"], self.method, self.checkpoints)

    def _warn_of_rate(self) -> None:
        """Say that a rate is too high, where the losses do."""
        said = stays_above_start([line["loss"] for line in self.history if "loss" in line])
        if said is not None:
            advice = f"try {rate_option(self.method)}{rate_to_try(self.method.lr):g}"
            rate = f"The learning rate ({self.method.lr:g}) may be too high: {advice}."
            self.log.say(f"warning: {self.method.name}: {said}. {rate}")

    def _agreed(self, asked: signal.Signals | None) -> signal.Signals | None:
        """The signal that any process was sent."""
        if self.trainer.args.world_size == 1:
            return asked
        highest = torch.tensor([int(asked or 0)], device=self.trainer.args.device)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        return signal.Signals(int(highest)) if int(highest) else None


def measured_line(method: str, step: int, numbers: dict[str, float]) -> dict[str, Any]:
    """The line of metrics.jsonl for what a run has measured on the held-out rows."""
    return {"method": method, "step": step, **{f"eval_{name}": value for name, value in numbers.items()}}


def line_of(entry: dict[str, Any], method: str) -> dict[str, Any]:
    """The line of metrics.jsonl for an entry of the trainer's history."""
    named = {NAMES.get(name, name): value for name, value in entry.items() if name not in LEFT_OUT}
    first = {name: named.pop(name) for name in ("step", "loss", "lr", "grad_norm") if name in named}
    return {"method": method, **first, **dict(sorted(named.items()))}


def lines_of(history: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that a trainer's history tells of."""
    kept = (entry for entry in history if any(name == "loss" or name.startswith("eval_") for name in entry))
    return [line_of(entry, method) for entry in kept]
