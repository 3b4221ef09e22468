"""Dynamic masks in a Hugging Face `Trainer`: a callback that moves the mask after each step and keeps it in checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..dynamic import DynamicMask

MASK_FILE = "dynamic_mask.pt"


class DynamicMaskCallback(TrainerCallback):
    """Moves the mask of the model that a `Trainer` trains.

    `Trainer(model, ..., callbacks=[DynamicMaskCallback(sprand.DynamicMask(model, every=100))])`: the mask needs no optimizer,
    it is given the trainer's. Each checkpoint also holds `dynamic_mask.pt`, from which a resumed training goes on to the bit.

    Args:
        mask: made for the trainer's model.
    """

    def __init__(self, mask: DynamicMask) -> None:
        self.mask = mask

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the trainer's optimizer and, where a training is resumed, the mask's progress.

        Raises:
            FileNotFoundError: the checkpoint has no mask.
        """
        self.mask.bind(kwargs["optimizer"])
        if state.global_step == 0:
            return
        folders = [_folder(args, state)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.append(Path(args.resume_from_checkpoint))
        found = [folder / MASK_FILE for folder in folders if (folder / MASK_FILE).is_file()]
        if not found:
            raise FileNotFoundError(
                f"DynamicMaskCallback: training goes on from step {state.global_step}, but there is no {MASK_FILE} in "
                f"{' or '.join(map(str, folders))}; if the checkpoint is elsewhere, set args.resume_from_checkpoint to it"
            )
        self.mask.load_state_dict(torch.load(found[0], map_location="cpu", weights_only=True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step, and change the mask if it is time."""
        self.mask.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the mask's progress into the checkpoint that the trainer has just written."""
        folder = _folder(args, state)
        if not state.is_world_process_zero or not folder.is_dir():
            return
        unfinished = folder / f"{MASK_FILE}.unfinished"
        torch.save(self.mask.state_dict(), unfinished)
        os.replace(unfinished, folder / MASK_FILE)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
