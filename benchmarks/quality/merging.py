"""Adapters of several tasks for one base, merged into one: how well each task still does, with its own head."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import sprand
from quality.training import Run, TaskPlan, attached, load, settings_of
from sprand.adapters.file import AdapterFile
from sprand.cli.finetune import data, methods, tasks, training
from sprand.cli.finetune.progress import Log
from sprand.cli.finetune.settings import Settings
from sprand.files import described

DENSITY = 0.5  # of TIES and DARE, for every method
SPRAND = {"sum": {"method": "sum"}, "mean": {"method": "mean"}} | {
    name: {"method": name, "density": DENSITY} for name in ("ties", "dare")
}
LORA = {
    "sum (cat)": {"combination_type": "cat"},
    "mean (cat, weights 1/3)": {"combination_type": "cat"},
    "linear": {"combination_type": "linear"},
    "svd": {"combination_type": "svd"},
    "ties": {"combination_type": "ties", "density": DENSITY},
    "dare_linear": {"combination_type": "dare_linear", "density": DENSITY},
}
STRATEGY = {"random": "random", "disjoint": "random", "gradient": "gradient", "lora": "lora"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: a kind of adapter for each task, in their order.

    Attributes:
        kind: `"random"`, `"disjoint"` (random, apart from the tasks before), `"gradient"` or `"lora"`.
        seed: of the first task; the others take the next ones.
        budget: share of the targeted weights' entries that train.
        lr: highest learning rate.
    """

    kind: str
    seed: int
    budget: float
    lr: float

    def runs(self, names: Sequence[str]) -> Iterator[Run]:
        """A run for each task, each with a seed of its own."""
        for number, name in enumerate(names):
            yield Run(name, STRATEGY[self.kind], self.budget, self.lr, len(names) * self.seed + number)


def combinations(kind: str) -> dict[str, dict[str, Any]]:
    """The ways to merge adapters of a kind, with their options."""
    return LORA if kind == "lora" else SPRAND


def train_all(case: Case, plans: Mapping[str, TaskPlan], shared: Path, kept: Path) -> list[Path]:
    """Train an adapter for each task, or find it where an earlier call kept it.

    Returns:
        The folder of each, with the adapter, its head, and for LoRA its ranks and layers.
    """
    folders: list[Path] = []
    for run in case.runs(list(plans)):
        size = described.digest([json.dumps(plans[run.task].options, sort_keys=True)])[:8]
        folder = kept / f"{case.kind}-{case.budget:g}-{case.lr:g}-{run.seed}-{run.task}-{size}"
        if not (folder / "done").exists():
            folder.mkdir(parents=True, exist_ok=True)
            others = tuple(map(str, folders)) if case.kind == "disjoint" else ()
            _train(run, plans[run.task], shared, folder, others)
            (folder / "done").touch()
        folders.append(folder)
    return folders


