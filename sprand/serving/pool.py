"""Many adapters of one inference model: switched by as many writes as they have entries, never under a running forward."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import torch
from torch import nn

from ..adapters.file import AdapterFile
from ..adapters.save_and_load import prove
from ..adapters.state import known_state, whole_tensors
from ..files import described
from ..layers import sharding
from .gate import ANY, Gate
from .guard import guard, unguard
from .mixing import MIXED, Mixing
from .residents import DeviceCache, Library, Resident
from .shelf import Shelf, Source
from .sources import located
from .statistics import Statistics
from .weights import Weights


class AdapterPool:
    """Adapters of one plain model, one of them in its weights at a time.

    The model keeps its class, its modules and its parameters, and a forward costs what it costs without a pool. Its weights hold
    the adapter that was asked for last, set from values that were computed once, so that every switch is exact to the bit:

        pool = AdapterPool(model)
        pool.add("summaries", "adapters/summaries")
        with pool.use("summaries"):  # other requests may use the same adapter now; those that want another one wait
            model.generate(...)
        async with pool.use_async("summaries"):  # the same in a coroutine
            await asyncio.to_thread(model.generate, ...)

    A block belongs to a request. Coroutines and threads that are started inside of it, and jobs that it submits to a
    `ThreadPoolExecutor`, are inside as well. A thread that outlives the block asks for its adapter again at its next forward, so
    that `Thread(target=model.generate, ...)` is never switched under, whoever reads its streamer.

    A forward outside of any request takes the weights as they are, and so does `generate`; both hold them while they run. A CUDA
    graph is replayed without a forward: replay it inside of a block. The model is for inference: a backward pass after a switch
    would meet other weights.

    In host memory an adapter takes its values in the weights' dtype, and 4 bytes for each index and the base value for each
    entry; adapters with the same positions (the same seed, targets and count) share the latter two.

    Args:
        model: holds its base weights, whole and not on the meta device. Do not move, cast or train it while the pool is there.
        device_bytes: how much of a GPU's memory adapters may take; the active one stays, the least recently used go first.
            None for no limit, and on the CPU, where nothing is copied.
        host_bytes: how much host memory they may take; above it the least recently used stay on disk alone, and are read again
            when they are asked for. The active one and those that requests wait for stay. None for no limit.
        max_queue_delay: for how many seconds a waiting request may be passed by later ones for the adapter that the weights hold:
            fewer switches for longer waiting. 0 to serve all in the order in which they come.

    Raises:
        ValueError: The model has trained entries, is sharded, is in another pool, or is on the CPU and `device_bytes` was given;
            or a limit is negative.
    """

    def __init__(
        self,
        model: nn.Module,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        max_queue_delay: float = 0.0,
    ) -> None:
        if known_state(model) is not None:
            raise ValueError("AdapterPool: this model trains entries; call sprand.merge(model) or sprand.unmerge(model) first")
        sharding.refuse(model, "AdapterPool", "use it in a process that holds the whole model")
        devices = {p.device for p in model.parameters()}
        if any(device.type == "meta" for device in devices):
            raise ValueError("AdapterPool: expected a model with weights, got one on the meta device; load its weights first")
        _check_limits(device_bytes, host_bytes, max_queue_delay, devices)
        self.model = model
        self._tensors = whole_tensors(model)
        self._library = Library()
        self._cache = DeviceCache(device_bytes)
        self._weights = Weights(self._tensors, self._cache)
        self._shelf = Shelf(self._read, self._cache.drop, host_bytes)
        self._closed = False
        self._gate = Gate(self._change, devices, max_queue_delay)
        self._mixing = Mixing(model, self._gate, self._cache)
        self._guarded = guard(model, self._gate, "AdapterPool", ("forward", "generate"))

    def add(self, name: str, path: str | os.PathLike[str], revision: str | None = None) -> None:
        """Read a saved adapter and keep it at hand; the weights do not change.

        Args:
            name: what to call it.
            path: folder of the adapter, its safetensors file, or `owner/name` of the Hugging Face Hub.
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: There is no adapter.
            ValueError: The name is taken, or the adapter is damaged, or for another base. The pool is as it was then.
        """
        self._refuse_closed("add")
        if not isinstance(name, str) or name in self._shelf:
            raise ValueError(
                f"add: expected a name (a str) that is not taken, got {name!r}; remove(name) makes room for another, and "
                "replace(name, path) puts one in its place"
            )
        entry = self._shelf.read(name, Source(os.fspath(path), revision, located(path, revision)))
        if not self._shelf.put(name, entry):
            raise ValueError(f"add: another thread has added {name!r} in the meantime")

    def replace(self, name: str, path: str | os.PathLike[str] | None = None, revision: str | None = None) -> None:
        """Let a name stand for another adapter, in one step: requests that are inside or wait keep the one that they asked for.

        Args:
            name: of an adapter in the pool.
            path: as for `add`; by default the place that the adapter was read from, for what is there now.
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: There is no adapter at that path.
            ValueError: There is no adapter of that name, or the new one is damaged, or for another base. The pool is as it was.
        """
        self._refuse_closed("replace")
        before = self._shelf.entry(name).source
        if path is None:
            path, revision = before.given, revision or before.revision
        entry = self._shelf.read(name, Source(os.fspath(path), revision, located(path, revision)))
        if not self._shelf.put(name, entry, instead=True):
            raise ValueError(f"replace: another thread has removed {name!r} in the meantime; add it")

    def remove(self, name: str) -> None:
        """Forget an adapter, once no request uses it; if it is the active one, the weights hold the base then.

        Args:
            name: the adapter.

        Raises:
            ValueError: There is no adapter of that name.
            RuntimeError: This request uses the adapter.
        """
        self._shelf.entry(name)
        with self._gate.hold(ANY):
            if self.active != name:
                return self._shelf.remove(name)
        with self._gate.hold(None):
            return self._shelf.remove(name)

    @contextmanager
    def use(self, name: str | None, timeout: float | None = None) -> Iterator[nn.Module]:
        """The model with an adapter, or None for its base, inside of the block; several requests may use the same one at once.

        A request for another adapter waits until they leave. Requests are served in the order in which they came.

        Args:
            name: the adapter, or None.
            timeout: seconds to wait at most; None for no limit.

        Raises:
            FileNotFoundError: The adapter is on disk alone, and not there any more.
            RuntimeError: This request uses another adapter, or would stop the event loop that it waits for.
            TimeoutError: The turn did not come in time.
            ValueError: There is no adapter of that name, or its file is damaged, or not what was added.
        """
        end = None if timeout is None else time.monotonic() + timeout
        resident = self._asked(name) or (None if name is None else self._shelf.get(name, timeout))
        with self._gate.hold(resident, _left(end)):
            yield self.model

    @asynccontextmanager
    async def use_async(self, name: str | None, timeout: float | None = None) -> AsyncIterator[nn.Module]:
        """As `use`, for a coroutine: its event loop goes on while it waits. Call the model by `asyncio.to_thread` there.

        Args:
            name: the adapter, or None.
            timeout: seconds to wait at most; None for no limit.

        Raises:
            FileNotFoundError: The adapter is on disk alone, and not there any more.
            RuntimeError: This request uses another adapter.
            TimeoutError: The turn did not come in time.
            ValueError: There is no adapter of that name, or its file is damaged, or not what was added.
        """
        import asyncio

        end = None if timeout is None else time.monotonic() + timeout
        resident = self._asked(name) or (None if name is None else self._shelf.at_hand(name))
        if resident is None and name is not None:
            resident = await asyncio.to_thread(self._shelf.get, name, timeout)
        async with self._gate.hold_async(resident, _left(end)):
            yield self.model

    @contextmanager
    def mixed(self, names: Sequence[str | None], timeout: float | None = None) -> Iterator[nn.Module]:
        """The model with an adapter of its own for each row of a batch, inside of the block.

        The weights hold the base, and each linear layer adds what the adapters of the rows change: `x[:, columns] D^T`. So
        outputs are those of one adapter after the other but for rounding, not to the bit. All adapters must have been trained
        with `layout="columns"`. The first dimension of what comes to a layer is the batch, or a multiple of it (the beams of a
        search). Several such blocks run together, whatever their adapters are; a compiled model runs eagerly in them.

            with pool.mixed(["a", "b", None]):
                model.generate(input_ids)  # [3, length]

        Args:
            names: the adapter of each row; None for the base.
            timeout: seconds to wait at most; None for no limit.

        Raises:
            FileNotFoundError: An adapter is on disk alone, and not there any more.
            RuntimeError: This request uses another adapter.
            TimeoutError: The turn did not come in time.
            ValueError: There is no adapter of a name, or it changes other entries than whole columns of linear layers.
        """
        end = None if timeout is None else time.monotonic() + timeout
        if not names or isinstance(names, str):
            raise ValueError(f"mixed: expected the names of the rows' adapters, one for each row of the batch, got {names!r}")
        used = {name: self._shelf.get(name, _left(end)) for name in dict.fromkeys(names) if name is not None}
        with self._shelf.kept(used.values()):
            rows = self._mixing.rows(names, used)
            with self._gate.hold(MIXED, _left(end), rows):
                yield self.model

    def switch(self, name: str | None, timeout: float | None = None) -> None:
        """Make an adapter, or None for the base, what the weights hold until someone asks for another.

        Args:
            name: the adapter, or None.
            timeout: seconds to wait at most; None for no limit.

        Raises:
            FileNotFoundError, RuntimeError, TimeoutError, ValueError: as `use`.
        """
        with self.use(name, timeout):
            pass

    def close(self) -> None:
        """Put the base back, bit for bit, and give the model its own methods; the pool is empty then, and takes no more."""
        with self._gate.hold(None):
            unguard(self._guarded)
            self._closed = True
            for name in self:
                self._shelf.remove(name)

    @property
    def active(self) -> str | None:
        """The adapter that the weights hold now."""
        resident = self._weights.resident
        return None if resident is None else resident.name

    @property
    def nbytes(self) -> int:
        """Host memory of all adapters; what they share counts once."""
        return self._shelf.nbytes + self._weights.nbytes

    def statistics(self) -> Statistics:
        """What the pool has done and holds; `statistics().prometheus()` is its text for Prometheus."""
        gate, shelf, cache = self._gate, self._shelf, self._cache
        return Statistics(
            adapters=len(shelf),
            resident=shelf.resident,
            requests=gate.requests,
            waiting=gate.waiting,
            waited_seconds=gate.waited_seconds,
            switches=self._weights.switches,
            host_bytes=self.nbytes,
            device_bytes=cache.nbytes,
            reads=shelf.reads,
            removals=shelf.evictions,
            hits=cache.hits,
            misses=cache.misses,
            evictions=cache.evictions,
            uploaded_bytes=cache.uploaded_bytes,
        )

    def __len__(self) -> int:
        return len(self._shelf)

    def __contains__(self, name: object) -> bool:
        return name in self._shelf

    def __iter__(self) -> Iterator[str]:
        return iter(self._shelf)

    def _refuse_closed(self, what: str) -> None:
        if self._closed:
            raise ValueError(f"{what}: this pool is closed; make another one")

    def _asked(self, name: str | None) -> Resident | None:
        """The adapter of this name that this request uses already, though another may stand for the name by now."""
        held = self._gate.held()
        return held if isinstance(held, Resident) and held.name == name else None

    def _read(self, name: str, source: Source) -> tuple[Resident, str]:
        """An adapter in memory, after every check against the model, and a hash of what its file holds."""
        file = AdapterFile.read(source.path)
        with self._gate.hold(ANY), torch.no_grad():
            adapter = prove(self.model, file, self._weights.base)
            base = {key: self._weights.base(key, self._tensors[key].data, own) for key, own in adapter.indices.items()}
        with torch.no_grad():
            resident = self._library.resident(name, adapter, base)
        return resident, described.digest([json.dumps(file.description, sort_keys=True), file.checksum])

    def _change(self, wish: Any) -> None:
        """Let the weights hold another adapter, which is in memory as long as they do, or the base for batches of several."""
        new, old = None if wish is MIXED else wish, self._weights.resident
        self._mixing.stop()
        self._shelf.keep(new)
        try:
            self._weights.hold(new)
        finally:
            now = self._gate.state = self._weights.resident
            for resident in (new, old):
                if resident is not now:
                    self._shelf.release(resident)
        if wish is MIXED:
            self._gate.state = MIXED
            self._mixing.start()


def _left(end: float | None) -> float | None:
    """The seconds until a moment of the monotonic clock, at least 0."""
    return None if end is None else max(0.0, end - time.monotonic())


def _check_limits(device_bytes: int | None, host_bytes: int | None, delay: float, devices: set[torch.device]) -> None:
    if device_bytes is not None and (device_bytes < 0 or devices <= {torch.device("cpu")}):
        here = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"device_bytes: expected bytes of a GPU's memory, got {device_bytes} for a model on {here}; on the CPU adapters "
            "are used where they are, so leave it out"
        )
    if host_bytes is not None and host_bytes < 0:
        raise ValueError(f"host_bytes: expected a number of bytes, or None for no limit, got {host_bytes}")
    if not 0 <= delay < float("inf"):
        raise ValueError(f"max_queue_delay: expected seconds, at least 0, got {delay}")
