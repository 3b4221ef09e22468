"""Batches of several adapters over the base weights: hooks on the linear layers add what the adapter of each row changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..kernels import ops
from ..layers.mixed import Columns, MixedRows, can_mix, columns_of
from .gate import Gate
from .requests import of_gate
from .residents import DeviceCache, Resident

MIXED = object()  # the state in which the weights hold the base, and the hooks are there


class Mixing:
    """Makes the rows of a request, and adds what they change while its forwards run.

    Args:
        model: whose linear layers get hooks.
        gate: whose request a forward belongs to.
        cache: of what is on the devices.
    """

    def __init__(self, model: nn.Module, gate: Gate, cache: DeviceCache) -> None:
        self._model, self._gate, self._cache = model, gate, cache
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Put the hooks on the layers; while nobody is inside."""
        for layer in self._layers.values():
            self._handles.append(layer.register_forward_hook(self._add, with_kwargs=True))

    def stop(self) -> None:
        """Take the hooks away; while nobody is inside."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def rows(self, names: Sequence[str | None], used: Mapping[str, Resident]) -> MixedRows:
        """The adapter of each row, and what each changes.

        Raises:
            ValueError: The model was compiled in parts, or an adapter changes more than columns.
        """
        compiled = [name for name, module in self._model.named_modules() if name and module._compiled_call_impl is not None]
        if compiled:
            raise ValueError(
                f"mixed: {compiled[0]} was compiled by itself, and its graph would leave out what is added; compile the whole "
                "model, or none of it"
            )
        numbers = {name: number for number, name in enumerate(used)}
        with torch.no_grad():
            columns = [self._columns(resident) for resident in used.values()]
        return MixedRows([None if name is None else numbers[name] for name in names], columns)

    @cached_property
    def _layers(self) -> dict[str, nn.Module]:
        """The layers whose rows may differ, by the name of their weight; without those that share it with others."""
        owners: dict[int, int] = {}
        for module in self._model.modules():
            for p in module._parameters.values():
                owners[id(p)] = owners.get(id(p), 0) + 1
        layers = {
            f"{name}.weight" if name else "weight": module
            for name, module in self._model.named_modules()
            if can_mix(name, module)
        }
        return {name: layer for name, layer in layers.items() if owners[id(layer.weight)] == 1}

    def _columns(self, resident: Resident) -> dict[nn.Module, Columns]:
        values, there = self._cache.get(resident.values), self._cache.get(resident.positions.packed)
        found = {}
        for name in (*resident.positions.names, *resident.whole):
            layer, columns = self._layers.get(name), None
            if layer is not None and name not in resident.whole:
                exact = ops.accumulation_dtype(layer.weight.dtype)
                change = values[name].to(exact) - there[f"base.{name}"].to(exact)
                columns = columns_of(layer, there[f"indices.{name}"], change)
            if columns is None:
                raise ValueError(
                    f"mixed: adapter {resident.name!r} changes {name} otherwise than in whole columns of a linear layer, which "
                    "rows of one batch cannot differ in; call its rows by themselves, in pool.use(name)"
                )
            found[layer] = columns
        return found

    def _add(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        request = of_gate(self._gate)
        if request is None or request.rows is None:
            return output
        return request.rows.add_to(output, layer, args[0] if args else next(iter(kwargs.values())))
