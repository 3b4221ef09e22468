"""Exchanging entries: a weight's pattern, deltas and moments change in place, so that everything that holds them goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .functional import Candidates, Entries
from .module import SparseModule


@dataclass
class Site:
    """A weight whose pattern may change.

    Attributes:
        name: of the parameter in the model.
        owners: every module that holds it, with its name there (several where weights are tied).
    """

    name: str
    owners: list[tuple[SparseModule, str]]

    @property
    def entries(self) -> Entries:
        """Its trained entries."""
        module, parameter = self.owners[0]
        return module.sparse_entries(parameter)

    @property
    def weight(self) -> nn.Parameter:
        """The weight itself."""
        module, parameter = self.owners[0]
        return module._parameters[parameter]

    def watch(self, candidates: Candidates | None) -> None:
        """Show the gradient of the whole weight to `candidates` from the next forward pass on, or to nobody."""
        for module, parameter in self.owners:
            module._sprand_targets[parameter].candidates = candidates

    def mark_folded(self) -> None:
        """Remember that trained values of an earlier mask lie in the weight."""
        for module, parameter in self.owners:
            module._sprand_targets[parameter].folded = True

    def moments(self, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        """The optimizer's tensors for this weight's entries.

        Raises:
            RuntimeError: one of them has no element for each entry (quantized blocks, say), and cannot be moved.
        """
        p = self.entries.delta
        for value in optimizer.state.get(p, {}).values():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape != p.shape or not value.is_floating_point():
                raise RuntimeError(
                    f"DynamicMask: {type(optimizer).__name__} keeps a state of {list(value.shape)} {value.dtype} for "
                    f"{self.name}, expected {list(p.shape)} in floating point; use SparseAdamW or torch.optim.AdamW"
                )
            yield value

    def replace(self, indices: Tensor, base: Tensor, delta: Tensor, source: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Give the weight another pattern of as many entries; moments and gradient of an entry that stays go with it.

        The weight must hold `base + scale * delta`, or be written at its next use.

        Args:
            indices: `[nnz]`, flat positions, sorted.
            base: `[nnz]`, what the deltas are added to, in the weight's dtype.
            delta: `[nnz]`.
            source: `[nnz]`, where an entry stood before, or -1 for a new one.
            optimizer: holds the moments.
        """
        p = self.entries.delta
        for values in (*self.moments(optimizer), *([] if p.grad is None else [p.grad])):
            values.copy_(carried(values, source))
        p.data.copy_(delta)
        for module, parameter in self.owners:
            entries, target = module.sparse_entries(parameter), module._sprand_targets[parameter]
            entries.indices.copy_(indices)
            entries.base.copy_(base)
            target.redraw = None
            target.written.forget()
            module.make_schedule(parameter)


def sites_of(model: nn.Module) -> list[Site]:
    """Every weight with trained entries, in the order of the model, tied ones once."""
    sites: dict[int, Site] = {}
    for prefix, module in sparse_modules(model):
        for parameter in module._sprand_targets:
            name = f"{prefix}.{parameter}" if prefix else parameter
            sites.setdefault(id(module.sparse_entries(parameter).delta), Site(name, [])).owners.append((module, parameter))
    return list(sites.values())


def carried(values: Tensor, source: Tensor) -> Tensor:
    """`values[source]`, zero where `source` is -1."""
    return torch.where(source < 0, torch.zeros_like(values), values[source.clamp(min=0)])


def sparse_modules(model: nn.Module) -> Iterator[tuple[str, SparseModule]]:
    """The modules that hold trained entries, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseModule))


def attached(model: nn.Module) -> Iterable[tuple[str, SparseModule, str]]:
    """Every targeted parameter once: its full name, its module, and its name there."""
    seen: set[int] = set()
    for prefix, module in sparse_modules(model):
        for parameter in module._sprand_targets:
            key = id(module._parameters[parameter])
            if key not in seen:
                seen.add(key)
                yield (f"{prefix}.{parameter}" if prefix else parameter), module, parameter
