"""The methods a run trains with: sprand, and beside it LoRA, all weights, or the head alone, on the same model and data."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import sprand

from ...adapters.disjoint import selection_without, taken_by
from ...adapters.file import AdapterFile
from ...layers.sites import sites_of
from ...peft import SprandConfig
from ...selection.pattern import RANDOM_STRATEGIES
from ...selection.rules import DEFAULT_DENSITY
from ...selection.strategies import STRATEGIES
from ...training.rates import suggest_lr
from .. import CliError
from ..files import failing_in_words
from .models import beside_text, head_names
from .rows import limited
from .settings import Settings, peer_rate
from .tasks import Task

# What a draw of both doors depends on.
DRAWN_BY = (
    "density", "budget", "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "strategy", "layout",
    "seed",
)  # fmt: skip


@dataclasses.dataclass
class Method:
    """A model made ready to train.

    Attributes:
        name: "sprand", "lora", "full" or "head".
        model: the model to call; for LoRA, PEFT's wrapper.
        trained: the parameters that train, by name.
        optimizer: over them; AdamW in each case.
        lr: its highest learning rate.
        note: what the table says beside the name.
    """

    name: str
    model: nn.Module
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr: float
    note: str = ""

    @property
    def count(self) -> int:
        """How many weights train, a new head's included."""
        return sum(p.numel() for p in self.trained.values())


def chosen(model: nn.Module, settings: Settings, task: Task, kept: Path | None = None) -> sprand.Mask | None:
    """The entries to train where they are given, scored on the training rows, or apart from others; None for a plain draw.

    Args:
        model: as it was loaded; it is left as it is.
        settings: the options.
        task: its training rows are what strategies calibrate on.
        kept: the mask of the run that is resumed.

    Raises:
        CliError: The options fit no weight of this model, or the mask is another run's.
    """
    drawn = settings.strategy in RANDOM_STRATEGIES
    with failing_in_words():
        if settings.start is not None:
            return None
        if settings.mask is not None:
            return sprand.Mask.load(settings.mask)
        if drawn and not (settings.disjoint or settings.preserve_zeros):
            return None
        if kept is None:
            return selected(model, settings, task)
        mask, config = sprand.Mask.load(kept), sparse_config(settings, model)
        asked = selection_without(config, taken_by(model, settings.disjoint or None))
    _prove_same(mask, asked, kept)
    return mask


def selected(model: nn.Module, settings: Settings, task: Task | None) -> sprand.Mask:
    """The entries that the options choose.

    Args:
        model: as it was loaded; it is left as it is.
        settings: the options.
        task: its training rows are what strategies calibrate on; None where no rows are given.

    Raises:
        ValueError: The options fit no weight of this model.
        FileNotFoundError: There is no adapter of those to keep apart from.
    """
    config = sparse_config(settings, model)
    scored = settings.strategy in STRATEGIES and task is not None
    rows = calibration(settings, task) if scored else {}
    return sprand.select(model, config, disjoint=settings.disjoint or None, **rows)


def sparse(model: nn.Module, settings: Settings, mask: sprand.Mask | None) -> Method:
    """Entries of the model's own weights, as a PEFT method.

    Args:
        model: changed in place.
        settings: the options.
        mask: the entries, or None for a random draw.

    Raises:
        CliError: The options fit no weight of this model.
    """
    heads = head_names(model) or None
    with failing_in_words():
        if settings.start is not None:
            adapter = AdapterFile.read(settings.start).path
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        elif mask is not None:
            config = SprandConfig(mask=mask, modules_to_save=heads, seed=settings.seed)
            model = get_peft_model(model, config)
        else:
            asked = sparse_config(settings, model)
            config = SprandConfig(**{name: getattr(asked, name) for name in DRAWN_BY})
            model = get_peft_model(model, config)
    targets = mask.shapes.values() if mask is not None else [site.shape for site in sites_of(model)]
    return tuned(model, settings, {name: p for name, p in model.named_parameters() if p.requires_grad}, targets)


def tuned(model: nn.Module, settings: Settings, trained: dict[str, nn.Parameter], targets: Iterable[Sequence[int]]) -> Method:
    """A model whose entries are chosen, of targets of these shapes, with its rate and optimizer."""
    density = sum(site.entries.pattern.nnz for site in sites_of(model)) / sum(math.prod(shape) for shape in targets)
    lr = settings.lr or suggest_lr(model, density=density)
    optimizer = sprand.SparseAdamW(model, lr=lr, weight_decay=settings.weight_decay)
    return Method("sprand", model, trained, optimizer, lr, f"{density:.2%} of the targets")