def measure(
    case: Case, plans: Mapping[str, TaskPlan], folders: Sequence[Path], shared: Path, wanted: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Lines of test accuracy: each adapter alone, and each task after merging in each of the `wanted` ways."""
    names, held_out, heads = list(plans), {}, {}
    with tempfile.TemporaryDirectory() as out:
        for run, folder in zip(case.runs(names), folders, strict=True):
            settings, dataset = _task(run, plans[run.task], shared, Path(out), test=True)
            model, tokenizer = load(settings, dataset)
            held_out[run.task] = tasks.make(dataset, tokenizer, settings)
            heads[run.task] = _head(folder)
    merged = _Lora(model, names, folders, case.seed) if case.kind == "lora" else _Sparse(model, names, folders, case.seed)
    parameters = dict(model.named_parameters())
    for combination in wanted:
        for name in names:
            merged.use(combination, name)
            for key, value in heads[name].items():
                parameters[key].data.copy_(value)
            task = held_out[name]
            accuracy = task.evaluate(merged.model, settings.batch_size, torch.device("cpu"))[task.metric]
            yield {"combination": combination, "task": name, "test": accuracy, "trained": merged.trained, "shared": merged.shared}


class _Sparse:
    """The three adapters in one model of sprand."""

    def __init__(self, model: nn.Module, names: Sequence[str], folders: Sequence[Path], seed: int) -> None:
        self.model, self.names, self.seed, self.made = model, names, seed, ""
        for name, folder in zip(names, folders, strict=True):
            sprand.load(model, folder, name=name)
        described = [AdapterFile.read(folder).targets.values() for folder in folders]
        self.trained = sum(target["nnz"] for target in described[0])
        sprand.combine(model, dict.fromkeys(names, 1.0), name="sum", drop_heads=True)
        sources = model._sprand.adapters["sum"].selection["sources"]
        self.shared = sum(source["shared"] for source in sources) / sum(
            target["nnz"] for targets in described for target in targets
        )

    def use(self, combination: str, name: str) -> None:
        """Make one task's adapter, or a combination of all, the active one."""
        if combination == "alone":
            sprand.switch(self.model, name)
            return
        if combination not in self.model._sprand.adapters:
            weights = dict.fromkeys(self.names, 1.0)
            options = {"seed": self.seed} | SPRAND[combination]
            sprand.combine(self.model, weights, name=combination, drop_heads=True, **options)
        sprand.switch(self.model, combination)


class _Lora:
    """The three adapters in one model of PEFT."""

    shared = None

    def __init__(self, model: nn.Module, names: Sequence[str], folders: Sequence[Path], seed: int) -> None:
        import peft

        self.names, self.seed = names, seed
        for number, (name, folder) in enumerate(zip(names, folders, strict=True)):
            tensors, about = _read(folder / "lora.safetensors")
            config = peft.LoraConfig(r=about["rank"], lora_alpha=2 * about["rank"], target_modules=about["layers"])
            if number == 0:
                self.model = peft.get_peft_model(model, config, adapter_name=name)
            else:
                self.model.add_adapter(name, config)
            parameters = dict(self.model.named_parameters())
            for key, value in tensors.items():
                parameters[key.replace(".default.", f".{name}.")].data.copy_(value)
            self.trained = sum(value.numel() for value in tensors.values())

    def use(self, combination: str, name: str) -> None:
        """Make one task's adapter, or a combination of all, the active one."""
        own = "".join(c for c in combination if c.isalnum())
        if combination != "alone" and own not in self.model.peft_config:
            torch.manual_seed(self.seed)
            share = 1 / len(self.names) if combination.startswith("mean") else 1.0
            self.model.add_weighted_adapter(list(self.names), [share] * len(self.names), own, **LORA[combination])
        self.model.set_adapter(name if combination == "alone" else own)


def _train(run: Run, plan: TaskPlan, shared: Path, folder: Path, others: tuple[str, ...]) -> None:
    settings, dataset = _task(run, plan, shared, folder)
    settings = dataclasses.replace(settings, disjoint=others)
    model, tokenizer = load(settings, dataset)
    task = tasks.make(dataset, tokenizer, settings)
    heads = [name for name, _ in model.named_parameters() if name.startswith(tuple(methods.head_names(model)))]
    method = attached(run, model, settings, task, folder)
    torch.manual_seed(run.seed)
    log = Log(folder / "metrics.jsonl", task.metric)
    log.console.quiet = True
    training.train(method, task, settings, torch.device("cpu"), log, before={"loss": float("nan"), task.metric: float("nan")})
    if run.method != "lora":
        sprand.save(model, folder)
        save_file({name: p.data.clone() for name, p in model.named_parameters() if name in heads}, folder / "head.safetensors")
        return
    config = method.model.peft_config["default"]
    about = {"rank": config.r, "layers": sorted(config.target_modules)}
    trained = {name: p.data.clone() for name, p in method.trained.items()}
    lora = {name: value for name, value in trained.items() if ".lora_" in name}
    found = {name: trained[key] for name in heads for key in trained if key not in lora and key.endswith(_last(name))}
    save_file(lora, folder / "lora.safetensors", metadata={"about": json.dumps(about)})
    save_file(found, folder / "head.safetensors")


def _task(run: Run, plan: TaskPlan, shared: Path, out: Path, test: bool = False) -> tuple[Settings, data.Dataset]:
    settings = settings_of(run, plan, shared, out)
    if test:
        settings = dataclasses.replace(settings, eval=shared / "data" / plan.test)
    return settings, data.load(settings)


def _last(name: str) -> str:
    """How PEFT ends the name of a parameter that it trains in full."""
    return f".modules_to_save.default.{name.rpartition('.')[2]}"


def _head(folder: Path) -> dict[str, Tensor]:
    return _read(folder / "head.safetensors")[0]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(file, framework="pt") as content:
        about = json.loads((content.metadata() or {}).get("about", "{}"))
        return {name: content.get_tensor(name) for name in content.keys()}, about  # noqa: SIM118 - not a dict
