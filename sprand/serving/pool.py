"""Many adapters of one inference model: switched by as many writes as they have entries, never under a running forward."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.file import AdapterFile
from ..adapters.frozen import Frozen
from ..adapters.save_and_load import prove
from ..adapters.state import known_state, whole_tensors
from ..kernels import ops
from ..layers import sharding
from .gate import ANY, Gate, guard, unguard
from .residents import DeviceCache, Library, Packed, Resident
from .writes import set_entries

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """What a pool has done and holds.

    Attributes:
        adapters: how many it holds.
        switches: changes of what the weights hold.
        host_bytes: of all adapters, in host memory.
        device_bytes: of their copies on GPUs; 0 where the model is on the CPU, which needs none.
        hits: packed parts (positions, values) that a switch found on the device.
        misses: those that it had to copy there.
        evictions: copies that made room for others.
        uploaded_bytes: of all copies.
    """

    adapters: int
    switches: int
    host_bytes: int
    device_bytes: int
    hits: int
    misses: int
    evictions: int
    uploaded_bytes: int


class AdapterPool:
    """Adapters of one plain model, one of them in its weights at a time.

    The model keeps its class, its modules and its parameters, and a forward costs what it costs without a pool. Its weights hold
    the adapter that was asked for last, set from values that were computed once, so that every switch is exact to the bit:

        pool = AdapterPool(model)
        pool.add("summaries", "adapters/summaries")
        with pool.use("summaries"):  # other threads may use the same adapter now; those that want another one wait
            model.generate(...)

    A forward outside of `use` takes the weights as they are, and holds them while it runs. Begin a block in the thread that calls
    the model: a thread that is started inside of one waits behind those that wait already. A CUDA graph is replayed without a
    forward: replay it inside of a block. The model is for inference: a backward pass after a switch would meet other weights.

    In host memory an adapter takes its values in the weights' dtype, and 4 bytes for each index and the base value for each
    entry; adapters with the same positions (the same seed, targets and count) share the latter two.

    Args:
        model: holds its base weights, whole and not on the meta device. Do not move, cast or train it while the pool is there.
        device_bytes: how much of a GPU's memory adapters may take; the active one stays, the least recently used go first.
            None for no limit, and on the CPU, where nothing is copied.

    Raises:
        ValueError: The model has trained entries, is sharded, is in another pool, or is on the CPU and `device_bytes` was given.
    """

    def __init__(self, model: nn.Module, device_bytes: int | None = None) -> None:
        if known_state(model) is not None:
            raise ValueError("AdapterPool: this model trains entries; call sprand.merge(model) or sprand.unmerge(model) first")
        sharding.refuse(model, "AdapterPool", "use it in a process that holds the whole model")
        devices = {p.device for p in model.parameters()}
        if any(device.type == "meta" for device in devices):
            raise ValueError("AdapterPool: expected a model with weights, got one on the meta device; load its weights first")
        if device_bytes is not None and (device_bytes < 0 or devices <= {torch.device("cpu")}):
            here = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"device_bytes: expected bytes of a GPU's memory, got {device_bytes} for a model on {here}; on the CPU adapters "
                "are used where they are, so leave it out"
            )
        self.model = model
        self._parameters = whole_tensors(model)
        self._adapters: dict[str, Resident] = {}
        self._library = Library()
        self._cache = DeviceCache(device_bytes)
        self._mutex = threading.Lock()
        self._base_whole: dict[str, Tensor] = {}
        self._current: Resident | None = None
        self._changed: dict[int, str] = {}
        self._switches, self._closed = 0, False
        self._gate = Gate(self._change, devices)
        self._forward = guard(model, self._gate, "AdapterPool")

    def add(self, name: str, path: str | os.PathLike[str]) -> None:
        """Read a saved adapter and keep it at hand; the weights do not change.

        Args:
            name: what to call it.
            path: folder of the adapter, or its safetensors file.

        Raises:
            FileNotFoundError: There is no adapter.
            ValueError: The name is taken, or the adapter is damaged, or for another base. The pool is as it was then.
        """
        if self._closed:
            raise ValueError("add: this pool is closed; make another one")
        if not isinstance(name, str) or name in self._adapters:
            raise ValueError(f"add: expected a name (a str) that is not taken, got {name!r}; remove(name) makes room for another")
        file = AdapterFile.read(path)
        with self._gate.hold(ANY), torch.no_grad():
            adapter = prove(self.model, file, self._base)
            base = {key: self._base(key, self._parameters[key].data, own) for key, own in adapter.indices.items()}
            resident = self._library.resident(adapter, base)
        with self._mutex:
            if name in self._adapters:
                raise ValueError(f"add: another thread has added {name!r} in the meantime")
            self._adapters[name] = resident

    def remove(self, name: str) -> None:
        """Forget an adapter, once no thread uses it; if it is the active one, the weights hold the base then.

        Args:
            name: the adapter.

        Raises:
            ValueError: There is no adapter of that name.
            RuntimeError: This thread uses the adapter.
        """
        self._resident(name)
        with self._gate.hold(ANY):
            if self._gate.state != name:
                return self._forget(name)
        with self._gate.hold(None):
            return self._forget(name)

    @contextmanager
    def use(self, name: str | None) -> Iterator[nn.Module]:
        """The model with an adapter, or None for its base, inside of the block; several threads may use the same one at once.

        A thread that asks for another waits until they leave. Threads are served in the order in which they came.

        Args:
            name: the adapter, or None.

        Raises:
            ValueError: There is no adapter of that name.
            RuntimeError: This thread uses another one.
        """
        self._resident(name)
        with self._gate.hold(name):
            yield self.model

    def switch(self, name: str | None) -> None:
        """Make an adapter, or None for the base, what the weights hold until someone asks for another.

        Args:
            name: the adapter, or None.

        Raises:
            ValueError: There is no adapter of that name.
            RuntimeError: This thread uses another one.
        """
        with self.use(name):
            pass

    def close(self) -> None:
        """Put the base back, bit for bit, and give the model its own forward; the pool is empty then, and takes no more."""
        with self._gate.hold(None):
            unguard(self._forward)
            self._closed = True
            for name in list(self):
                self._forget(name)

    @property
    def active(self) -> str | None:
        """The adapter that the weights hold now."""
        return self._gate.state

    @property
    def nbytes(self) -> int:
        """Host memory of all adapters; what they share counts once."""
        with self._mutex:
            parts = {part for resident in self._adapters.values() for part in _parts(resident)}
        return sum(part.nbytes for part in parts) + sum(value.nbytes for value in self._base_whole.values())

    def statistics(self) -> Statistics:
        """What the pool has done and holds."""
        cache = self._cache
        return Statistics(
            len(self), self._switches, self.nbytes, cache.nbytes, cache.hits, cache.misses, cache.evictions, cache.uploaded_bytes
        )

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        with self._mutex:
            return iter(list(self._adapters))

    def _resident(self, name: str | None) -> Resident | None:
        if name is None:
            return None
        with self._mutex:
            if name not in self._adapters:
                near = ", ".join(sorted(self._adapters)[:10]) or "none"
                raise ValueError(f"no adapter {name!r} in the pool of {len(self._adapters)} (there are {near}); add it first")
            return self._adapters[name]

    def _forget(self, name: str) -> None:
        with self._mutex:
            resident = self._adapters.pop(name, None)
            kept = {part for other in self._adapters.values() for part in _parts(other)}
        for part in _parts(resident) if resident is not None else ():
            if part not in kept:
                self._cache.drop(part)

    def _base(self, name: str, weight: Tensor, indices: Tensor) -> Tensor:
        """The entries of a parameter in the base, whatever it holds now."""
        current = self._current
        changed = None if current is None else self._changed.get(id(self._parameters[name]))
        if changed is not None and changed in current.whole:
            return ops.gather(self._base_whole[changed], indices.cpu()).to(weight.device)
        held = ops.gather(weight.contiguous(), indices)
        if changed is None:
            return held
        here = current.positions.packed.here
        own, base = here[f"indices.{changed}"].to(weight.device), here[f"base.{changed}"].to(weight.device)
        return Frozen(own, base, base).pristine(indices, held)

    def _change(self, name: str | None) -> None:
        """Make the weights hold another adapter. Copies come before the first write; after an error they hold the base."""
        new, old = self._resident(name), self._current
        in_use = _parts(new) + _parts(old)
        with torch.no_grad():
            values = {} if new is None else self._cache.get(new.values, in_use)
            there = {} if new is None else self._cache.get(new.positions.packed, in_use)
            before = {} if old is None else self._cache.get(old.positions.packed, in_use)
            try:
                self._exchange(old, before, new, there, values)
            except BaseException:
                self._restore(new, there)
                self._restore(old, before)
                self._current, self._gate.state, self._changed = None, None, {}
                raise
        self._current, self._gate.state = new, name
        changed = () if new is None else (*new.positions.names, *new.whole)
        self._changed = {id(self._parameters[key]): key for key in changed}
        self._switches += 1
        self._cache.shrink(_parts(new))

    def _exchange(self, old: Resident | None, before: Tensors, new: Resident | None, there: Tensors, values: Tensors) -> None:
        """Write the values of another adapter; where it has the positions of the old one, the base need not be put back first."""
        same_positions = old is not None and new is not None and old.positions is new.positions
        self._restore(old, {} if same_positions else before, () if new is None else new.whole)
        if new is None:
            return
        for key in new.whole:
            self._base_whole.setdefault(key, self._parameters[key].data.to("cpu", copy=True))
        self._write(new.positions.names, there, values)
        for key in new.whole:
            self._parameters[key].data.copy_(values[key])

    def _restore(self, resident: Resident | None, there: Tensors, but: Sequence[str] = ()) -> None:
        """Put the base back where an adapter is, except in the whole parameters `but`, and nothing where `there` is empty."""
        if resident is None:
            return
        names = resident.positions.names if there else ()
        self._write(names, there, {name: there[f"base.{name}"] for name in names})
        for name in resident.whole:
            if name not in but:
                self._parameters[name].data.copy_(self._base_whole[name])

    def _write(self, names: Sequence[str], there: Tensors, values: Tensors) -> None:
        indices = {name: there[f"indices.{name}"] for name in names}
        set_entries(self._parameters, indices, {name: values[name] for name in names})


def _parts(resident: Resident | None) -> tuple[Packed, ...]:
    return () if resident is None else (resident.values, resident.positions.packed)
