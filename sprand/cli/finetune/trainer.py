"""The trainers of a run: transformers' for classifiers and TRL's for language models, with our optimizer and exact measures."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction
from trl import SFTConfig, SFTTrainer

from .. import CliError
from ..files import reason_of
from .methods import Method
from .peak_memory import PeakMemory
from .rows import Rows
from .tasks import Batch, CausalLM, Task
from .training_checkpoints import TrainingCheckpoints


class Exact(Trainer):
    """What is the same in both: the method's own optimizer, means over all terms of the held-out rows, whole checkpoints.

    Args:
        method: a model made ready, with its optimizer.
        task: its rows, loss and metric.
        checkpoints: where they are written; None for none.
        memory: what evaluations are left out of.
        args: of the training.
        more: of the trainer.
    """

    def __init__(
        self, method: Method, task: Task, checkpoints: TrainingCheckpoints | None, memory: PeakMemory, args: TrainingArguments,
        **more: Any,
    ) -> None:  # fmt: skip
        self.method, self.task, self.checkpoints, self.memory = method, task, checkpoints, memory
        dtypes = {name: p.dtype for name, p in method.trained.items()}
        super().__init__(
            method.model, args, train_dataset=rows_of(task.train), eval_dataset=rows_of(task.eval),
            processing_class=task.tokenizer, compute_metrics=self._means, **more,
        )  # fmt: skip
        for name, p in method.trained.items():  # TRL makes those of a packed base bfloat16
            p.data = p.data.to(dtypes[name])

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The method's own optimizer."""
        self.optimizer = self.method.optimizer
        return self.optimizer

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Measure the held-out rows; the peak of memory is that of training alone."""
        with self.memory.paused():
            return super().evaluate(*arguments, **options)

    def prediction_step(self, model: Any, inputs: Batch, *_: Any, **__: Any) -> tuple[None, Tensor, Tensor]:
        """Of each row of a batch: the summed loss, how many terms it sums, and how many predictions were right."""
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self.task.sums(model, self._prepare_inputs(inputs))
        return None, sums, sums

    def _means(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.task.measured(*torch.from_numpy(prediction.predictions).double().unbind(1))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.checkpoints.writing(self.method, self.state.global_step):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, path: str, model: Any = None) -> None:
        with _reading(path):
            super()._load_from_checkpoint(path, model)

    def _load_optimizer_and_scheduler(self, path: str | None) -> None:
        with _reading(path):
            super()._load_optimizer_and_scheduler(path)

    def _load_rng_state(self, path: str | None) -> None:
        with _reading(path):
            super()._load_rng_state(path)


class Classifier(Exact):
    """transformers' trainer, with the loss of the task: of any model that makes logits."""

    def __init__(self, method: Method, task: Task, *arguments: Any, **options: Any) -> None:
        super().__init__(method, task, *arguments, data_collator=task.collate, **options)
        self.model_accepts_loss_kwargs = True  # the mean is over all terms of a step, not one of means of batches

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The summed loss of a batch over the terms of the step, as a share of it that the ranks' mean makes whole."""
        total, terms, _ = self.task.loss(model, inputs)
        if num_items_in_batch is None:
            return total / max(1, terms)
        return total / num_items_in_batch * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)


class LanguageModel(Exact, SFTTrainer):
    """TRL's trainer on rows that are tokens and labels already."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Checkpoints need no card."""


def trainer_for(method: Method, task: Task) -> type[Exact]:
    """The trainer of a task; a language model that transformers does not know takes the one of classifiers."""
    known = isinstance(method.model, (PreTrainedModel, PeftModel))
    return LanguageModel if isinstance(task, CausalLM) and known else Classifier


def arguments_class(method: Method, task: Task) -> type[TrainingArguments]:
    """The arguments that the trainer takes."""
    return SFTConfig if trainer_for(method, task) is LanguageModel else TrainingArguments


def rows_of(rows: Any) -> Dataset:
    """Rows as the trainers take them."""
    return rows.dataset if isinstance(rows, Rows) else Dataset.from_list(list(rows))


@contextmanager
def _reading(path: str | None):
    """Say that a checkpoint is damaged where it cannot be read.

    Raises:
        CliError: It cannot.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        if path is None:
            raise
        raise CliError(f"--resume: {path} is damaged: {reason_of(error)}.") from error
