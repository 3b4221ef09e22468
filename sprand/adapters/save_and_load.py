"""Adapters on disk: values, a seed or indices, and a fingerprint of the base they were trained on.

A folder holds `adapter_model.safetensors`, which is complete by itself (its header carries the description as JSON),
and `adapter_config.json`, by which PEFT loads it. What PEFT's `save_pretrained` writes is loaded alike. Saving replaces the
first file in one atomic step, so that a crash or a full disk leaves the old adapter. Loading proves everything before it
changes a weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.dtypes import dtype_name
from ..layers import offload, sharding
from ..layers.sites import Site, named_parameters, sites_of
from ..layers.units import Pattern, Units
from ..selection import pattern
from ..selection.config import SparseConfig
from . import replaced
from .architecture import architecture_of
from .attaching import add
from .file import AdapterFile, draw, finite
from .fingerprint import DTYPES, described_axis
from .frozen import Frozen
from .in_full import buffers_of, changed, first_of, put_buffers, refuse_unknown
from .layout import modules_of
from .model import disabled, switch, write
from .state import Adapter, State, known_state, state_of, whole_tensors
from .trained import Trained
from .waiting import found, refuse_waiting


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the active adapter to a folder: 4 bytes per trained weight for a random pattern, 8 for another, 4 and 4 per column.

    Of a model sharded by FSDP or ZeRO-3 every rank must call this (of FSDP1 with the wrapper itself): the deltas are gathered,
    the first rank writes, and the folder is there when any of them returns. Elsewhere nothing is sent, and one rank may save
    alone.

    Args:
        model: a model with trained entries.
        path: the folder; made if it is not there, an adapter in it is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: The model has no trained entries, or accelerate has offloaded them, a value is not finite, or the path is that
            of a file.
        OSError: The folder cannot be written; an adapter that was there is untouched.
    """
    state = state_of(model)
    adapter = state.current
    if adapter is None:
        raise ValueError("save: no adapter is active; call sprand.switch(model, name) first")
    offload.refuse(model, "save")
    refuse_waiting(bool(found(model)), "save")
    sharding.reshard(model)
    with sharding.gathered(model, "save"):
        return _save(model, state, adapter, path)


def _save(model: nn.Module, state: State, adapter: Adapter, path: str | os.PathLike[str]) -> Path:
    """Write an adapter whose tensors are whole, or can be gathered one by one."""
    sites = sites_of(model)
    trained = {site.name: _trained(adapter, site) for site in sites}
    axes = {site.name: pattern.axis_of(adapter.config.layout, site) for site in sites}
    drawn = {name: _as_drawn(adapter.config, name, part, axes[name]) for name, part in trained.items()}
    if state.mixed is None and None not in drawn.values():
        trained = drawn
    refuse_unknown(model, adapter)
    _warn_of_missing(model, adapter)
    heads = {name: sharding.whole(value).cpu() for name, value in _heads(model, state, adapter).items()}
    for name, values in ({name: part.delta for name, part in trained.items()} | heads).items():
        if not finite(values):
            raise ValueError(f"save: the trained values of {name} are not finite; load the last good checkpoint")
    rest = {name: sharding.whole(value).cpu() for name, value in _rest(model, heads).items()}
    base_model = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    with sharding.first_rank(model) as writes:
        if not writes:
            return Path(path)
        architecture = architecture_of(model, with_head=bool(heads))
        file = AdapterFile.made(path, adapter.config, trained, heads, base_model, adapter.selection, architecture)
        return file.beside(rest).store()


def _trained(adapter: Adapter, site: Site) -> Trained:
    """The entries of one weight as they go to a file."""
    entries, frozen = site.entries, adapter.frozen.get(site.name)
    base = entries.base if frozen is None else frozen.pristine(entries.indices, entries.base)
    added = adapter.added.get(site.name)
    return Trained(site.shape, sharding.whole(entries.delta).cpu(), base.cpu(), entries.indices.cpu(), frozen, added)


