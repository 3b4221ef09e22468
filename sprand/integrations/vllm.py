"""Adapters in vLLM: patches as its checkpoint loader and its sparse weight transfer take them, and switching in a live engine.

    llm = LLM(model=BASE_DIR, worker_extension_cls="sprand.integrations.vllm.WorkerExtension")
    switch(llm, "patches/")  # a folder of `sprand export ADAPTER --to vllm-patch --base BASE_DIR -o patches/`
    llm.generate(...)
    switch(llm, None)  # the base again, bit for bit

What vLLM defines (`vllm.model_executor.model_loader.checkpoint_weight_patch`, vllm-project/vllm#50723): patches in the names and
coordinates of the checkpoint, flat distinct int32 or int64 indices, absolute values without NaN; the model's own loader brings
them to packed and to tensor-parallel weights.

An adapter of whole columns needs none of this: `sprand export ADAPTER --to lora` writes a LoRA, which vLLM serves beside others,
and `vllm_options(folder)` says how to start vLLM for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..adapters.file import AdapterFile
from ..checkpoint.edits import edits_of
from ..checkpoint.export import PATCH_FORMAT
from ..checkpoint.lora_servers import VllmOptions, vllm_options
from ..checkpoint.patches import TensorPatch, patches_of
from ..checkpoint.shards import open_checkpoint
from ..files import described
from ..kernels import host

__all__ = [
    "CheckpointWeightPatch", "SparseWeightPatch", "VllmOptions", "WorkerExtension", "exchange", "patches", "read_patches",
    "sparse_patches", "switch", "vllm_options",
]  # fmt: skip

try:
    from vllm.model_executor.model_loader.checkpoint_weight_patch import CheckpointWeightPatch
except ImportError:

    @dataclass(frozen=True)
    class CheckpointWeightPatch:
        """vLLM's class of this name, field by field, where vLLM is not installed.

        Attributes:
            name, shape, dtype: of the tensor in the checkpoint.
            values: `[n]`, absolute.
            indices: `[n]`, flat, distinct; None where `values` are the whole tensor.
        """

        name: str
        shape: tuple[int, ...]
        dtype: torch.dtype
        values: Tensor
        indices: Tensor | None = None


try:
    from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseWeightPatch
except ImportError:

    @dataclass
    class SparseWeightPatch:
        """What `send_weights` of vLLM's trainer engine `sparse_nccl` takes, where vLLM is not installed.

        Attributes:
            name: of the tensor in the checkpoint.
            indices: `[n]`, int32.
            values: `[n]`, absolute.
            full_shape: of the tensor.
        """

        name: str
        indices: Tensor
        values: Tensor
        full_shape: tuple[int, ...]


def patches(
    adapter: str | os.PathLike[str], base: str | os.PathLike[str], revert: bool = False
) -> Iterator[CheckpointWeightPatch]:
    """What an adapter changes in a checkpoint, for `load_checkpoint_weight_patches(model, patches)`.

    Args:
        adapter: folder of the adapter.
        base: folder of the checkpoint that the engine has loaded. Only tensors that change are read, one at a time.
        revert: the same entries with the values of the checkpoint, which take the adapter out again.

    Raises:
        FileNotFoundError: No adapter or no checkpoint is at a path.
        ValueError: The adapter is damaged, for another base (known after the last patch), or has tensors that the base has not.
    """
    file, checkpoint = AdapterFile.read(adapter), open_checkpoint(base)
    for patch in patches_of(file, checkpoint, edits_of(checkpoint, [file])):
        yield _checkpoint_patch(patch, patch.base if revert else patch.values)


def sparse_patches(given: Iterable[CheckpointWeightPatch | TensorPatch]) -> list[SparseWeightPatch]:
    """The same for the `sparse_nccl` backend of `WeightTransferConfig`: `engine.send_weights(sparse_patches(...))`.

    Args:
        given: from `patches`, or a `sprand.serving.DeltaSync`'s `patches()`.

    Raises:
        ValueError: A tensor has 2**31 entries or more; that backend sends int32 indices.
    """
    made = []
    for patch in given:
        if patch.indices.dtype != torch.int32:
            raise ValueError(
                f"{patch.name} {list(patch.shape)}: sparse_nccl sends int32 indices, and this tensor has too many entries for "
                "them; use load_checkpoint_weight_patches"
            )
        made.append(SparseWeightPatch(patch.name, patch.indices, patch.values, tuple(patch.shape)))
    return made


def switch(llm: Any, folder: str | os.PathLike[str] | None) -> None:
    """Let a live engine hold an adapter, or None for its base. Its cache of prefixes is dropped, which the old weights made.

    Args:
        llm: `vllm.LLM` made with `worker_extension_cls="sprand.integrations.vllm.WorkerExtension"`, with no request running.
        folder: written by `sprand export --to vllm-patch`, at the same place for every worker.

    Raises:
        FileNotFoundError: The folder holds no patches.
        ValueError: The patches are damaged, or of another format. The engine is as it was.
        RuntimeError: Requests are running, or the workers hold different adapters. Also when vLLM's loader fails, which leaves
            a worker in between: restart the engine then, as vLLM asks for.
    """
    if folder is not None:
        read_patches(folder)
    if llm.reset_prefix_cache() is False:
        raise RuntimeError("switch: vLLM could not drop its cache of prefixes: requests are running; wait until they are done")
    held = llm.collective_rpc("sprand_switch", args=(None if folder is None else os.path.abspath(folder),))
    if len(set(held)) > 1:
        raise RuntimeError(f"switch: the workers hold different adapters now ({sorted(set(map(str, held)))}); restart the engine")


class WorkerExtension:
    """Mixed into vLLM's worker by its option `worker_extension_cls`; keeps what was patched, to take it out again."""

    def sprand_switch(self, folder: str | None) -> str | None:
        """Put the base back where the held adapter is, and write another one, by one pass of the model's loader.

        Returns:
            The checksum of the adapter now held, or None.
        """
        from vllm.model_executor.model_loader.checkpoint_weight_patch import load_checkpoint_weight_patches

        held = getattr(self, "_sprand_held", {})
        new, checksum = read_patches(folder) if folder is not None else ({}, None)
        merged = list(exchange(held, new))
        if merged:
            load_checkpoint_weight_patches(self.get_model(), merged, validate_unique_indices=False)
        self._sprand_held = new
        return checksum