def _prove_same(mask: sprand.Mask, selection: dict[str, Any] | None, file: Path) -> None:
    asked = json.loads(json.dumps(selection))
    if mask.selection != asked:
        raise CliError(
            f"--resume: {file} was chosen by {mask.selection}, here {asked} is asked for; begin anew with --overwrite."
        )


def sparse_config(settings: Settings, model: nn.Module) -> sprand.SparseConfig:
    """What the options ask to train of a model: of one that sees pictures as well, what text goes through.

    Raises:
        ValueError: An option is out of range.
    """
    fields = settings.sparse_fields() | {"modules_to_save": head_names(model) or None}
    if not settings.target_modules:
        fields["exclude_modules"] = beside_text(model)
    if not settings.sparta:
        return sprand.SparseConfig(**fields)
    density = fields.pop("density", DEFAULT_DENSITY)
    return sprand.SparseConfig.sparta(1 - density, **fields)


def calibration(settings: Settings, task: Task) -> dict[str, Any]:
    """What `sprand.apply` and `sprand.select` need to score entries on the training rows of a task."""
    size = settings.batch_size
    rows = limited(task.train, settings.calibration_examples, random.Random(settings.seed))
    memory = settings.calibration_memory

    def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        total, terms, _ = task.loss(model, batch)
        return total / max(1, terms)

    return {
        "data": [task.collate(rows[start : start + size]) for start in range(0, len(rows), size)],
        "loss_fn": mean_loss,
        "calibration_examples": settings.calibration_examples,
        "calibration_memory": memory if memory == "auto" else int(memory),
    }


def target_names(model: nn.Module) -> list[str]:
    """The modules that sprand trains entries of: what LoRA is compared on."""
    return list(dict.fromkeys(site.name.rpartition(".")[0] for site in sites_of(model)))


def peer(name: str, model: nn.Module, settings: Settings, targets: list[str], count: int) -> Method:
    """A method to compare with, of the same model.

    Args:
        name: "lora", "full" or "head".
        model: a fresh copy of the model.
        settings: learning rates and weight decay.
        targets: names of the modules that LoRA adapts.
        count: trained weights to match; LoRA takes the nearest rank (alpha is twice the rank).

    Raises:
        CliError: The model has no head, or no linear layer for LoRA.
    """
    lr = dict(settings.compare_lr).get(name) or peer_rate(name, width_of(model))
    heads, note = head_names(model), ""
    if name == "lora":
        model, note = _with_lora(model, targets, count, heads)
    elif name == "head":
        parts = [model.get_submodule(head) for head in heads] or [_output_embeddings(model)]
        model.requires_grad_(False)
        for part in parts:
            part.requires_grad_(True)
        note = "" if heads else "output embedding"
    else:
        model.requires_grad_(True)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=settings.weight_decay, fused=True)
    return Method(name, model, trained, optimizer, lr, note)


def width_of(model: nn.Module) -> int:
    """The hidden size of a Hugging Face model; of another, the most frequent width of its linears' inputs.

    Raises:
        CliError: The model has neither a hidden size nor a linear layer.
    """
    config = getattr(model, "config", None)
    named = getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0) or getattr(config, "d_model", 0)
    if named:
        return int(named)
    widths = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    if not widths:
        raise CliError("--compare: the model has no hidden_size in its config and no linear layer; give --compare-lr.")
    return max(set(widths), key=widths.count)


def adapter_bytes(method: Method, directory: Path) -> int:
    """The bytes that a method's result takes on disk: its adapter, or the weights it changed."""
    if method.name == "sprand":
        return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if method.name == "lora":
        with tempfile.TemporaryDirectory() as folder:
            method.model.save_pretrained(folder, save_embedding_layers=False)
            return sum(path.stat().st_size for path in Path(folder).glob("adapter_*"))
    return sum(p.numel() * p.element_size() for p in method.trained.values())


def _with_lora(model: nn.Module, targets: list[str], count: int, heads: list[str]) -> tuple[nn.Module, str]:
    per_rank = 0
    for name in targets:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            per_rank += module.in_features + module.out_features
    if not per_rank:
        raise CliError("--compare lora: none of the targeted modules is a linear layer.")
    head = sum(p.numel() for name in heads for p in model.get_submodule(name).parameters())
    rank = max(1, round((count - head) / per_rank))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=heads or None)
    return get_peft_model(model, config), f"rank {rank}"


def _output_embeddings(model: nn.Module) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise CliError("--compare head: this model has no head by the names that Hugging Face gives.")
    return head