def _warn_of_missing(model: nn.Module, adapter: Adapter) -> None:
    """Say which weights that the adapter trains are not in the model now."""
    there = whole_tensors(model)
    missing = [name for name in (*adapter.patterns, *adapter.saved) if name not in there]
    if missing:
        warnings.warn(
            f"save: {first_of(missing)} is not in the model any more, and left out of the adapter; put its module back first "
            "to save what it learned",
            stacklevel=3,
        )


def _heads(model: nn.Module, state: State, adapter: Adapter) -> dict[str, Tensor]:
    """The parameters that were trained in full, the buffers of their modules, and those that training has changed elsewhere."""
    modules = {name.rpartition(".")[0] for name in adapter.saved}
    buffers = buffers_of(model)
    kept = changed(buffers, state.base_buffers).keys() | {name for name in buffers if name.rpartition(".")[0] in modules}
    parameters = {name: p for name, p in named_parameters(model, remove_duplicate=False) if name in adapter.saved}
    return parameters | {name: value for name, value in buffers.items() if name in kept}


def _rest(model: nn.Module, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What else there is in the modules of `heads`: PEFT loads whole modules. One that has entries as well it cannot hold."""
    sparse = [site.name for site in sites_of(model)]
    modules = [f"{module}." for module in modules_of(heads)]
    whole = tuple(module for module in modules if not any(name.startswith(module) for name in sparse))
    return {name: value for name, value in whole_tensors(model).items() if name.startswith(whole) and name not in heads}


def _as_drawn(config: SparseConfig, name: str, part: Trained, axis: int | None) -> Trained | None:
    """The entries of one weight without their indices, where a seed draws them; None where it does not."""
    if config.strategy not in pattern.RANDOM_STRATEGIES:
        return None
    target, nnz = {"shape": list(part.shape), **described_axis(axis)}, part.delta.numel()
    is_drawn = nnz % Units.of(part.shape, axis).size == 0 and torch.equal(part.indices, draw(config, name, target, nnz))
    return dataclasses.replace(part, indices=None, axis=axis) if is_drawn else None


def load(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> nn.Module:
    """Put a saved adapter on its base model and make it the active one.

    Args:
        model: the base model, or one that holds other adapters. If adapter `name` is there with the same entries, its
            values are replaced (an optimizer stays valid).
        path: folder of the adapter, or its safetensors file.
        name: what to call it in `switch`.

    Returns:
        The same object.

    Raises:
        FileNotFoundError: No adapter is at that path.
        ValueError: The adapter is damaged, made by a newer sprand, or for another base; or the model is sharded. The model is as
            it was then.
    """
    sharding.refuse(model, "load", "load the adapter first, then shard the model")
    file = AdapterFile.read(path)
    state = known_state(model)
    with contextlib.nullcontext() if state is None else disabled(model):
        adapter = prove(model, file)
    if state is not None and name in state.adapters:
        return _replace_values(model, state, name, adapter)
    replaced.watch()
    return add(model, name, adapter)


def prove(model: nn.Module, file: AdapterFile, base_of: Callable[[str, Tensor, Tensor], Tensor] | None = None) -> Adapter:
    """An adapter that was read, after every check against the model that it is for.

    Args:
        model: its weights are read, not changed.
        file: the adapter.
        base_of: the entries `[nnz]` that a parameter holds in the base, from its name, its weight and their indices `[nnz]`; by
            default what the weight holds now.

    Returns:
        Its entries, on the devices of their weights.

    Raises:
        ValueError: The adapter is damaged, or for another model or base.
    """
    base_of = base_of or (lambda name, weight, indices: ops.gather(weight.contiguous(), indices))
    tensors = whole_tensors(model)
    order = {name: number for number, name in enumerate(tensors)}
    adapter = Adapter(file.config, selection=file.selection)
    for name in sorted(file.targets, key=lambda name: order.get(name, -1)):
        _refuse_unresized(file, tensors, name)
        weight = _matching(file.path, tensors, name, file.targets[name]["shape"])
        indices, delta = file.entries(name)
        indices = indices.to(weight.device)
        file.check_base(name, base_of(name, weight.data, indices))
        frozen = file.frozen(name)
        if frozen is not None:
            own, values = (part.to(weight.device) for part in frozen)
            base = base_of(name, weight.data, own)
            file.check_frozen_base(name, base)
            adapter.frozen[name] = Frozen(own, values.to(base), base)
            added = file.added_row(name, own)
            if added is not None:
                adapter.added[name] = added
        adapter.patterns[name] = Pattern(indices)
        adapter.deltas[name] = nn.Parameter(delta.to(device=weight.device, dtype=ops.accumulation_dtype(weight.dtype)))
    for name, values in file.heads.items():
        whole = _matching(file.path, tensors, name, list(values.shape))
        place = adapter.saved if isinstance(whole, nn.Parameter) else adapter.buffers
        place[name] = values.to(device=whole.device, dtype=whole.dtype)
    _refuse_aliases(file, tensors, (*adapter.patterns, *adapter.saved))
    return adapter


def _refuse_aliases(file: AdapterFile, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Prove that nothing is trained twice under two names, and that no copy that was trained is tied to something here."""
    firsts: dict[int, str] = {}
    for name in names:
        first = firsts.setdefault(id(tensors[name]), name)
        if first != name:
            raise ValueError(f"{file.path} was made for another model: {first} and {name} are one parameter here")
    for name, tensor in tensors.items() if file.copied_heads else ():
        head = firsts.get(id(tensor), name)
        if head != name and head in file.heads:
            raise ValueError(
                f"{file.path} trained a copy of {head} through PEFT, and left {name} as it was, but both are one parameter here; "
                "load it by PeftModel.from_pretrained, or into a model that does not tie them"
            )


def _refuse_unresized(file: AdapterFile, tensors: Mapping[str, Tensor], name: str) -> None:
    shape, here = file.targets[name]["shape"], list(tensors[name].shape) if name in tensors else None
    if "added" in file.targets[name].get("frozen", {}) and here is not None and here != shape and here[1:] == shape[1:]:
        raise ValueError(
            f"{file.path} trained rows that were added to {name}, which is {here} here and {shape} there; resize this model "
            f"alike first, model.resize_token_embeddings({shape[0]})"
        )


def _matching(path: Path, tensors: Mapping[str, Tensor], name: str, shape: list[int]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{path} was made for another model: this one has no parameter {name!r}")
    weight = tensors[name]
    if weight.is_meta:
        raise ValueError(
            f"{path}: expected {name} in memory, got it on the meta device; load the model's weights first. Where accelerate has "
            f"offloaded them (device_map, cpu_offload, disk_offload), {offload.INSTEAD}"
        )
    if isinstance(weight, nn.Parameter) and not (dtype_name(weight.dtype) in DTYPES and weight.is_contiguous()):
        raise ValueError(
            f"{path}: expected {name} as {', '.join(DTYPES)} in contiguous memory, got {dtype_name(weight.dtype)} with strides "
            f"{weight.stride()}"
        )
    if list(weight.shape) != shape:
        raise ValueError(f"{path} was made for another model: {name} is {list(weight.shape)} here and {shape} there")
    return weight


def _replace_values(model: nn.Module, state: State, name: str, adapter: Adapter) -> nn.Module:
    there, tensors = state.adapters[name], whole_tensors(model)
    same = there.saved.keys() == adapter.saved.keys() and there.patterns.keys() == adapter.patterns.keys()
    own = adapter.indices if same else {}
    if not same or not all(torch.equal(there.patterns[key].indices.cpu(), indices.cpu()) for key, indices in own.items()):
        raise ValueError(f"adapter {name!r} is loaded already, with other entries; choose another name")
    if there.frozen or adapter.frozen:
        switch(model, None)
    for key, delta in adapter.deltas.items():
        there.deltas[key].data.copy_(delta.data)
    if state.active != name:
        there.saved, there.buffers, there.frozen = adapter.saved, adapter.buffers, adapter.frozen
        return switch(model, name)
    for key, value in adapter.saved.items():
        tensors[key].data.copy_(value)
    put_buffers(model, state.base_buffers | adapter.buffers)
    write(model)
    return model
