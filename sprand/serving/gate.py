"""A fair lock on what a model's weights hold: forwards of one state run together, another state waits for its turn."""

from __future__ import annotations

import functools
import threading
import types
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

ANY = object()  # the wish of a forward that takes the weights as they are


class _Ticket:
    """One waiting thread."""

    def __init__(self, wish: Hashable) -> None:
        self.wish, self.inside = wish, False


class Gate:
    """Lets threads use a state of the weights together, and changes the state only while no thread is inside.

    Threads are served in the order in which they came, so that none waits for ever: while one waits for another state, new
    threads that want the present one queue behind it. With the thread whose turn has come all those enter that wait for the same
    state at that moment.

    Args:
        change: makes the weights hold the state of a wish, and sets `state`; called while no thread is inside.
        devices: of the weights. On a GPU a change is ordered behind the kernels of forwards that left before, on any stream.

    Attributes:
        state: what the weights hold now.
    """

    def __init__(self, change: Callable[[Any], None], devices: Iterable[torch.device] = ()) -> None:
        self.state: Any = None
        self._change = change
        self._changed = threading.Condition()
        self._waiting: deque[_Ticket] = deque()
        self._inside = 0
        self._own = threading.local()
        self._devices = sorted({device for device in devices if device.type == "cuda"}, key=str)
        self._used: dict[tuple[torch.device, int], torch.cuda.Event] = {}
        self._written: list[tuple[torch.device, torch.cuda.Event]] = []

    @contextmanager
    def hold(self, wish: Hashable) -> Iterator[None]:
        """The weights hold `wish` inside of the block; with `ANY` they stay what they are.

        A thread that is inside already enters again at once.

        Raises:
            RuntimeError: This thread holds another state.
        """
        depth = getattr(self._own, "depth", 0)
        if not depth:
            self._enter(wish)
        elif wish is not ANY and wish != self.state:
            raise RuntimeError("this thread is inside of a block or a forward that uses the weights as they are; leave it first")
        self._own.depth = depth + 1
        try:
            yield
        finally:
            self._own.depth = depth
            if not depth:
                self._leave()

    def _enter(self, wish: Hashable) -> None:
        ticket = _Ticket(wish)
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._admit()
                while not ticket.inside:
                    if self._waiting[0] is ticket and not self._inside:
                        self._turn(ticket)
                    else:
                        self._changed.wait()
            except BaseException:
                if ticket.inside:
                    self._inside -= 1
                else:
                    self._waiting.remove(ticket)
                self._admit()
                raise
            for device, event in self._written if not _captures() else ():
                torch.cuda.current_stream(device).wait_event(event)

    def _leave(self) -> None:
        with self._changed:
            for device in self._devices if not _captures() else ():
                stream = torch.cuda.current_stream(device)
                self._used[device, stream.cuda_stream] = stream.record_event()
            self._inside -= 1
            self._admit()

    def _turn(self, ticket: _Ticket) -> None:
        """Change the state, which nobody uses, and let in all that wait for it."""
        for (device, _), event in self._used.items():
            torch.cuda.current_stream(device).wait_event(event)
        self._change(ticket.wish)
        self._used.clear()
        self._written = [(device, torch.cuda.current_stream(device).record_event()) for device in self._devices]
        for other in [other for other in self._waiting if other.wish == ticket.wish]:
            self._let_in(other)
        self._admit()

    def _admit(self) -> None:
        """Let in those at the head of the queue whom the state suits, and wake all others to look whether it is their turn."""
        while self._waiting and (self._waiting[0].wish is ANY or self._waiting[0].wish == self.state):
            self._let_in(self._waiting[0])
        self._changed.notify_all()

    def _let_in(self, ticket: _Ticket) -> None:
        self._waiting.remove(ticket)
        ticket.inside = True
        self._inside += 1


def _captures() -> bool:
    """Whether a CUDA graph is captured, which may not wait for what is outside of it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class GuardedForward:
    """Stands in for the forward of a model: no state of the weights changes while it runs, and an error releases them."""

    def __init__(self, model: nn.Module, hold: Callable[[Hashable], AbstractContextManager[None]]) -> None:
        self.model, self.hold, self.inner = model, hold, model.forward
        functools.update_wrapper(self, self.inner)

    @torch.compiler.disable(recursive=False)  # a lock is no part of a graph; what it guards is compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.hold(ANY):
            return self.inner(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return plain_forward(memo.get(id(self.model), self.model))

    def __reduce__(self) -> tuple[Any, ...]:
        return plain_forward, (self.model,)


def plain_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward of a model's class: what a copy of a guarded model has."""
    return types.MethodType(type(model).forward, model)


def guard(model: nn.Module, gate: Gate, what: str) -> GuardedForward:
    """Let every forward of `model` go through a gate.

    Raises:
        ValueError: Another pool or receiver guards its forward already.
    """
    if isinstance(model.__dict__.get("forward"), GuardedForward):
        raise ValueError(f"{what}: another pool or receiver holds this model; close it first")
    forward = GuardedForward(model, gate.hold)
    model.forward = forward
    return forward


def unguard(forward: GuardedForward) -> None:
    """Give a model its own forward back."""
    model = forward.model
    if model.__dict__.get("forward") is forward:
        del model.forward
        if model.forward != forward.inner:  # another tool's, which stood on the object
            model.forward = forward.inner
