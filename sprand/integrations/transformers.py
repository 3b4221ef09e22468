"""sprand in a Hugging Face `Trainer`: its optimizer, exact resume beside clean checkpoints, and what is logged.

    args = TrainingArguments(...)
    trainer = Trainer(
        sprand.apply(model, density=0.01), args, train_dataset=...,
        optimizer_cls_and_kwargs=sparse_adamw(args),  # optional: any optimizer is correct
        callbacks=[SparseCheckpointCallback()],  # checkpoints are plain merged models, with the adapter in a folder beside
    )
    trainer.add_callback(VisibleShareCallback(trainer))
    trainer.add_callback(LearningRateCallback())  # says that a rate is too high, and which one to try

Models of `sprand.peft` need no callback for their checkpoints.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters.file import AdapterFile
from ..adapters.model import write
from ..adapters.save_and_load import save
from ..adapters.state import state_of, tensor_names
from ..adapters.summary import visible_share
from ..files import described, states
from ..layers.entries import Entries
from ..layers.module import sparse_modules
from ..layers.sites import Site, sites_of
from ..layers.units import Pattern, index_dtype
from ..selection import pattern
from ..training.divergence import is_worth_a_look, rate_to_try, stays_above_start
from ..training.dynamic import DynamicMask
from ..training.optim import SparseAdamW

MASK_FILE, MASK_KIND = "dynamic_mask.safetensors", "sprand.DynamicMask 1"
ADAPTER_FOLDER, ENTRIES_FILE, KEY = "sprand", "entries.safetensors", "sprand"


def sparse_adamw(args: TrainingArguments, **options: Any) -> tuple[type[SparseAdamW], dict[str, Any]]:
    """`SparseAdamW` as a `Trainer` takes it: `Trainer(..., optimizer_cls_and_kwargs=sparse_adamw(args))`.

    The trainer makes the parameter groups, as for its own optimizers. Where a trainer's constructor does not take it (TRL's
    for DPO and GRPO), set it before training: `trainer.optimizer_cls_and_kwargs = sparse_adamw(args)`.

    Args:
        args: learning rate, betas, epsilon and weight decay are read from here.
        **options: further options of `SparseAdamW`; `max_grad_norm` clips in the fused step (set `args.max_grad_norm=0` then).

    Returns:
        The optimizer's class and its keywords.

    Raises:
        ValueError: An option is given that comes from `args`.
    """
    given = {"lr": "learning_rate", "betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
    for name in options.keys() & given.keys():
        raise ValueError(f"sparse_adamw: expected {name} in the training arguments; set {given[name]} there")
    betas = args.adam_beta1, args.adam_beta2
    return SparseAdamW, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon} | options


class VisibleShareCallback(TrainerCallback):
    """Logs `visible_share` with each training loss: the share of trained entries whose weight has changed at all.

    `trainer.add_callback(VisibleShareCallback(trainer))`. In a plain loop call `sprand.visible_share(model)`.

    Args:
        trainer: its log takes the number, so that every reporter gets it.

    Raises:
        ValueError: The trainer's model has no trained entries.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        visible_share(trainer.model)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Follow a log of the training loss by one of the share."""
        if "loss" in logs:
            self.trainer.log({"visible_share": visible_share(self.trainer.model)})


class LearningRateCallback(TrainerCallback):
    """Says that a learning rate is too high, and which one to try: `Trainer(model, ..., callbacks=[LearningRateCallback()])`.

    It ends the training with an error where the loss, or the norm of the gradient, is not finite. After half of the steps and at
    the end it warns where each of the last quarter of the logged losses lies above the first one, by more than that quarter
    is wide; it takes 20 losses to say so. Any model will do, and nothing that is trained changes.

    It lets the log show losses that are not finite, which transformers hides by default (`args.logging_nan_inf_filter`).
    """

    _looked = 0  # at which step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have losses logged as they are."""
        args.logging_nan_inf_filter = False
        self._looked = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Look at a log of the training loss.

        Raises:
            RuntimeError: The loss or the norm of the gradient is not finite; under fp16 norms may be so, and the step is skipped.
        """
        if "loss" not in logs:
            return
        for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
            value = float(logs.get(name, 0.0))
            if not math.isfinite(value) and not (args.fp16 and name == "grad_norm"):
                raise RuntimeError(
                    f"LearningRateCallback: {what} became {value} by step {state.global_step}, and the learning rate "
                    f"({args.learning_rate:g}) may be too high; try learning_rate={rate_to_try(args.learning_rate):g}"
                )
        if is_worth_a_look(state.global_step, self._looked, state.max_steps):
            self._warn(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the losses of the whole training, where its last step logged none."""
        if self._looked < state.global_step:
            self._warn(args, state)

    def _warn(self, args: TrainingArguments, state: TrainerState) -> None:
        self._looked = state.global_step
        said = stays_above_start([line["loss"] for line in state.log_history if "loss" in line])
        if said is not None and state.is_world_process_zero:
            warnings.warn(
                f"LearningRateCallback: {said}. The learning rate ({args.learning_rate:g}) may be too high: try "
                f"learning_rate={rate_to_try(args.learning_rate):g}",
                stacklevel=2,
            )


