"""PEFT's `adapter_names=`: an adapter for each row of a batch, added by the linear layers over their base weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..kernels import ops
from ..layers.mixed import Columns, MixedRows, can_mix, columns_of
from .layer import SprandLayer

BASE = "__base__"  # PEFT's name for rows without an adapter
ALONE = "call its rows by themselves, after model.set_adapter(name)"


@contextmanager
def rows_use(model: nn.Module, known: Mapping[str, Any], names: Sequence[str]) -> Iterator[None]:
    """The rows of batches use these adapters inside of the block.

    Args:
        model: the base model, in which the layers of PEFT are.
        known: the adapters of the model.
        names: the adapter of each row, `"__base__"` for none.

    Raises:
        ValueError: An adapter is unknown or merged, or changes other entries than whole columns of linear layers, or the model is
            in training mode.
    """
    used = [name for name in dict.fromkeys(names) if name != BASE]
    unknown = sorted(set(used) - known.keys())
    if unknown or isinstance(names, str):
        raise ValueError(
            f"adapter_names: expected a name among {', '.join(known)}, {BASE} for each row, got {unknown or names!r}"
        )
    if model.training:
        raise ValueError(
            "adapter_names: rows of one batch use different adapters in evaluation mode alone; call model.eval() first"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SprandLayer)}
    if any(layer.merged for layer in layers.values()):
        raise ValueError("adapter_names: adapters are merged into the weights; call model.unmerge_adapter() first")
    enabled = [layer for layer in layers.values() if not layer.disable_adapters]
    if not enabled:  # inside of disable_adapter(), as PEFT has it: the base for all rows
        yield
        return
    _refuse_whole_modules(model, used)
    with torch.no_grad():
        columns = [_columns(layers, name) for name in used]
    rows = MixedRows([None if name == BASE else used.index(name) for name in names], columns)
    handles = []
    try:
        for layer in enabled:
            layer.enable_adapters(False)
        for module in dict.fromkeys(module for own in columns for module in own):
            handles.append(module.register_forward_hook(_adding(rows), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in enabled:
            layer.enable_adapters(True)


def _adding(rows: MixedRows) -> Any:
    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return rows.add_to(output, module, args[0] if args else next(iter(kwargs.values())))

    return add


def _columns(layers: Mapping[str, SprandLayer], adapter: str) -> dict[nn.Module, Columns]:
    """What an adapter changes, by the module that it wraps."""
    found = {}
    for name, layer in layers.items():
        module = layer.get_base_layer()
        for parameter, weight, target in layer.sprand_weights():
            if adapter not in target.deltas:
                continue
            columns = None
            is_alone = len(layer.sprand_site(parameter).owners) == 1
            is_plain = parameter == "weight" and layer.quantization_backend is None and is_alone
            if is_plain and can_mix(name, module):
                entries = target.entries(weight, (adapter,))
                exact = ops.accumulation_dtype(entries.base.dtype)
                columns = columns_of(module, entries.indices, entries.values().to(exact) - entries.base.to(exact))
            if columns is None:
                raise ValueError(
                    f"adapter_names: adapter {adapter!r} changes {target.name} otherwise than in whole columns of a linear "
                    f"layer, which rows of one batch cannot differ in; {ALONE}"
                )
            found[module] = columns
    return found


def _refuse_whole_modules(model: nn.Module, used: Sequence[str]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and set(used) & module._get_available_adapters():
            raise ValueError(f"adapter_names: {name} was trained in full, which rows of one batch cannot differ in; {ALONE}")
