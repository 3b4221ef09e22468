"""The promises, checked on the model just trained: reloading, unmerging and merging are exact, in memory and on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sprand

from ...checkpoint.merge import merge
from ...layers import sharding
from .. import CliError, TrainingFailed, ranks
from ..files import folder_of, reason_of
from . import models
from .measures import logits_of
from .tasks import Task

Load = Callable[..., tuple[nn.Module, Any]]


def check(trained: nn.Module, adapter: Path, base: str, load: Load, task: Task, device: torch.device) -> list[str]:
    """Check a trained model against its saved adapter and fresh copies of its base; the trained one is merged by this.

    Args:
        trained: the PEFT model, its entries still attached.
        adapter: what was saved of `trained`.
        base: the checkpoint it was trained from: a folder, or a name on the Hub.
        load: loads such a checkpoint as that of `trained` was loaded, onto `device`.
        task: its evaluation rows are the input.
        device: where the models are.

    Returns:
        What held, a sentence each; of several processes the first one looks, and the others have nothing to say.

    Raises:
        TrainingFailed: One of the promises does not hold, which is a bug in sprand.
    """
    batch = {k: v.to(device) for k, v in task.collate(task.eval[:32]).items() if k != "labels"}
    expected = _outputs(trained, batch)  # of a sharded model by all processes together
    if not ranks.is_first():
        return []
    fresh = load(base)[0]
    weights = {name: value.clone() for name, value in fresh.state_dict().items()}
    fresh, is_packed = models.attached(fresh, adapter), models.is_packed(trained)
    said = [_held("loaded into a fresh model, the adapter gives equal outputs", torch.equal(_outputs(fresh, batch), expected))]
    if is_packed:
        return [*said, _merged_on_disk(adapter, base, load, batch, expected, is_packed)]
    sprand.unmerge(fresh)
    now = fresh.state_dict()
    same = weights.keys() == now.keys() and all(torch.equal(weights[name], value) for name, value in now.items())
    said.append(_held("unmerged, every weight equals the base's", same))
    if sharding.kind_of(trained) is None:
        trained = trained.merge_and_unload()
        plain = weights.keys() == trained.state_dict().keys()
        same = plain and torch.equal(_outputs(trained, batch), expected)
        said.append(_held("merged into a plain model, the outputs are equal", same))
    return [*said, _merged_on_disk(adapter, base, load, batch, expected)]


def _merged_on_disk(
    adapter: Path, base: str, load: Load, batch: dict[str, Tensor], expected: Tensor, is_packed: bool = False
) -> str:
    """What holds of the checkpoint that `sprand merge` writes; it is removed again."""
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=adapter.parent) as place:
        folder = Path(place) / "model"
        try:
            merge(folder_of(base), [(adapter, 1.0)], folder, revertible=False)
        except (CliError, OSError, ValueError) as error:
            return f"sprand merge was not compared: {reason_of(error)}"
        model = load(str(folder), True)[0]
        outputs, used, stored = _outputs(model, batch), models.dtype_of(model), models.stored_dtype(folder)
    if is_packed:
        apart = (outputs - expected).abs().max().item()
        return (
            f"sprand merge writes the entries into the checkpoint as it is stored ({stored}), whose other weights are not "
            f"packed: the outputs differ by {apart:.2g}"
        )
    if used == stored:
        return _held("loaded from the checkpoint that sprand merge writes, the outputs are equal", torch.equal(outputs, expected))
    apart = (outputs - expected).abs().max().item()
    return f"trained in {used} and merged by sprand merge into {stored}, entries are rounded: the outputs differ by {apart:.2g}"


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