class SparseCheckpointCallback(TrainerCallback):
    """Makes the checkpoints of a model of `sprand.apply` plain merged models, from which training resumes to the bit.

    A checkpoint is what the model's class saves and loads, trained values in place and no tensors of sprand. Its folder
    `sprand` holds the adapter (`sprand.load(base, "checkpoint-8/sprand")`) and what else a resume needs; the best
    model, with `load_best_model_at_end`, gets its entries back from there.

    Without this callback checkpoints hold the tensors of sprand among the model's own: a resume is exact as well.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the tensors of sprand out of what the model saves.

        Raises:
            ValueError: The model has no trained entries, its checkpoints hold them already, or it could not load them.
        """
        model = kwargs["model"]
        if hasattr(model, "peft_config"):
            raise ValueError("SparseCheckpointCallback: expected a model of sprand.apply; one of PEFT needs no callback")
        if args.fsdp or args.deepspeed:
            raise ValueError("SparseCheckpointCallback: FSDP and DeepSpeed write checkpoints of their own; use sprand.peft there")
        _refuse_compiled(model)
        state_of(model).takes_plain_states = True
        saved = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        _refuse_others(model, saved)
        for module in saved:
            own = chain.from_iterable(tensor_names(module))
            module._keys_to_ignore_on_save = {*(module._keys_to_ignore_on_save or ()), *own}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Where a training is resumed, give the model the entries of the checkpoint that the trainer has just loaded.

        Raises:
            FileNotFoundError: The checkpoint has no entries.
            ValueError: The files are of another checkpoint, or of other weights than the model trains.
        """
        model = kwargs["model"]
        self.on_init_end(args, state, control, model=model)
        if state.global_step:
            files = _of_resumed(args, state, f"{ADAPTER_FOLDER}/{ENTRIES_FILE}", type(self).__name__)
            _restore(model, [file.parent for file in files])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the adapter, and what a resume needs, into the checkpoint that the trainer has just written.

        Raises:
            FileNotFoundError: The folder holds no such checkpoint.
        """
        if not state.is_world_process_zero:
            return
        folder = _folder(args, state)
        if not folder.is_dir():
            raise FileNotFoundError(f"SparseCheckpointCallback: expected the checkpoint of this step at {folder}")
        model, folder = kwargs["model"], folder / ADAPTER_FOLDER
        save(model, folder)
        tensors = {}
        for site in sites_of(model):
            entries = site.entries
            tensors |= {f"indices.{site.name}": entries.indices.cpu(), f"base.{site.name}": entries.base.cpu()}
        described.write(folder / ENTRIES_FILE, KEY, {}, tensors)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Where the trainer has just loaded the best model, give it its entries."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _restore(kwargs["model"], [Path(state.best_model_checkpoint) / ADAPTER_FOLDER])


class DynamicMaskCallback(TrainerCallback):
    """Moves the mask of the model that a `Trainer` trains.

    `Trainer(model, ..., callbacks=[DynamicMaskCallback(sprand.DynamicMask(model, every=100))])`: the mask needs no optimizer,
    it is given the trainer's. Each checkpoint also holds `dynamic_mask.safetensors`, from which a resumed training
    goes on to the bit.

    Args:
        mask: made for the trainer's model.
    """

    def __init__(self, mask: DynamicMask) -> None:
        self.mask = mask
        self._resumed: Path | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the trainer's optimizer and, where a training is resumed, look for the mask's progress.

        Raises:
            FileNotFoundError: The checkpoint has no mask.
        """
        self.mask.bind(kwargs["optimizer"])
        self._resumed = _of_resumed(args, state, MASK_FILE, type(self).__name__)[0] if state.global_step else None

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Where a training is resumed, go on from the mask's progress; the model holds the entries of the checkpoint by now."""
        if self._resumed is not None:
            self.mask.load_state_dict(states.read(self._resumed, MASK_KIND))
            self._resumed = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step, and change the mask if it is time."""
        self.mask.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the mask's progress into the checkpoint that the trainer has just written."""
        folder = _folder(args, state)
        if not state.is_world_process_zero or not folder.is_dir():
            return
        states.write(folder / MASK_FILE, MASK_KIND, self.mask.state_dict())


