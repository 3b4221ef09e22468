"""A model whose calls go through a gate: no state of its weights changes while one runs, and an error releases them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from .gate import ANY, Gate
from .requests import Request


class Guarded:
    """Stands in for a method of a model, and holds the weights as they are while it runs."""

    def __init__(self, model: nn.Module, name: str, hold: Callable[[Hashable], AbstractContextManager[Request]]) -> None:
        self.model, self.name, self.hold, self.inner = model, name, hold, getattr(model, name)
        functools.update_wrapper(self, self.inner)

    @torch.compiler.disable(recursive=False)  # a lock is no part of a graph; what it guards is compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.hold(ANY) as request:
            inner = self.inner if request.rows is None else torch.compiler.disable(self.inner)  # graphs leave out new hooks
            return inner(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return plain_method(memo.get(id(self.model), self.model), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return plain_method, (self.model, self.name)


def plain_method(model: nn.Module, name: str) -> Callable[..., Any]:
    """The method of a model's class: what a copy of a guarded model has."""
    return types.MethodType(getattr(type(model), name), model)


def guard(model: nn.Module, gate: Gate, what: str, methods: Sequence[str] = ("forward",)) -> list[Guarded]:
    """Let calls of a model go through a gate: of `methods` those that it has.

    Raises:
        ValueError: Another pool or receiver guards its forward already.
    """
    if isinstance(model.__dict__.get("forward"), Guarded):
        raise ValueError(f"{what}: another pool or receiver holds this model; close it first")
    guarded = [Guarded(model, name, gate.hold) for name in methods if callable(getattr(type(model), name, None))]
    for method in guarded:
        setattr(model, method.name, method)
    return guarded


def unguard(guarded: Sequence[Guarded]) -> None:
    """Give a model its own methods back."""
    for method in guarded:
        model, name = method.model, method.name
        if model.__dict__.get(name) is method:
            delattr(model, name)
            if getattr(model, name) != method.inner:  # another tool's, which stood on the object
                setattr(model, name, method.inner)
