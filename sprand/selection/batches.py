"""Batches for calibration: read as often as needed, moved to the model, counted, split into examples; and their loss."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .targets import HEADS, output_of
from .untouched import random_states, set_random_states


class Batches:
    """Every pass gives the same batches, as pairs of their number of examples and the batch on the model's device.

    Args:
        model: where the batches go.
        data: any iterable of batches: tensors, or tuples, lists and mappings with tensors, the first dimension the examples.
        examples: stop after the batch that reaches as many; None reads all.
        passes: how often it will be read.

    Raises:
        ValueError: No data is given, or an iterator where several passes are needed.
    """

    def __init__(self, model: nn.Module, data: Iterable[Any] | None, examples: int | None, passes: int) -> None:
        if data is None:
            raise ValueError("data: this strategy needs batches to calibrate on, got None; give data=, a list or a DataLoader")
        if passes > 1 and isinstance(data, Iterator):
            raise ValueError(
                f"data: {passes} passes are needed, and an iterator can be read once, got {type(data).__name__}; give a list or "
                "a DataLoader, or raise calibration_memory"
            )
        self.data, self.examples, self.passes, self.done = data, examples, passes, 0
        self.device = next(model.parameters()).device
        self._states = random_states()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        set_random_states(self._states)
        self.done += 1
        seen = 0
        for batch in _shown(self.data, f"calibration {self.done}/{self.passes}"):
            batch = mapped(batch, lambda tensor: tensor.to(self.device))
            count = count_of(batch)
            if count is None:
                raise ValueError(f"data: expected batches with tensors, got {type(batch).__name__} without any")
            if count == 0:
                continue
            yield count, batch
            seen += count
            if self.examples is not None and seen >= self.examples:
                break
        if not seen:
            raise ValueError("data: expected at least one batch with examples, got none (an iterator that was read before?)")


def loss_of(model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor] | None, number: int) -> Tensor:
    """The loss of a batch: `loss_fn(model, batch)`, or what the model gives as its own.

    Raises:
        ValueError: The model gives no loss, or what `loss_fn` gives is no number that depends on the weights.
    """
    if loss_fn is not None:
        loss = loss_fn(model, batch)
    else:
        output = call(model, batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                f"data: the model gives no loss for batch {number}; expected batches with labels, or give loss_fn(model, batch)"
            )
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss: expected one number that depends on the targeted weights, got {got} for batch {number}")
    return loss.reshape(())


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: keywords from a mapping, positions from a tuple or list."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def count_of(batch: Any) -> int | None:
    """How many examples a batch has, by the first dimension of its first tensor; None of one without any."""
    first = next(_tensors(batch), None)
    return None if first is None else first.shape[0] if first.dim() else 1


def split(batch: Any, count: int) -> Iterator[Any]:
    """The examples of a batch, each as a batch of one."""
    for i in range(count):
        yield mapped(batch, lambda t, i=i: t[i : i + 1] if t.dim() and t.shape[0] == count else t)


@contextmanager
def scaled_logits(model: nn.Module, temperature: float, own_loss: bool) -> Iterator[None]:
    """Divide the logits by `temperature`: what the model returns, or, for its own loss, what its head gives.

    Raises:
        ValueError: The model computes its own loss and has no known head, or does not call it.
    """
    if temperature == 1.0:
        yield
        return
    calls = []

    def scale(module: nn.Module, inputs: Any, output: Any) -> Any:
        calls.append(None)
        if isinstance(output, Tensor):
            return output / temperature
        output.logits = output.logits / temperature
        return output

    where = _head_of(model) if own_loss else model
    hint = "give loss_fn(model, batch), or strategy_options={'temperature': 1.0}"
    if where is None:
        raise ValueError(f"temperature: expected a model with an output head to divide the logits of; {hint}")
    handle = where.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise ValueError(f"temperature: the model reads the weight of its output head without calling it; {hint}")


def _head_of(model: nn.Module) -> nn.Module | None:
    head = output_of(model)
    if head is not None:
        return head
    return next((module for name, module in model.named_modules() if name.rpartition(".")[2] in HEADS), None)


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch whose tensors are those of `batch`, each changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [mapped(value, change) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def _shown(data: Iterable[Any], text: str) -> Iterable[Any]:
    """The data behind a progress bar, where tqdm is installed and standard error is a terminal."""
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return data
    return importlib.import_module("tqdm").tqdm(data, desc=text, leave=False)
