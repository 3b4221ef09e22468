"""A fair lock on what a model's weights hold: requests for one state run together, those for another wait for their turn."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import torch

from .requests import Request, belonging, current, follow_threads, of_gate

ANY = object()  # the wish of a forward that takes the weights as they are


class Gate:
    """Lets requests use a state of the weights together, and changes the state only while nobody is inside.

    A request belongs to its context: coroutines and threads that are started inside of a block are inside as well, and those that
    outlive it ask for its state again. Requests are served in the order in which they came, all for one state together, so that
    none waits for ever. A forward that belongs to no request enters at once while a block is open, as part of what goes on there.

    Args:
        change: makes the weights hold the state of a wish, and sets `state`; called while nobody is inside.
        devices: of the weights. On a GPU a change is ordered behind the kernels of forwards that left before, on any stream.
        delay: for how many seconds a request may be passed by later ones for the present state.

    Attributes:
        state: what the weights hold now.
        requests: how many were let in.
        waited_seconds: by all of them.
    """

    def __init__(self, change: Callable[[Any], None], devices: Iterable[torch.device] = (), delay: float = 0.0) -> None:
        self.state: Any = None
        self.requests, self.waited_seconds = 0, 0.0
        self._change, self._delay = change, delay
        self._lock = threading.RLock()
        self._waiting: deque[Request] = deque()
        self._inside: set[Request] = set()
        self._devices = sorted({device for device in devices if device.type == "cuda"}, key=str)
        self._used: dict[tuple[torch.device, int], torch.cuda.Event] = {}
        self._written: list[tuple[torch.device, torch.cuda.Event]] = []
        follow_threads()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def held(self) -> Any:
        """What the request holds that this context belongs to; `ANY` where it belongs to none that is inside."""
        own = of_gate(self)
        return self.state if own is not None and own.users else ANY

    @contextmanager
    def hold(self, wish: Hashable, timeout: float | None = None, rows: Any = None) -> Iterator[Request]:
        """The weights hold `wish` inside of the block; with `ANY` they stay what they are.

        What belongs to a request that is inside enters again at once.

        Args:
            wish: a state.
            timeout: seconds to wait at most; None for no limit.
            rows: which adapters the rows of a batch use, where they use several.

        Raises:
            RuntimeError: This request holds another state; or this coroutine would wait for others of its event loop, and keep it
                from running them.
            TimeoutError: The turn did not come in time.
        """
        request = self._joined(wish, rows)
        if request is None:
            done = threading.Event()
            request = self._asked(wish, done.set, rows)
            try:
                if not done.is_set():
                    self._refuse_own_loop(request)
                    if not done.wait(timeout):
                        raise self._late(timeout)
            except BaseException:
                self._withdraw(request)
                raise
        with self._block_of(request):
            yield request

    @asynccontextmanager
    async def hold_async(self, wish: Hashable, timeout: float | None = None, rows: Any = None) -> AsyncIterator[Request]:
        """As `hold`, for a coroutine: its event loop goes on while it waits."""
        request = self._joined(wish, rows)
        if request is None:
            loop = asyncio.get_running_loop()
            done: asyncio.Future[None] = loop.create_future()

            def wake() -> None:
                loop.call_soon_threadsafe(lambda: done.done() or done.set_result(None))

            request = self._asked(wish, wake, rows)
            try:
                await asyncio.wait_for(done, timeout)
            except TimeoutError:
                self._withdraw(request)
                raise self._late(timeout) from None
            except BaseException:
                self._withdraw(request)
                raise
        with self._block_of(request):
            yield request

    @contextmanager
    def _block_of(self, request: Request) -> Iterator[None]:
        """The block belongs to a request, which leaves at its end."""
        before = self._entered(request)
        try:
            yield
        finally:
            current.set(before)
            self._leave(request)

    def _joined(self, wish: Hashable, rows: Any) -> Request | None:
        """The request that this context belongs to, used once more; None where it has to ask."""
        with self._lock:
            own = of_gate(self)
            if own is None or not own.users:
                return None
            if wish is not ANY and (wish != self.state or rows is not own.rows):
                raise RuntimeError(
                    "this request is inside of a block or a forward that uses the weights as they are; leave it first (what a "
                    "block starts, threads and tasks, belongs to it)"
                )
            own.users += 1
            return own

    def _asked(self, wish: Hashable, wake: Callable[[], None], rows: Any) -> Request:
        """A new request in the queue, which may have been let in at once."""
        own = of_gate(self)
        if own is not None and wish is ANY:
            wish, rows = own.wish, own.rows
        request = Request(self, wish, wake, rows)
        with self._lock:
            self._waiting.append(request)
            try:
                self._admit()
            except BaseException:
                self._withdraw(request)
                raise
        return request

    def _entered(self, request: Request) -> tuple[Request, ...]:
        """Let this context belong to a request that was let in; returns what it belonged to before.

        Raises:
            BaseException: What kept the weights from holding its state.
        """
        if request.error is not None:
            raise request.error
        for device, event in self._written if not _captures() else ():
            torch.cuda.current_stream(device).wait_event(event)
        before = current.get()
        current.set(belonging(request))
        return before

    def _leave(self, request: Request) -> None:
        with self._lock:
            for device in self._devices if not _captures() else ():
                stream = torch.cuda.current_stream(device)
                self._used[device, stream.cuda_stream] = stream.record_event()
            self._release(request)

    def _release(self, request: Request) -> None:
        request.users -= 1
        if not request.users:
            self._inside.remove(request)
            self._admit()

    def _withdraw(self, request: Request) -> None:
        """Take back a request, wherever it is."""
        with self._lock:
            if request in self._waiting:
                self._waiting.remove(request)
                self._admit()
            elif request.users:
                self._release(request)

    def _late(self, timeout: float | None) -> TimeoutError:
        return TimeoutError(
            f"the weights were not free within {timeout:g} s: {len(self._inside)} requests use what they hold, "
            f"{self.waiting} wait; try again later, or give a longer timeout"
        )

    def _refuse_own_loop(self, request: Request) -> None:
        """Prove that this thread may sleep: what it waits for is not run by its own event loop."""
        if request.loop is None:
            return
        with self._lock:
            before = [other for other in (*self._inside, *self._waiting) if other is not request]
        if any(other.loop is request.loop for other in before):
            raise RuntimeError(
                "this would stop the event loop that has to finish what it waits for; in coroutines write "
                "`async with pool.use_async(name)`, and call the model by `await asyncio.to_thread(...)`"
            )

    def _admit(self) -> None:
        """Let in all whose turn it is, and change the state for the first of them where nobody is inside."""
        interrupt = None
        while self._waiting:
            first = self._waiting[0]
            if not self._suits(first) and not self._inside:
                error = self._turn(first)
                interrupt = error if error is not None and not isinstance(error, Exception) else interrupt
                if error is not None:
                    continue
            together = self._next(first)
            if not together:
                break
            for request in together:
                self._let_in(request)
        if interrupt is not None:
            raise interrupt

    def _next(self, first: Request) -> list[Request]:
        """Who may enter now, by the order of the queue, the present state, and whether a block is open."""
        if self._suits(first):
            return [other for other in self._waiting if other.wish == first.wish]
        if time.monotonic() - first.since < self._delay:
            return [other for other in self._waiting if self._suits(other)]
        is_open = any(request.wish is not ANY for request in self._inside)
        return [other for other in self._waiting if other.wish is ANY] if is_open else []

    def _suits(self, request: Request) -> bool:
        return request.wish is ANY or request.wish == self.state

    def _turn(self, request: Request) -> BaseException | None:
        """Change the state, which nobody uses; an error is that of the request."""
        for (device, _), event in self._used.items():
            torch.cuda.current_stream(device).wait_event(event)
        try:
            self._change(request.wish)
        except BaseException as error:
            self._waiting.remove(request)
            request.error = error
            _wake(request)
            return error
        finally:
            self._used.clear()
            self._written = [(device, torch.cuda.current_stream(device).record_event()) for device in self._devices]
        return None

    def _let_in(self, request: Request) -> None:
        self._waiting.remove(request)
        request.users = 1
        self._inside.add(request)
        self.requests += 1
        self.waited_seconds += time.monotonic() - request.since
        if not _wake(request):
            self._inside.remove(request)


def _wake(request: Request) -> bool:
    """Tell a request that it was let in or refused; False where the event loop that it waits in is closed."""
    try:
        request.wake()
    except RuntimeError:
        return False
    return True


def _captures() -> bool:
    """Whether a CUDA graph is captured, which may not wait for what is outside of it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