def read_patches(folder: str | os.PathLike[str]) -> tuple[dict[str, TensorPatch], str]:
    """The patches of a folder written by `sprand export --to vllm-patch`, by tensor, and their checksum.

    Raises:
        FileNotFoundError: The folder holds no patches.
        ValueError: The patches are damaged, or of another format.
    """
    weights, text = Path(folder, "patches.safetensors"), Path(folder, "patches.json")
    for file in (weights, text):
        if not file.is_file():
            raise FileNotFoundError(f"no patches at {folder}: expected {file.name}, as `sprand export --to vllm-patch` writes it")
    try:
        about, tensors = json.loads(text.read_text(encoding="utf-8")), load_file(weights)
        written_as, checksum = about["format"], about.get("checksum")
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{folder} is damaged ({error}); export the adapter again") from error
    if written_as != PATCH_FORMAT:
        raise ValueError(f"{folder} has the format {written_as!r}, expected {PATCH_FORMAT!r}; export the adapter again")
    if checksum != described.checksum(tensors):
        raise ValueError(f"{folder} is damaged: its values do not match their checksum; export the adapter again")
    found = {}
    for entry in about["patches"]:
        name, dtype = entry["name"], getattr(torch, entry["dtype"])
        parts = {part: tensors[f"{part}.{name}"] for part in ("indices", "values", "base")}
        found[name] = TensorPatch(name, tuple(entry["shape"]), dtype, **parts)
    return found, checksum


def exchange(old: dict[str, TensorPatch], new: dict[str, TensorPatch]) -> Iterator[CheckpointWeightPatch]:
    """The patches that lead from one adapter to another: the base where only the old one is, and the values of the new one."""
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        if after is None:
            yield _checkpoint_patch(before, before.base)
        elif before is None:
            yield _checkpoint_patch(after, after.values)
        else:
            union, (was, now) = host.merge_indices([before.indices, after.indices])
            values = torch.empty(union.shape, dtype=after.dtype)
            values[was], values[now] = before.base, after.values
            yield CheckpointWeightPatch(name, after.shape, after.dtype, values, union)


def _checkpoint_patch(patch: TensorPatch, values: Tensor) -> CheckpointWeightPatch:
    return CheckpointWeightPatch(patch.name, patch.shape, patch.dtype, values.contiguous(), patch.indices.contiguous())
