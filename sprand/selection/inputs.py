"""Scores of inputs: what comes into linear layers, summed over tokens as batches go through; no weight gets a gradient."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..layers.scores import sums_over_tokens
from ..layers.sites import Site, is_linear
from .batches import Batches, call, loss_of
from .flow import inputs_of

SCORES = ("activation", "token_fisher")  # fields of Stats


def has_inputs(site: Site) -> bool:
    """Whether every module that holds the weight is a linear layer, which is called with the inputs that its columns read."""
    linear = site.backend is not None or all(is_linear(module) for module, _ in site.owners)
    return linear and site.column_axis is not None


class InputSums:
    """Sums over tokens, for each input of the linear layers of some targets.

    Args:
        sites: the targets, see `has_inputs`.
        score: `"activation"`: of the squares of the input; `"token_fisher"`: of these, times the squared length of the token's
            gradient at the output. Each token has a gradient of its own, so this is the sum over a column of the squares of the
            gradients of its entries, had every token been an example.

    Attributes:
        values: `[inputs]`, float64, by the name of the target.
        called: names of the targets whose layers were called.
    """

    def __init__(self, sites: Sequence[Site], score: str) -> None:
        self.sites, self.score = sites, score
        self.values = {site.name: torch.zeros(site.units.count, dtype=torch.float64, device=site.device) for site in sites}
        self.called: set[str] = set()
        self._weight = 1.0

    def collect(self, model: nn.Module, batches: Batches, loss_fn: Any) -> int:
        """Sum over batches, and divide by the number of examples, which is returned.

        Raises:
            ValueError: A target was not called, or its inputs or gradients were not finite.
        """
        examples = 0
        with self.listening():
            for number, (count, batch) in enumerate(batches):
                if self.score == "token_fisher":
                    self._weight = float(count) ** 2  # of the gradients of a mean over as many examples
                    loss_of(model, batch, loss_fn, number).backward()
                else:
                    _forward(model, batch, loss_fn)
                examples += count
        self.finish(examples)
        return examples

    def agree(self) -> None:
        """Add up the sums of all ranks; a layer is called if it is on any of them."""
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return
        values = list(self.values.values())
        called = torch.tensor([float(name in self.called) for name in self.values], dtype=torch.float64, device=values[0].device)
        flat = torch.cat([called, *(value.to(called.device) for value in values)])
        distributed.all_reduce(flat)
        counts, *parts = flat.split([len(values), *map(len, values)])
        self.called = {name for name, count in zip(self.values, counts.tolist(), strict=True) if count}
        for value, part in zip(values, parts, strict=True):
            value.copy_(part)

    def finish(self, examples: int) -> None:
        """Divide by the number of examples.

        Raises:
            ValueError: A target was not called, or its inputs or gradients were not finite.
        """
        for site in self.sites:
            if site.name not in self.called:
                raise ValueError(
                    f"strategy {self.score!r}: the layer of {site.name} was not called on this data (another module may read its "
                    "weight, or no token came to it); leave it out by exclude_modules, or give more data"
                )
            value = self.values[site.name].div_(examples)
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"calibration: the inputs of {site.name}, or the gradients at its output, are not finite; look at the data, "
                    "or load the model in bfloat16 or float32"
                )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, every call of a target's layer adds to its sums."""
        with ExitStack() as stack:
            for site in self.sites:
                for module, _ in site.owners:
                    hook = functools.partial(self._see, site.name)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _see(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        self.called.add(name)
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if self.score == "activation":
            self._add(name, x, None)
            return None
        if not torch.is_grad_enabled():  # the first of two runs of a layer that is checkpointed
            return None
        if not output.requires_grad:
            output = output + output.new_zeros((), requires_grad=True)
        version = x._version

        def take(grads: Sequence[Tensor | None]) -> None:
            if grads[0] is None:
                return
            if x._version != version:
                raise ValueError(
                    f"strategy {self.score!r}: the input of {name} was changed in place after it was read; make that operation "
                    "one that is not in place, or leave the layer out by exclude_modules"
                )
            self._add(name, x, grads[0])

        _made_by(output).register_prehook(take)
        return output

    def _add(self, name: str, x: Tensor, grad: Tensor | None) -> None:
        """Add the sums over the tokens of an input `[..., inputs]`."""
        total = self.values[name]
        total += (sums_over_tokens(x, grad) * self._weight).to(total.device)


def _made_by(output: Tensor) -> Any:
    """The node of the graph that makes an output; a later operation in place does not move it, as it does that of a view."""
    base = output._base if output._is_view() else None
    return output.grad_fn if base is None or base.numel() != output.numel() else base.grad_fn


def _forward(model: nn.Module, batch: Any, loss_fn: Any) -> None:
    with torch.no_grad():
        if loss_fn is not None:
            loss_fn(model, batch)
        else:
            call(model, inputs_of(model, batch, has_loss=False))
