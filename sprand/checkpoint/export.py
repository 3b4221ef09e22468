"""Adapters in the forms of other programs: a registry of targets, patches for vLLM, and dense deltas."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.file import AdapterFile, open_adapters
from ..files import described
from ..kernels.dtypes import dtype_name
from .edits import Edits, edits_of
from .patches import patches_of
from .shards import Checkpoint, open_checkpoint
from .tensor_edits import Overwrite

Writer = Callable[..., list[Path]]  # of an AdapterFile, a tuple[Checkpoint, Edits] or None, a folder, and the form's options


@dataclass(frozen=True)
class Form:
    """One form that adapters can be exported to.

    Attributes:
        write: makes the files in a folder from the adapter and, if it was given, its base with the adapter's edits applied.
        help: what it is, in a line.
        needs_base: whether the base checkpoint has to be given.
        options: names of further arguments of `write`.
    """

    write: Writer
    help: str
    needs_base: bool
    options: tuple[str, ...] = ()


FORMS: dict[str, Form] = {}
PATCH_FORMAT = "sprand vllm-patch 2"  # 2 adds base.NAME and the checksum
DENSE_FORMAT = "sprand dense-delta 1"


def form(name: str, help: str, needs_base: bool, options: tuple[str, ...] = ()) -> Callable[[Writer], Writer]:
    """Add a form to those that `export` and `sprand export --to` know."""

    def add(write: Writer) -> Writer:
        FORMS[name] = Form(write, help, needs_base, options)
        return write

    return add


def export(
    path: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[Path]:
    """Write an adapter in another form.

    Args:
        path: folder of the adapter.
        to: a name in `FORMS`.
        out: folder of what is written; files of the same names are replaced.
        base: folder of the base checkpoint, which is proven to be the adapter's.
        **options: of the form.

    Returns:
        The files.

    Raises:
        FileNotFoundError: There is no adapter or no checkpoint.
        ValueError: The form is unknown, lacks an option, needs the base or cannot hold the adapter, or the base is a wrong one.
    """
    if to not in FORMS:
        raise ValueError(f"to: expected one of {', '.join(FORMS)}, got {to!r}")
    for option in options:
        if option not in FORMS[to].options:
            having = [name for name, form in FORMS.items() if option in form.options]
            raise ValueError(f"{option}: {to} has no such option, {' and '.join(having) or 'nor has any form'} has; leave it out")
    if FORMS[to].needs_base and base is None:
        raise ValueError(f"{to} holds values in the names of the checkpoint, not changes: give the base checkpoint (--base)")
    (adapter,) = open_adapters([(path, 1.0)])
    applied = None
    if base is not None:
        checkpoint = open_checkpoint(base)
        applied = checkpoint, edits_of(checkpoint, [adapter])
    folder = Path(out)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FORMS[to].write(adapter, applied, folder, **options)
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise


@form("vllm-patch", "values and flat indices in the names of the checkpoint, the fields of vLLM's CheckpointWeightPatch", True)
def vllm_patch(adapter: AdapterFile, applied: tuple[Checkpoint, Edits] | None, folder: Path) -> list[Path]:
    """`patches.safetensors` with `indices.NAME`, `values.NAME` and, for the way back, `base.NAME`; and `patches.json`."""
    tensors: dict[str, Tensor] = {}
    patches = []
    for patch in patches_of(adapter, *applied):
        name = patch.name
        tensors |= {f"indices.{name}": patch.indices, f"values.{name}": patch.values, f"base.{name}": patch.base}
        shape, nnz = list(patch.shape), patch.values.numel()
        patches.append({"name": name, "shape": shape, "dtype": dtype_name(patch.dtype), "nnz": nnz})
    about = {
        "format": PATCH_FORMAT,
        "adapter_checksum": adapter.checksum,
        "checksum": described.checksum(tensors),
        "patches": patches,
    }
    return _write(folder, "patches", tensors, about)


@form("dense-delta", "one dense float32 tensor of changes per parameter; with --base in the names of the checkpoint", False)
def dense_delta(adapter: AdapterFile, applied: tuple[Checkpoint, Edits] | None, folder: Path) -> list[Path]:
    """`delta.safetensors`, zero where nothing was trained, and `delta.json`; of frozen entries, the difference to the base."""
    whole = [*adapter.heads, *(name for name, target in adapter.targets.items() if "frozen" in target)]
    if applied is None and whole:
        raise ValueError(
            f"{adapter.path} holds {whole[0]} in full or frozen, whose change is known with the base only; give --base"
        )
    if applied is None:
        return _write(folder, "delta", _dense(adapter, folder), {"format": DENSE_FORMAT, "names": "of the model's parameters"})
    tensors: dict[str, Tensor] = {}
    checkpoint, edits = applied
    for name, edit in edits.by_tensor.items():
        dense = torch.zeros(edit.stored.numel)
        for part, first in checkpoint.chunks(name):
            before = part.float()
            edit.apply(part, first)
            dense[first : first + part.numel()] = part.float() - before
        if not isinstance(edit, Overwrite):
            trained = edit.trained
            only = torch.isin(trained.indices, edit.frozen.indices, invert=True)
            dense[trained.indices[only].long()] = trained.values[only].float()
        tensors[name] = dense.view(edit.stored.shape)
    edits.prove()
    tensors |= {name: values.float() for name, values in edits.added.items()}
    return _write(folder, "delta", tensors, {"format": DENSE_FORMAT, "names": "of the checkpoint's tensors"})


def _dense(adapter: AdapterFile, folder: Path) -> dict[str, Tensor]:
    needed = 4 * sum(math.prod(target["shape"]) for target in adapter.targets.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{adapter.path}: its dense deltas take {needed:,} bytes, and {folder} has {free:,} free")
    tensors = {}
    for name, target in adapter.targets.items():
        indices, deltas = adapter.entries(name)
        tensors[name] = torch.zeros(target["shape"])
        tensors[name].view(-1)[indices.long()] = deltas.float()
    return tensors


def _write(folder: Path, name: str, tensors: dict[str, Tensor], about: dict) -> list[Path]:
    weights, text = folder / f"{name}.safetensors", folder / f"{name}.json"
    described.save(weights, {key: value.contiguous() for key, value in tensors.items()}, {"format": "pt"})
    described.write_json(text, about)
    return [weights, text]