def _refuse_compiled(model: nn.Module) -> None:
    """Prove that checkpoints have the names of the model itself."""
    compiled = [name for name, module in model.named_modules() if "_orig_mod" in module._modules]
    if compiled:
        raise ValueError(
            f"SparseCheckpointCallback: torch.compile has wrapped {compiled[0] or 'the model'}, and checkpoints would hold names "
            "that no model loads; give the Trainer the model itself and torch_compile=True, or compile in place, module.compile()"
        )


def _refuse_others(model: nn.Module, saved: Sequence[PreTrainedModel]) -> None:
    """Prove that a model of models (of sentence-transformers, say) saves no entries in parts of its own."""
    inside = {id(part) for module in saved for part in module.modules()}
    others = [name for name, module in sparse_modules(model) if id(module) not in inside]
    if others and hasattr(model, "save_pretrained"):
        raise ValueError(
            f"SparseCheckpointCallback: {type(model).__name__} could not load its own checkpoints with trained entries of "
            f"{others[0]} in them, which is in no transformers model; leave it out by exclude_modules=[{others[0]!r}], or train "
            "it in full by modules_to_save"
        )


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _of_resumed(args: TrainingArguments, state: TrainerState, name: str, callback: str) -> list[Path]:
    """The files of this name in the folders that a resumed training may come from."""
    folders = [_folder(args, state)]
    if isinstance(args.resume_from_checkpoint, str):
        folders.append(Path(args.resume_from_checkpoint))
    files = [folder / name for folder in folders if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{callback}: training goes on from step {state.global_step}, but there is no {name} in "
            f"{' or '.join(map(str, folders))}; if the checkpoint is elsewhere, set args.resume_from_checkpoint to it"
        )
    return files


def _restore(model: nn.Module, folders: list[Path]) -> None:
    """Give the model the entries of the folder whose trained values its weights hold."""
    sites = sites_of(model)
    for folder in folders:
        adapter, (_, tensors) = AdapterFile.read(folder), described.read(folder / ENTRIES_FILE, KEY, "checkpoint")
        stored = [_stored(site, adapter, tensors) for site in sites]
        held = [entries.pattern.gather(site.weight.data) for site, entries in zip(sites, stored, strict=True)]
        if all(torch.equal(values, entries.values()) for values, entries in zip(held, stored, strict=True)):
            for site, entries in zip(sites, stored, strict=True):
                _take(site, entries)
            write(model)
            return
    raise ValueError(
        f"SparseCheckpointCallback: the weights that the trainer loaded are not those of {' or '.join(map(str, folders))}; set "
        "args.resume_from_checkpoint to the checkpoint that training goes on from"
    )


def _stored(site: Site, adapter: AdapterFile, tensors: dict[str, Tensor]) -> Entries:
    """The entries of a weight in a checkpoint, on the weight's device.

    Raises:
        ValueError: They are not as many as the weight trains, or of other dtypes.
    """
    own, name = site.entries, site.name
    values = (adapter.delta(name), tensors.get(f"indices.{name}"), tensors.get(f"base.{name}"))
    kinds = [None if value is None else (list(value.shape), value.dtype) for value in values]
    nnz = own.delta.numel()
    if kinds != [([nnz], dtype) for dtype in (own.delta.dtype, index_dtype(site.numel), own.base.dtype)]:
        raise ValueError(
            f"SparseCheckpointCallback: expected {nnz} entries of {name} in {adapter.path}, got {kinds}; make the model by the "
            "same sprand.apply"
        )
    delta, indices, base = (value.to(site.weight.device) for value in values)
    pattern.check_indices(f"{adapter.path}: {name}", indices, site.numel)
    return Entries(delta, Pattern.of(indices, site.units), base, own.scale)


def _take(site: Site, entries: Entries) -> None:
    """Let every module that holds a weight have these entries."""
    for module, parameter in site.owners:
        target = module.sparse_target(parameter)
        tensors = {target.delta: entries.delta, target.indices: entries.pattern.chosen, target.base: entries.base}
        module.load_state_dict(tensors, strict=False)
