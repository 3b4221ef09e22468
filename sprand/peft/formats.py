"""SHiRA and Super-Tuning folders that stock PEFT loads, with the same merged weights as the sprand adapters they are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters.file import CONFIG_FILE, AdapterFile
from ..adapters.file import WEIGHTS_FILE as WEIGHTS
from ..adapters.layout import PREFIX, head_key, modules_of, portable
from ..checkpoint.diff import exact_deltas
from ..checkpoint.edits import EditedParameter, Edits
from ..checkpoint.export import form
from ..checkpoint.shards import Checkpoint
from ..kernels.dtypes import HALVES
from ..layers.sites import Site, weights_of
from .changes import Change

CONFIGS = {"shira": peft.ShiraConfig, "supertuning": peft.SupertuningConfig}
NOT_LINEAR = "is no weight of a plain linear layer, and {} trains nothing else; merge the adapter into its base instead"


def write(folder: Path, to: str, changes: Sequence[Change], heads: Mapping[str, Tensor], **fields: Any) -> list[Path]:
    """Write changes of linear weights as an adapter of another method.

    Args:
        folder: made if it is not there.
        to: a key of `CONFIGS`.
        changes: one for each weight; of linear layers only.
        heads: tensors of modules trained in full, by their keys in the file.
        **fields: further fields of the other method's configuration.

    Returns:
        The files.

    Raises:
        ValueError: The other method cannot hold as many entries of a weight.
    """
    made = _as_shira if to == "shira" else _as_supertuning
    tensors, settings = made([change.exact() for change in changes])
    modules = sorted(change.module_name for change in changes)
    config = CONFIGS[to](**settings, target_modules=modules, inference_mode=True, **fields)
    return write_folder(folder, config, tensors | dict(heads))


def write_folder(folder: Path, config: peft.PeftConfig, tensors: dict[str, Tensor]) -> list[Path]:
    """Write an adapter of PEFT, by the keys that its tensors have in the file, and return its files."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return [folder / WEIGHTS, folder / CONFIG_FILE]


def _of_files(to: str, adapter: AdapterFile, applied: tuple[Checkpoint, Edits], folder: Path) -> list[Path]:
    """A folder for `PeftModel.from_pretrained`."""
    sites = BaseModel.of(applied[0].folder).sites
    linear = {name for name, site in sites.items() if site.parameter == "weight" and isinstance(site.module, nn.Linear)}
    changes = changes_of_files(to, adapter, *applied, linear, NOT_LINEAR.format(to))
    return write(folder, to, changes, heads_of(adapter), **fields_of(adapter))


ABOUT = {
    "shira": "PEFT's SHiRA, which PEFT alone loads: 12 bytes per entry, and padding to the layer with the most",
    "supertuning": "PEFT's Super-Tuning: 8 bytes per entry, and padding to the layer with the largest density",
}
for _name, _help in ABOUT.items():
    form(_name, _help, needs_base=True)(functools.partial(_of_files, _name))


def changes_of_files(
    to: str, adapter: AdapterFile, checkpoint: Checkpoint, edits: Edits, weights: Container[str], otherwise: str
) -> list[Change]:
    """What an adapter changes of each weight of a checkpoint.

    Args:
        to: the form that is written, for messages.
        adapter, checkpoint, edits: as `sprand.checkpoint.export` gives them to a form.
        weights: the names of those that the form can hold, in the model.
        otherwise: what to say of others.

    Raises:
        ValueError: A weight is none of those, or the adapter holds values that are no change of the base.
    """
    changes = []
    for parameter in edits.parameters:
        _check_name(to, parameter, weights, otherwise)
        parameter.apply(checkpoint)
        change = _change_of(parameter)
        if change is None:
            raise ValueError(
                f"{adapter.path} holds frozen entries of {parameter.name} that no change of the base gives exactly, and {to} "
                "stores changes; merge the adapter into its base instead (sprand merge)"
            )
        changes.append(change)
    return changes


def heads_of(adapter: AdapterFile) -> dict[str, Tensor]:
    """What an adapter trained in full, by the keys in a file of PEFT."""
    return {head_key(name): values for name, values in adapter.heads.items()}


def fields_of(adapter: AdapterFile) -> dict[str, Any]:
    """What a configuration of PEFT says of an adapter, whatever its method."""
    return {"modules_to_save": modules_of(adapter.heads) or None, "base_model_name_or_path": portable(adapter.base_model)}


