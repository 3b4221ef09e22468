"""Requests for what a model's weights hold: whose they are, and how threads that are started by one belong to it."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

POOLS_OF_THREADS = ("concurrent.futures.thread", "multiprocessing.pool")  # whose threads work for whoever asks

current: ContextVar[tuple[Request, ...]] = ContextVar("sprand_requests", default=())  # of this context, one for each gate


class Request:
    """One wish for the state of the weights: it waits, then is inside for as long as anyone uses it.

    Args:
        gate: the gate that it is for.
        wish: what the weights are to hold.
        wake: called once, when it was let in or refused.
        rows: which adapters the rows of its batches use, where they use several.

    Attributes:
        users: blocks and forwards that use it now; 0 before it is let in and after the last has left.
        error: why it was refused.
        since: when it came, in seconds of the monotonic clock.
        loop: the event loop that ran it, None outside of coroutines.
    """

    def __init__(self, gate: Any, wish: Hashable, wake: Callable[[], None], rows: Any = None) -> None:
        self.gate, self.wish, self.wake, self.rows = gate, wish, wake, rows
        self.users = 0
        self.error: BaseException | None = None
        self.since = time.monotonic()
        self.loop = asyncio._get_running_loop()


def of_gate(gate: Any) -> Request | None:
    """The request to a gate that this context belongs to; the last one where it was left already."""
    return next((request for request in current.get() if request.gate is gate), None)


def belonging(request: Request) -> tuple[Request, ...]:
    """What `current` is in a context that belongs to a request."""
    return (request, *(other for other in current.get() if other.gate is not request.gate))


@functools.cache
def follow_threads() -> None:
    """From now on a thread belongs to the requests of whoever starts it, and a job of an executor to those of whoever submits it.

    Coroutines and `asyncio.to_thread` inherit the context by themselves; threads do not before Python 3.14, and executors never.
    Threads of a pool work for all: a request that happens to start one does not own it.
    """
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    @functools.wraps(start)
    def started(self: threading.Thread) -> None:
        requests = current.get()
        if not requests:
            return start(self)
        target, before = getattr(self, "_target", None), vars(self).get("run")
        works_for_all = getattr(target, "__module__", None) in POOLS_OF_THREADS
        run = self.run

        def run_for_them() -> None:
            _undo(self, before)
            _called(() if works_for_all else requests, run)

        self.run = run_for_them  # type: ignore[method-assign]
        try:
            return start(self)
        except BaseException:
            _undo(self, before)
            raise

    @functools.wraps(submit)
    def submitted(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        requests = current.get()
        return submit(self, functools.partial(_called, requests, fn) if requests else fn, *args, **kwargs)

    threading.Thread.start, ThreadPoolExecutor.submit = started, submitted  # type: ignore[method-assign]


def _undo(thread: threading.Thread, before: Callable[[], None] | None) -> None:
    """Give a thread the `run` that it had: its class's, or one of its own."""
    vars(thread).pop("run", None)
    if before is not None:
        thread.run = before  # type: ignore[method-assign]


def _called(requests: tuple[Request, ...], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token = current.set(requests)
    try:
        return call(*args, **kwargs)
    finally:
        current.reset(token)
