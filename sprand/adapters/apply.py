"""Starting: which entries of a model are to train, apart from those of other tasks where asked, and let them train."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..files import described
from ..kernels import host, native
from ..layers import sharding
from ..layers.sites import Site
from ..selection import pattern
from ..selection.calibration import Calibration
from ..selection.choose import choose
from ..selection.config import AS_GIVEN, SparseConfig
from ..selection.mask import Mask, selection_of
from ..selection.targets import Targets, View, find_targets, view_of
from .file import AdapterFile
from .model import detached, install, switch
from .state import Adapter, State

Entries = Mapping[str, Tensor] | str | os.PathLike[str]  # a mask, or indices by parameter name; or the folder of an adapter
Taken = Sequence[tuple[str, Mapping[str, Tensor]]]  # of each adapter or mask its name, and indices by parameter name
Disjoint = bool | Entries | Sequence[Entries] | None


def apply(
    model: nn.Module,
    config: SparseConfig | None = None,
    *,
    name: str = "default",
    disjoint: Disjoint = None,
    data: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    calibration_memory: int | str = "auto",
    calibration_dtype: torch.dtype = torch.float32,
    calibration_device: torch.device | str | None = None,
    calibration_examples: int | None = 1024,
    **fields: Any,
) -> nn.Module:
    """Freeze a model and let a small set of its own entries train.

    Args:
        model: any module; changed in place, it keeps its class and all its names. Each targeted module gains a
            parameter `sprand_delta` and the buffers `sprand_indices` and `sprand_base`. Where it holds adapters already, a
            new one is put beside them, as the active one; it starts from the base.
        config: what to train; or its fields as keywords, `apply(model, density=0.01, seed=0)`.
        name: what to call the adapter in `switch`.
        disjoint: leave out what others train, as in `select`.
        data: batches, for strategies that score entries, as in `select`; so are the next five.
        loss_fn: gives the loss of a batch.
        calibration_memory: bytes for summed gradients.
        calibration_dtype: of summed gradients.
        calibration_device: of summed gradients.
        calibration_examples: how many are read.
        **fields: fields of `SparseConfig`.

    Returns:
        The same object.

    Raises:
        ValueError: nothing is targeted, a name matches nothing, the budget does not fit (or not into what is free), an adapter of
            that name is there already, or the model is sharded (apply first, then shard; of a model that ZeRO-3 has in parts,
            gather the parameters first).
        TypeError: a keyword is no field of `SparseConfig`.
    """
    config = _config_of(config, fields)
    state: State | None = getattr(model, "_sprand", None)
    if state is not None and name in state.adapters:
        raise ValueError(
            f"this model already trains entries, as adapter {name!r}; give another name (name=), or call sprand.merge(model) or "
            "sprand.unmerge(model) first"
        )
    sharding.refuse_parts(model)
    native.warn_if_slow()
    run = Calibration(data, loss_fn, calibration_memory, calibration_dtype, calibration_device, calibration_examples)
    if state is None:
        made, sites = _made(model, config, disjoint, run)
        before = {key for key, p in model.named_parameters() if p.requires_grad}
        made.indices = _chosen(made)
        install(model, State(trained_before=before), name, made, {site.name: site for site in sites})
        return model
    with detached(model):
        made, _ = _made(model, config, disjoint, run)
        made.indices = _chosen(made)
        made.saved = {key: value.clone() for key, value in made.saved.items()}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for key in made.saved:
            state.base_saved.setdefault(key, parameters[key].data.clone())
    state.adapters[name] = made
    return switch(model, name)


def select(
    model: nn.Module,
    config: SparseConfig | None = None,
    *,
    disjoint: Disjoint = None,
    data: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    calibration_memory: int | str = "auto",
    calibration_dtype: torch.dtype = torch.float32,
    calibration_device: torch.device | str | None = None,
    calibration_examples: int | None = 1024,
    **fields: Any,
) -> Mask:
    """Choose which entries of a model to train; the model is left as it was, bit for bit.

    The result can be given to `apply` as its strategy: `apply(model, strategy=select(model, ...))`.

    Args:
        model: any module without trained entries; or, with `disjoint`, one with adapters, of whose base they are chosen.
        config: what to choose; or its fields as keywords, `select(model, strategy="snip", density=0.01, data=batches)`.
        disjoint: leave out what others train, so that what is trained here can be added to it, and taken out again, without
            touching it: `True` for every adapter in this model (none may be there yet), the folder of an adapter, a mask or
            `{parameter name: indices}`, or a list of these. The count stays that of the budget: a random draw is one over the
            free positions, each equally likely; scores are ranked over those.
        data: batches to calibrate on, for strategies with gradients: any iterable of tensors, tuples or mappings with
            tensors. Several passes (a small `calibration_memory`, `"grasp"`) need one that can be read again.
        loss_fn: `loss_fn(model, batch)` gives the loss, a mean over the batch; by default that of the model's output.
        calibration_memory: bytes for accumulated gradients: where those of all targets take more, several passes are made
            over the data, each for some of the layers. `"auto"` is half of the memory that is free.
        calibration_dtype: of accumulated gradients, `torch.float32` or `torch.bfloat16`.
        calibration_device: where gradients are accumulated; by default beside their weights.
        calibration_examples: stop after the batch that reaches as many examples; None reads all data.
        **fields: fields of `SparseConfig`.

    Returns:
        `{parameter name: indices [nnz]}`, flat, sorted, distinct, int32 (int64 from 2**31 entries), on the weight's device;
        a dict that also saves itself, `mask.save(path)`, and is read by `sprand.Mask.load(path)`.

    Raises:
        ValueError: nothing is targeted, the budget does not fit (or not into what is free), data or labels are missing, or a
            score is NaN.
    """
    config = _config_of(config, fields)
    run = Calibration(data, loss_fn, calibration_memory, calibration_dtype, calibration_device, calibration_examples)
    if hasattr(model, "_sprand"):
        if not disjoint:
            raise ValueError(
                "this model trains entries already; call sprand.merge(model) or sprand.unmerge(model) first, or give disjoint="
            )
        with detached(model):
            made, sites = _made(model, config, disjoint, run)
    else:
        made, sites = _made(model, config, disjoint, run)
    return Mask(made.indices, {site.name: site.shape for site in sites}, made.selection)


def selection_without(config: SparseConfig, taken: Taken) -> dict[str, Any] | None:
    """How entries are chosen, as JSON types, with what they leave out."""
    chosen = selection_of(config)
    if not taken:
        return chosen
    if chosen is None and not isinstance(config.strategy, Mapping):
        chosen = {key: getattr(config, key) for key in ("strategy", "density", "budget", "layout", "seed")}
    avoided = [
        {"name": name, "nnz": sum(map(Tensor.numel, found.values())), "checksum": described.checksum(found)}
        for name, found in taken
    ]
    return (chosen or {"strategy": "given"}) | {"disjoint": avoided}


def taken_by(model: nn.Module, disjoint: Disjoint) -> list[tuple[str, dict[str, Tensor]]]:
    """The entries to leave out: of each adapter or mask its name, and ascending indices by parameter name.

    Raises:
        FileNotFoundError: A folder holds no adapter.
        ValueError: An adapter or mask is damaged, or was made for a model with other parameters.
    """
    if disjoint is None or disjoint is False:
        return []
    if disjoint is True:
        state: State | None = getattr(model, "_sprand", None)
        found = []
        for name, adapter in (state.adapters if state is not None else {}).items():
            folded = {key: frozen.indices for key, frozen in adapter.frozen.items()}
            found.append((name, _joined(adapter.indices, folded)))
        return found
    given = [disjoint] if isinstance(disjoint, (str, os.PathLike, Mapping)) else list(disjoint)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return [_taken(item, shapes) for item in given]


def _config_of(config: SparseConfig | None, fields: Mapping[str, Any]) -> SparseConfig:
    if config is not None and fields:
        raise ValueError(f"give a config or its fields, not both (got a config and {', '.join(fields)})")
    known = {field.name for field in dataclasses.fields(SparseConfig)}
    for name in fields.keys() - known:
        hint = "; a rank of LoRA is a budget here: r * (in + out) entries for each weight" if name in ("r", "rank") else ""
        raise TypeError(f"no option is called {name!r}; expected fields of SparseConfig, {', '.join(sorted(known))}{hint}")
    return config or SparseConfig(**fields)


def _made(model: nn.Module, config: SparseConfig, disjoint: Disjoint, run: Calibration) -> tuple[Adapter, list[Site]]:
    """The adapter, with no deltas yet, and the sites of its entries, in a model that has none attached."""
    view = view_of(model)
    targets = find_targets(view, config)
    taken = taken_by(model, disjoint)
    indices = choose(config, targets, run, _avoided(view, targets, taken))
    selection = selection_without(config, taken)
    if taken and config.strategy in pattern.RANDOM_STRATEGIES:
        config = SparseConfig.from_dict(config.to_dict() | AS_GIVEN)
    saved = {site.name: site.weight.data for site in targets.saved}
    return Adapter(config, indices, saved=saved, selection=selection), targets.sites


def _avoided(view: View, targets: Targets, taken: Taken) -> dict[str, Tensor]:
    """The entries of each target that others train, ascending."""
    lists: dict[str, list[Tensor]] = {}
    for _, indices in taken:
        for name, own in indices.items():
            lists.setdefault(view.weights[name].name, []).append(own.cpu())
    return {site.name: host.merge_indices(lists[site.name])[0].to(site.device) for site in targets.sites if site.name in lists}


def _chosen(made: Adapter) -> dict[str, Tensor]:
    """Its targets that train at least one entry."""
    return {name: indices for name, indices in made.indices.items() if indices.numel()}


def _taken(item: Entries, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, Tensor]]:
    if isinstance(item, Mapping):
        for name in item:
            _check_shape("disjoint", name, getattr(item, "shapes", {}).get(name), shapes)
        return "mask", {name: pattern.from_user(f"disjoint: {name}", value, shapes[name]) for name, value in item.items()}
    if not isinstance(item, (str, os.PathLike)):
        raise ValueError(f"disjoint: expected True, folders of adapters, masks or indices by name, got {type(item).__name__}")
    file = AdapterFile.read(item)
    own, folded = {}, {}
    for name, target in file.targets.items():
        _check_shape(str(file.path), name, tuple(target["shape"]), shapes)
        own[name], frozen = file.entries(name)[0], file.frozen(name)
        if frozen is not None:
            folded[name] = frozen[0]
    return described.label(file.path), _joined(own, folded)


def _check_shape(what: str, name: str, shape: tuple[int, ...] | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if name not in shapes:
        raise ValueError(f"{what} was made for another model: this one has no parameter {name!r}")
    if shape is not None and tuple(shape) != shapes[name]:
        raise ValueError(f"{what} was made for another model: {name} is {list(shapes[name])} here and {list(shape)} there")


def _joined(own: Mapping[str, Tensor], folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ascending indices by name, of entries that train and of folded ones."""
    result = {name: indices.cpu() for name, indices in own.items()}
    for name, indices in folded.items():
        lists = [indices.cpu(), *([result[name]] if name in result else [])]
        result[name] = host.merge_indices(lists)[0]
    return result