def _check_name(to: str, parameter: EditedParameter, weights: Container[str], otherwise: str) -> None:
    """Prove that a parameter is one of those weights, under the name that the model itself gives it."""
    name, tensors = parameter.name, [edit.stored.name for edit in parameter.edits]
    called = next((tensor for tensor in tensors if tensor in weights), None)
    if name not in weights and called is not None:
        raise ValueError(
            f"{name}: the model of this base calls that weight {called}, and PEFT, which goes by a model's "
            f"own names, would not find it as {to}; merge the adapter into its base instead (sprand merge)"
        )
    if name not in weights:
        raise ValueError(f"{name} {otherwise} (sprand merge)")


def _change_of(parameter: EditedParameter) -> Change | None:
    """The change of a weight whose entries were proven; None where a frozen value is no change of the base."""
    entries, frozen_base = parameter.pending.entries(), parameter.frozen_base
    frozen_deltas, exact = exact_deltas(frozen_base, entries.frozen_values)
    if not exact.all():
        return None
    indices, order = torch.cat([entries.indices, entries.frozen_indices]).sort()
    base = torch.cat([parameter.base, frozen_base])[order]
    deltas = torch.cat([entries.deltas, frozen_deltas])[order]
    return Change(parameter.name, parameter.shape, indices, deltas, base if base.dtype in HALVES else None)


@dataclass(frozen=True)
class BaseModel:
    """The model of a checkpoint, without its values.

    Attributes:
        kind: the class that its configuration names.
        own: its weights by their names in it.
        headless: the same by their names in the model without its head.
    """

    kind: str
    own: dict[str, Site]
    headless: dict[str, Site]

    @property
    def sites(self) -> dict[str, Site]:
        """The weights by all of these names."""
        return self.headless | self.own

    @classmethod
    def of(cls, folder: Path) -> BaseModel:
        """The model of a checkpoint's folder.

        Raises:
            ValueError: No configuration says which model it is.
        """
        model = _model_of(folder)
        return cls(type(model).__name__, weights_of(model), weights_of(model.base_model))


def _model_of(folder: Path) -> nn.Module:
    how = "expected a folder of transformers, whose config.json names the architecture; or call sprand.peft.export_adapter"
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kinds = [getattr(transformers, name) for name in config.architectures or ()]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}: {how} ({' '.join(str(error).split())[:120]})") from None
    if not kinds:
        raise ValueError(f"{folder}: {how}")
    with torch.device("meta"):
        return kinds[0](config)


def _as_shira(changes: Sequence[Change]) -> tuple[dict[str, Tensor], dict[str, object]]:
    rank = max(-(-change.indices.numel() // sum(change.shape)) for change in changes)
    tensors = {}
    for change in changes:
        rows, columns = change.shape
        count = rank * (rows + columns)
        if count > rows * columns:
            raise ValueError(
                f"SHiRA keeps r (in + out) entries of every layer, and with r = {rank} that is {count:,} of the "
                f"{rows * columns:,} that {change.name} has; export to 'supertuning' instead"
            )
        flat, values = _padded(change, count)
        key = f"{PREFIX}{change.module_name}.shira_"
        tensors[f"{key}weight"] = values
        tensors[f"{key}indices"] = torch.stack([flat // columns, flat % columns]).int()
    return tensors, {"r": rank, "mask_type": "random", "random_seed": 0}


def _as_supertuning(changes: Sequence[Change]) -> tuple[dict[str, Tensor], dict[str, object]]:
    changes = [_representable(change) for change in changes]
    densities = [(change.indices.numel() + 0.5) / math.prod(change.shape) for change in changes]
    sparsity = max(0.0, 1.0 - max(densities))
    tensors = {}
    for change in changes:
        count = int(math.prod(change.shape) * (1 - sparsity))
        flat, values = _padded(change, count)
        key = f"{PREFIX}{change.module_name}.supertuning_"
        tensors[f"{key}values"] = values
        tensors[f"{key}indices"] = flat.int()
    return tensors, {"sparsity": sparsity}


def _representable(change: Change) -> Change:
    """Super-Tuning rounds values to the weight's dtype before it adds them: where that loses the sum, take base away first."""
    if change.base is None:
        return change
    merged = change.merged()
    added = change.values.to(change.base.dtype)
    lost = change.base + added != merged
    indices = torch.cat([change.indices, change.indices[lost]])
    values = torch.cat([torch.where(lost, -change.base, added), merged[lost]])
    return replace(change, indices=indices, values=values.float())


def _padded(change: Change, count: int) -> tuple[Tensor, Tensor]:
    missing = count - change.indices.numel()
    flat = torch.cat([change.indices.long(), torch.zeros(missing, dtype=torch.long)])
    return flat, torch.cat([change.values.float(), torch.zeros(missing)])
