"""The three promises, checked on the model just trained: reloading, unmerging and merging are exact."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import sprand

from .. import TrainingFailed
from .tasks import Task, logits_of


def check(trained: nn.Module, fresh: nn.Module, adapter: Path, task: Task, device: torch.device) -> list[str]:
    """Check a trained model against its saved adapter and a fresh copy of its base; the trained one is merged by this.

    Args:
        trained: the PEFT model, its entries still attached.
        fresh: the base model, loaded anew.
        adapter: what was saved of `trained`.
        task: its evaluation rows are the input.
        device: where both models are.

    Returns:
        What held, a sentence each.

    Raises:
        TrainingFailed: One of the promises does not hold, which is a bug in sprand.
    """
    batch = {k: v.to(device) for k, v in task.collate(task.eval[:32]).items() if k != "labels"}
    base = {name: value.clone() for name, value in fresh.state_dict().items()}
    expected = _outputs(trained, batch)
    sprand.load(fresh, adapter)
    said = [_held("loaded into a fresh model, the adapter gives equal outputs", torch.equal(_outputs(fresh, batch), expected))]
    sprand.unmerge(fresh)
    same = base.keys() == fresh.state_dict().keys() and all(torch.equal(base[name], v) for name, v in fresh.state_dict().items())
    said.append(_held("unmerged, every weight equals the base's", same))
    trained = trained.merge_and_unload()
    plain = base.keys() == trained.state_dict().keys()
    said.append(
        _held("merged into a plain model, the outputs are equal", plain and torch.equal(_outputs(trained, batch), expected))
    )
    return said


@torch.no_grad()
def _outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    return logits_of(model, batch)


def _held(sentence: str, true: bool) -> str:
    if not true:
        raise TrainingFailed(
            f"This should hold and does not: {sentence} (bit for bit). Please report it, with the output of sprand doctor."
        )
    return f"{sentence} (torch.equal)"
