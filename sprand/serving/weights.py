"""The weights of a plain model, which hold its base or one adapter: exchanged by setting entries, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters.frozen import Frozen
from ..kernels import ops
from .residents import DeviceCache, Resident
from .writes import set_entries

Tensors = dict[str, Tensor]


class Weights:
    """What the parameters and buffers of a model hold.

    Args:
        tensors: of the model, by name.
        cache: of what is on the devices.

    Attributes:
        resident: the adapter that they hold; None for the base.
        switches: how often that has changed.
    """

    def __init__(self, tensors: Tensors, cache: DeviceCache) -> None:
        self.resident: Resident | None = None
        self.switches = 0
        self._tensors, self._cache = tensors, cache
        self._base_whole: Tensors = {}
        self._changed: dict[int, str] = {}

    @property
    def nbytes(self) -> int:
        """Host memory of the base of what adapters train in full."""
        return sum(value.nbytes for value in self._base_whole.values())

    def base(self, name: str, weight: Tensor, indices: Tensor) -> Tensor:
        """The entries `[nnz]` of a parameter in the base, whatever it holds now."""
        resident, changed = self.resident, self._changed.get(id(self._tensors[name]))
        if resident is not None and changed in resident.whole:
            return ops.gather(self._base_whole[changed], indices.cpu()).to(weight.device)
        held = ops.gather(weight.contiguous(), indices)
        if resident is None or changed is None:
            return held
        here = resident.positions.packed.here
        own, base = here[f"indices.{changed}"].to(weight.device), here[f"base.{changed}"].to(weight.device)
        return Frozen(own, base, base).pristine(indices, held)

    def hold(self, new: Resident | None) -> None:
        """Let the weights hold another adapter. Copies come before the first write; after an error they hold the base."""
        old = self.resident
        in_use = (*(new.parts if new else ()), *(old.parts if old else ()))
        with torch.no_grad():
            values = {} if new is None else self._cache.get(new.values, in_use)
            there = {} if new is None else self._cache.get(new.positions.packed, in_use)
            before = {} if old is None else self._cache.get(old.positions.packed, in_use)
            try:
                self._exchange(old, before, new, there, values)
            except BaseException:
                self._restore(new, there)
                self._restore(old, before)
                self.resident, self._changed = None, {}
                raise
        self.resident = new
        changed = () if new is None else (*new.positions.names, *new.whole)
        self._changed = {id(self._tensors[key]): key for key in changed}
        self.switches += 1
        self._cache.shrink(new.parts if new else ())

    def _exchange(self, old: Resident | None, before: Tensors, new: Resident | None, there: Tensors, values: Tensors) -> None:
        """Write the values of another adapter; where it has the positions of the old one, the base need not be put back first."""
        same_positions = old is not None and new is not None and old.positions is new.positions
        self._restore(old, {} if same_positions else before, () if new is None else new.whole)
        if new is None:
            return
        for key in new.whole:
            self._base_whole.setdefault(key, self._tensors[key].data.to("cpu", copy=True))
        self._write(new.positions.names, there, values)
        for key in new.whole:
            self._tensors[key].data.copy_(values[key])

    def _restore(self, resident: Resident | None, there: Tensors, but: Sequence[str] = ()) -> None:
        """Put the base back where an adapter is, except in the whole parameters `but`, and nothing where `there` is empty."""
        if resident is None:
            return
        names = resident.positions.names if there else ()
        self._write(names, there, {name: there[f"base.{name}"] for name in names})
        for name in resident.whole:
            if name not in but:
                self._tensors[name].data.copy_(self._base_whole[name])

    def _write(self, names: Sequence[str], there: Tensors, values: Tensors) -> None:
        indices = {name: there[f"indices.{name}"] for name in names}
        set_entries(self._tensors, indices, {name: values[name] for name in names})
