"""`apply` and `select`: choose which entries of a model are to train, and let them train."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import native
from ..layers import sharding
from ..layers.units import Pattern
from ..selection import pattern
from ..selection.calibration import Calibration
from ..selection.choose import choose, waits
from ..selection.config import AS_GIVEN, SparseConfig
from ..selection.mask import Mask
from ..selection.targets import Targets, find_targets, view_of
from . import first_forward, replaced
from .attaching import add, detached
from .disjoint import Disjoint, avoided, selection_without, taken_by
from .first_steps import Scoring
from .state import Adapter, known_state
from .waiting import columns_at


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
        data: batches, for strategies that score entries, as in `select`; so are the next five. Without them `"activation"`
            chooses columns in the first forward in training mode, by that batch alone, `"token_fisher"` in the first
            `score_steps` steps, or both in `sprand.choose(model, batch)`; an optimizer may be made before.
        loss_fn: gives the loss of a batch.
        calibration_memory: bytes for summed gradients.
        calibration_dtype: of summed gradients.
        calibration_device: of summed gradients.
        calibration_examples: how many are read.
        **fields: fields of `SparseConfig`.

    Returns:
        The same object.

    Raises:
        ValueError: Nothing is targeted, a name matches nothing, the budget does not fit (or not into what is free), an adapter of
            that name is there already, or the model is sharded (apply first, then shard; of a model that ZeRO-3 has in parts,
            gather the parameters first).
        TypeError: A keyword is no field of `SparseConfig`.
    """
    config = _config_of(config, fields)
    state = known_state(model)
    if state is not None and name in state.adapters:
        raise ValueError(
            f"this model already trains entries, as adapter {name!r}; give another name (name=), or call sprand.merge(model) or "
            "sprand.unmerge(model) first"
        )
    sharding.refuse_parts(model)
    native.warn_if_slow()
    run = Calibration(data, loss_fn, calibration_memory, calibration_dtype, calibration_device, calibration_examples)
    with detached(model):
        mask, targets = _chosen(model, config, disjoint, run, may_wait=True)
        saved = {site.name: site.weight.data for site in targets.saved}
        if state is not None:  # whose adapters may train the same parameters
            saved = {key: value.clone() for key, value in saved.items()}
    chosen = {site.name: Pattern.of(mask[site.name], site.units) for site in targets.sites if mask[site.name].numel()}
    adapter = Adapter(config, chosen, saved=saved, selection=mask.selection)
    if mask.selection is not None and config.strategy in pattern.RANDOM_STRATEGIES:  # drawn among what others leave free
        adapter.config = dataclasses.replace(config, **AS_GIVEN)
    if waits(config, run):
        adapter.waiting = {site.name: columns_at(chosen[site.name]) for site in targets.sites}
    replaced.watch()
    add(model, name, adapter)
    if adapter.waiting:
        first_forward.watch(model, Scoring())
    return model


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
        ValueError: Nothing is targeted, the budget does not fit (or not into what is free), data or labels are missing, or a
            score is NaN.
    """
    config = _config_of(config, fields)
    sharding.refuse_wrapper(model, "select")
    run = Calibration(data, loss_fn, calibration_memory, calibration_dtype, calibration_device, calibration_examples)
    if known_state(model) is not None and not disjoint:
        raise ValueError(
            "this model trains entries already; call sprand.merge(model) or sprand.unmerge(model) first, or give disjoint="
        )
    with detached(model):
        mask, _ = _chosen(model, config, disjoint, run)
    return mask


def _config_of(config: SparseConfig | None, fields: Mapping[str, Any]) -> SparseConfig:
    if config is not None and fields:
        raise ValueError(f"give a config or its fields, not both (got a config and {', '.join(fields)})")
    known = {field.name for field in dataclasses.fields(SparseConfig)}
    for name in fields.keys() - known:
        hint = "; a rank of LoRA is a budget here: r * (in + out) entries for each weight" if name in ("r", "rank") else ""
        raise TypeError(f"no option is called {name!r}; expected fields of SparseConfig, {', '.join(sorted(known))}{hint}")
    return config or SparseConfig(**fields)


def _chosen(
    model: nn.Module, config: SparseConfig, disjoint: Disjoint, run: Calibration, may_wait: bool = False
) -> tuple[Mask, Targets]:
    """The entries that a configuration chooses, and what it targets, in a model that has no adapter attached."""
    view = view_of(model)
    targets = find_targets(view, config)
    taken = taken_by(model, disjoint)
    indices = choose(config, targets, run, avoided(view, targets, taken), may_wait)
    shapes = {site.name: site.shape for site in targets.sites}
    return Mask(indices, shapes, selection_without(config, taken)), targets
