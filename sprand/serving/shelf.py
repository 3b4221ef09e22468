"""Adapters by name: their files, and those of them that are in host memory, the least recently used of which make room."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .residents import Packed, Resident

READERS = 4  # files that are read at the same time, each of which takes memory


@dataclass(eq=False)
class Source:
    """Where an adapter is from.

    Attributes:
        given: what `add` was given: a path, or a name on the Hub.
        revision: of the Hub.
        path: where it lies on this machine.
    """

    given: str
    revision: str | None
    path: Path


@dataclass(eq=False)
class Entry:
    """One adapter of a shelf.

    Attributes:
        source: where it is from.
        identity: a hash of all that was read.
        resident: what is in host memory; None after it made room.
        last: the same, as long as anyone has it.
        reading: held while it is read again.
    """

    source: Source
    identity: str
    resident: Resident | None
    last: weakref.ref[Resident]
    reading: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, source: Source, resident: Resident, identity: str) -> Entry:
        """An adapter that was just read."""
        return cls(source, identity, resident, weakref.ref(resident))


class Shelf:
    """Adapters by name, at most `limit` bytes of them in host memory; the others are read again when they are asked for.

    Args:
        read: reads and proves an adapter, from its name and its source; gives it and a hash of what was read.
        dropped: called with a part that no adapter in memory has any more.
        limit: bytes in host memory, None for no limit. One adapter and what is in use stay, also above it.

    Attributes:
        reads: how often an adapter was read again.
        evictions: how often one made room.
    """

    def __init__(
        self,
        read: Callable[[str, Source], tuple[Resident, str]],
        dropped: Callable[[Packed], None],
        limit: int | None = None,
    ) -> None:
        self._nbytes, self.reads, self.evictions = 0, 0, 0
        self._read, self._dropped, self._limit = read, dropped, limit
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # the least recently used first
        self._users: Counter[Packed] = Counter()
        self._readers = threading.BoundedSemaphore(READERS)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(sorted(self._entries))

    @property
    def resident(self) -> int:
        """How many adapters are in host memory."""
        with self._lock:
            return sum(entry.resident is not None for entry in self._entries.values())

    def read(self, name: str, source: Source) -> Entry:
        """An adapter from its file; a few are read at the same time."""
        with self._readers:
            return Entry.of(source, *self._read(name, source))

    def entry(self, name: str) -> Entry:
        """The adapter of a name, which is in use from now on.

        Raises:
            ValueError: There is no adapter of that name.
        """
        with self._lock:
            if name not in self._entries:
                near = ", ".join(sorted(self._entries)[:10]) or "none"
                raise ValueError(f"no adapter {name!r} in the pool of {len(self._entries)} (there are {near}); add it first")
            self._entries.move_to_end(name)
            return self._entries[name]

    def at_hand(self, name: str) -> Resident | None:
        """An adapter that is in memory; None where it has to be read."""
        return self._remembered(self.entry(name))

    @property
    def nbytes(self) -> int:
        """Host memory of what is there; what adapters share counts once, and what comes counts once room was made for it."""
        with self._lock:
            return self._nbytes

    def get(self, name: str, timeout: float | None = None) -> Resident:
        """An adapter in memory, read again where it is not.

        Args:
            name: the adapter.
            timeout: seconds to wait at most for others that read it.

        Raises:
            FileNotFoundError: Its file is not there any more.
            TimeoutError: Others took longer.
            ValueError: There is no adapter of that name, or its file is damaged, or holds something else now.
        """
        entry = self.entry(name)
        resident = self._remembered(entry)
        if resident is not None:
            return resident
        if not entry.reading.acquire(timeout=-1 if timeout is None else timeout):
            raise TimeoutError(f"{entry.source.path} was not read within {timeout:g} s; try again later")
        try:
            resident = self._remembered(entry)
            if resident is not None:
                return resident
            new = self.read(name, entry.source)
            if new.identity != entry.identity:
                raise ValueError(
                    f"{entry.source.path} is not what was added as {name!r} any more; replace({name!r}) takes what is there now"
                )
            with self._lock:
                self.reads += 1
                entry.last = new.last
                self._remembered(entry)
            return new.resident
        finally:
            entry.reading.release()

    def put(self, name: str, entry: Entry, instead: bool = False) -> bool:
        """Take an adapter, under a name that is free, or `instead` of one that has it; False where that is not so."""
        with self._lock:
            old = self._entries.get(name)
            if (old is not None) != instead:
                return False
            self._entries[name] = entry
            self._entries.move_to_end(name)
            self.keep(entry.resident)
            if old is not None:
                self.release(old.resident)
            self._make_room(entry)
            return True

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        with self._lock:
            entry = self._entries.pop(name, None)
            self.release(None if entry is None else entry.resident)

    @contextmanager
    def kept(self, residents: Iterable[Resident]) -> Iterator[None]:
        """Adapters stay in memory inside of the block."""
        residents = list(residents)
        for resident in residents:
            self.keep(resident)
        try:
            yield
        finally:
            for resident in residents:
                self.release(resident)

    def keep(self, resident: Resident | None) -> None:
        """Count one more user of what an adapter takes memory for."""
        with self._lock:
            for part in resident.parts if resident is not None else ():
                self._nbytes += part.nbytes * (not self._users[part])
                self._users[part] += 1

    def release(self, resident: Resident | None) -> None:
        """Count one user less; parts without one are dropped."""
        with self._lock:
            for part in resident.parts if resident is not None else ():
                self._users[part] -= 1
                if not self._users[part]:
                    del self._users[part]
                    self._nbytes -= part.nbytes
                    self._dropped(part)

    def _remembered(self, entry: Entry) -> Resident | None:
        """An adapter that is in memory, or that a request has which asked before it made room; it stays on the shelf then."""
        with self._lock:
            resident = entry.last()
            if entry.resident is None and resident is not None and entry in self._entries.values():
                entry.resident = resident
                self.keep(resident)
                self._make_room(entry)
            return resident

    def _make_room(self, but: Entry) -> None:
        for entry in list(self._entries.values()) if self._limit is not None else ():
            if self._nbytes <= self._limit:
                return
            if entry is not but and entry.resident is not None and self._users[entry.resident.values] == 1:
                self.release(entry.resident)
                entry.resident = None
                self.evictions += 1
