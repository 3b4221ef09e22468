"""Trains a method to its end: the trainer's arguments, how long it takes, and the signals that stop it before."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, HfArgumentParser, PrinterCallback, TrainingArguments

from .. import CliError, Stopped, ranks
from ..files import reason_of
from .methods import Method
from .peak_memory import PeakMemory
from .progress import Log
from .recorder import Recorder, lines_of, measured_line
from .settings import Settings
from .tasks import Task
from .trainer import Exact, arguments_class, trainer_for
from .training_checkpoints import ANEW, Resumed, TrainingCheckpoints

SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # by transformers' names
LOGGED = 500  # steps, about, of a long run


@dataclasses.dataclass
class Outcome:
    """What training one method came to.

    Attributes:
        steps: optimizer steps in all.
        seconds_per_step: mean over the steps of this process but the first two, evaluation left out.
        peak_bytes: highest memory while training, above that before; None where it cannot be read.
        history: the lines of the metrics file.
    """

    steps: int
    seconds_per_step: float
    peak_bytes: int | None
    history: list[dict[str, Any]]


class Training:
    """A method, and the trainer that will train it.

    Args:
        method: a model made ready.
        task: its rows, loss and metric.
        settings: the options.
        device: where to train.
        checkpoints: where to write them; None for none.

    Attributes:
        steps: optimizer steps that the run takes in all.

    Raises:
        CliError: An option of the trainer is none, or does not go with the others.
    """

    def __init__(
        self, method: Method, task: Task, settings: Settings, device: torch.device, checkpoints: TrainingCheckpoints | None = None
    ) -> None:
        self.method, self.task, self.checkpoints = method, task, checkpoints
        self.memory = PeakMemory(device)
        self.trainer = self._trainer(settings, device)
        self.steps = self._plan(settings)

    def run(self, log: Log, before: dict[str, float] | None = None, resumed: Resumed = ANEW) -> Outcome:
        """Train.

        Args:
            log: takes the metrics, and shows progress.
            before: measured already, on an equal model.
            resumed: how far the run has come that is gone on with.

        Raises:
            CliError: The checkpoint cannot be read.
            TrainingFailed: The loss or the gradient is no finite number, or a checkpoint cannot be written.
            Stopped: A signal asked to stop; the checkpoint of the last step is written.
        """
        method, trainer = self.method, self.trainer
        first = [] if before is None else [measured_line(method.name, 0, before)]
        history = log.restart(method.name, first + lines_of(resumed.history, method.name))
        trainer.args.eval_on_start = not history
        with stop_signals() as stopped, self.memory, log.progress(method, self.steps, resumed.done) as bar:
            recorder = Recorder(trainer, method, log, bar, history, self.checkpoints, stopped)
            trainer.add_callback(recorder)
            trainer.train(resume_from_checkpoint=resumed.path and str(resumed.path))
        step = trainer.state.global_step
        if recorder.asked and step < self.steps:
            name = "Ctrl-C" if recorder.asked == signal.SIGINT else recorder.asked.name
            raise Stopped(f"Stopped by {name} after step {step} of {self.steps} ({method.name}).", 128 + recorder.asked)
        return Outcome(step, recorder.pace(), self.memory.peak, history)

    def save(self, folder: Path) -> None:
        """Save the adapter, with a card where its base is of the Hub; what is sharded all processes gather, and one writes."""
        self.method.model.save_pretrained(folder, is_main_process=ranks.is_first())
        if ranks.is_first() and Path(self.method.model.base_model.model.config.name_or_path).is_dir():
            (folder / "README.md").unlink()  # PEFT's card would tell a folder of this machine

    def _trainer(self, settings: Settings, device: torch.device) -> Exact:
        own = self._arguments(settings, device)
        try:
            options = own | parsed(dict(settings.trainer), arguments_class(self.method, self.task))
            args = arguments_class(self.method, self.task)(**options)
            args._n_gpu = min(args.n_gpu, 1)  # several GPUs are for several processes
            trainer = trainer_for(self.method, self.task)(self.method, self.task, self.checkpoints, self.memory, args)
        except (ValueError, TypeError, ImportError) as error:
            raise CliError(f"The trainer does not take these options: {reason_of(error)}.") from error
        if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            raise CliError("FSDP: expected its version 2, got 1; accelerate launch --use_fsdp --fsdp_version 2 ...")
        trainer.remove_callback(PrinterCallback)
        if settings.patience is not None and self.checkpoints is not None:
            trainer.add_callback(EarlyStoppingCallback(settings.patience))
        return trainer

    def _arguments(self, settings: Settings, device: torch.device) -> dict[str, Any]:
        """What the options say, by the names of transformers and TRL."""
        folder = self.checkpoints.folder if self.checkpoints else tempfile.gettempdir()
        best = (settings.best or settings.patience is not None) and self.checkpoints is not None
        return {
            "output_dir": str(folder),
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": settings.batch_size,
            "gradient_accumulation_steps": settings.grad_accumulation,
            "learning_rate": self.method.lr,
            "lr_scheduler_type": SCHEDULERS[settings.schedule],
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "seed": settings.seed,
            "bf16": False,  # the weights' own dtype is that of the work
            "use_cpu": device.type == "cpu",
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "eval_strategy": "steps",
            "save_strategy": "steps" if self.checkpoints else "no",
            "save_total_limit": self.checkpoints.keep if self.checkpoints else None,
            "load_best_model_at_end": best,
            "metric_for_best_model": self.task.metric if best else None,
            "greater_is_better": self.task.higher_is_better if best else None,
            "report_to": list(settings.report_to) or "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": device.type == "cuda",
        } | self._of_language_models(settings)

    def _of_language_models(self, settings: Settings) -> dict[str, Any]:
        if not hasattr(arguments_class(self.method, self.task), "packing"):
            return {}
        return {
            "packing": settings.packing,
            "eval_packing": False,
            "max_length": self.task.max_length,
            "shuffle_dataset": False,
            "dataset_kwargs": None if settings.packing else {"skip_prepare_dataset": True},
        }

    def _plan(self, settings: Settings) -> int:
        """Decide by the trainer's own rows how many steps there are, and after which ones it measures and saves."""
        args, batches = self.trainer.args, len(self.trainer.get_train_dataloader())
        steps = total_steps(settings, batches)
        warmup = round(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)
        warmup = warmup if warmup > 1 else 0  # transformers starts at a rate of 0: a single step would train nothing
        given = dict(settings.trainer)
        planned = {
            "max_steps": steps,
            "warmup_steps": warmup,
            "eval_steps": settings.eval_every or math.ceil(steps / 3),
            "save_steps": settings.checkpoint_every or math.ceil(batches / settings.grad_accumulation),
            "logging_steps": max(1, steps // LOGGED),
        }
        for name, value in planned.items():
            if name not in given:
                setattr(args, name, value)
        if args.load_best_model_at_end:
            args.save_steps = args.eval_steps
        return args.max_steps


def total_steps(settings: Settings, batches: int) -> int:
    """How many optimizer steps the options ask for, where an epoch has so many batches."""
    return settings.max_steps or max(1, round(settings.epochs * math.ceil(batches / settings.grad_accumulation)))


def train(
    method: Method, task: Task, settings: Settings, device: torch.device, log: Log, before: dict[str, float] | None = None
) -> Outcome:
    """Train a method to its end without checkpoints; see `Training`."""
    return Training(method, task, settings, device).run(log, before)


def parsed(given: dict[str, str], kind: type[TrainingArguments]) -> dict[str, Any]:
    """Options of a trainer, from texts as a shell gives them.

    Args:
        given: texts by the names of the options.
        kind: the class that has these options.

    Raises:
        ValueError: There is no such option, or the text is no value of it.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    for name, text in given.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--trainer {name}={text}: {kind.__name__} has no option {name!r}{hint}")
    words = [word for name, text in given.items() for word in (f"--{name}", text)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            made = HfArgumentParser(kind).parse_args(words)
    except SystemExit:
        raise ValueError(f"--trainer: {said.getvalue().strip().rpartition('error: ')[2]}") from None
    return {name: getattr(made, name) for name in given}


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
        if ranks.is_first():
            os.write(
                2, b"sprand: stopping after this step; once more stops at once, without a checkpoint.\n"
            )  # print may be at work

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
