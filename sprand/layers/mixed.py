"""Batches whose rows use different changes of whole columns: y = x W^T + x[:, columns] D^T, columns and D by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .sites import is_conv1d, is_linear
from .units import Units

Columns = tuple[Tensor, Tensor]  # the inputs [c], and the changes [c, out] of their columns


def can_mix(name: str, module: nn.Module) -> bool:
    """Whether rows of a batch come to a module one by one, so that each may use a change of its own.

    They do to linear layers; but to experts come tokens out of the order of their rows, and the output projection of PyTorch's
    attention is not called.
    """
    by_rows = is_linear(module) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return by_rows and "experts" not in name.split(".")


def columns_of(module: nn.Module, indices: Tensor, change: Tensor) -> Columns | None:
    """The change of a linear layer's weight as columns, in the weight's dtype; None where it is not of whole columns.

    Args:
        module: the layer.
        indices: `[nnz]`, flat positions in the weight, ascending.
        change: `[nnz]`, what is added there.
    """
    axis = 0 if is_conv1d(type(module)) else 1
    units = Units.of(module.weight.shape, axis)
    chosen = units.whole(indices)
    if chosen is None:
        return None
    by_column = change.view(chosen.numel(), units.inner) if axis == 0 else change.view(units.outer, chosen.numel()).t()
    return chosen.long(), by_column.to(module.weight.dtype).contiguous()


@dataclass(frozen=True, eq=False)
class _Stack:
    """The columns of several adapters in one layer, padded to one number: inputs `[a, c]` and changes `[a, c, out]`."""

    chosen: Tensor
    changes: Tensor
    adapters: tuple[int, ...]


class MixedRows:
    """Which adapter each row of a batch uses, and what the adapters change in each layer.

    Args:
        rows: the number of each row's adapter; None for the base.
        columns: of each adapter, by layer.

    Attributes:
        rows: as given.
    """

    def __init__(self, rows: Sequence[int | None], columns: Sequence[Mapping[nn.Module, Columns]]) -> None:
        self.rows = tuple(rows)
        used = [number for number in range(len(columns)) if number in self.rows]
        layers = dict.fromkeys(module for number in used for module in columns[number])
        self._stacks = {module: _stacked({n: columns[n][module] for n in used if module in columns[n]}) for module in layers}
        self._places: dict[tuple[tuple[int, ...], int, torch.device], tuple[Tensor, Tensor, Tensor | None]] = {}

    def add_to(self, output: Tensor, module: nn.Module, input: Tensor) -> Tensor:
        """The output `[rows, ..., out]` of a layer, with the change that each row's adapter makes to it.

        Rows that were made of one, as the beams of a search are, follow each other.

        Raises:
            ValueError: The first dimension of the input is not that of the batch.
        """
        stack = self._stacks.get(module)
        if stack is None:
            return output
        count, batch = input.shape[0], len(self.rows)
        if count % batch or (input.dim() == 2 and count != batch):
            raise ValueError(
                f"rows of different adapters: expected an input of {batch} rows, or a multiple for beams, to a layer of "
                f"{tuple(module.weight.shape)}, got {list(input.shape)}; call the rows of each adapter by themselves"
            )
        index, take, rows = self._placed(stack.adapters, count // batch, input.device)
        x = input.reshape(count, -1, input.shape[-1])
        tokens = torch.arange(x.shape[1], device=x.device)
        chosen = x[index[:, :, None, None], tokens[:, None], stack.chosen[:, None, None, :]]  # [a, rows of each, tokens, c]
        added = torch.bmm(chosen.flatten(1, 2), stack.changes.to(x.dtype)).to(output.dtype)
        added = added.view(-1, x.shape[1], output.shape[-1])[take]
        y = output.reshape(count, -1, output.shape[-1])
        y = y + added if rows is None else y.index_add(0, rows, added)
        return y.view(output.shape)

    def _placed(self, adapters: tuple[int, ...], beams: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows of each adapter `[a, most]`, padded; which of these are rows; and their numbers, None where they are all."""
        key = adapters, beams, device
        if key not in self._places:
            repeated = [number for number in self.rows for _ in range(beams)]
            own = [[row for row, number in enumerate(repeated) if number == adapter] for adapter in adapters]
            most = max(map(len, own))
            places = sorted((row, a * most + i) for a, rows in enumerate(own) for i, row in enumerate(rows))
            index = torch.tensor([rows + [0] * (most - len(rows)) for rows in own], device=device)
            take = torch.tensor([place for _, place in places], device=device)
            rows = None if len(places) == len(repeated) else torch.tensor([row for row, _ in places], device=device)
            self._places[key] = index, take, rows
        return self._places[key]


def _stacked(columns: Mapping[int, Columns]) -> _Stack:
    """The columns of adapters side by side; those with fewer end in changes of zero."""
    most = max(chosen.numel() for chosen, _ in columns.values())
    chosen = torch.stack([nn.functional.pad(chosen, (0, most - chosen.numel())) for chosen, _ in columns.values()])
    changes = torch.stack([nn.functional.pad(change, (0, 0, 0, most - change.shape[0])) for _, change in columns.values()])
    return _Stack(chosen, changes, tuple(columns))
