"""The first backward through a model: it says, once, to which trained entries it gave no gradient."""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import reads
from .sites import Site, sites_of

_IN_BACKWARD = torch.autograd.function.BackwardCFunction.apply.__code__

_waiting: list[Watch] = []  # for a step of an optimizer
_hooks: list[object] = []


def watch(model: nn.Module) -> None:
    """Have it said where entries of a model get no gradient: now, if that can be seen, or in the first backward."""
    reads.tell_of_holders(model, {id(site.weight): site.name for site in sites_of(model) if site.weight is not None})
    Watch(model)


class Watch:
    """Looks, when the first backward of a model ends, for entries without a gradient. Nothing of it is left then.

    A backward inside of another one (reentrant checkpointing) ends before the outer one: where all gradients come from such,
    the first step of an optimizer looks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.met: set[int] = set()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.handles = [p.register_post_accumulate_grad_hook(self.note) for p in trained]

    def note(self, p: Tensor) -> None:
        """A parameter has its gradient."""
        self.met.add(id(p))
        if not reads.is_running(_IN_BACKWARD):
            torch.autograd.Variable._execution_engine.queue_callback(self.look)
        elif self not in _waiting:
            _waiting.append(self)
            if not _hooks:
                _hooks.append(register_optimizer_step_pre_hook(_look))

    def look(self) -> None:
        """Warn of entries without a gradient, the first time."""
        model, is_first = self.model(), bool(self.handles)
        while self.handles:
            self.handles.pop().remove()
        if model is None or not is_first:
            return
        sites = sites_of(model)
        names = [site.name for site in sites if self._is_missed(site)]
        if names:
            listed = ", ".join(names[: reads.NAMED]) + (", ..." if len(names) > reads.NAMED else "")
            warnings.warn(
                f"sprand: the first backward gave the entries of {len(names)} of {len(sites)} weights no gradient: {listed}. "
                "Either this loss does not depend on them (an expert that no token came to, a part that is not used), or code "
                "reads these weights past their modules, and they will never train; leave out what is not to train "
                "(exclude_modules)",
                stacklevel=2,
            )

    def _is_missed(self, site: Site) -> bool:
        return all(p.requires_grad and p.grad is None and id(p) not in self.met for p in site.deltas)


def _look(*_: object) -> None:
    """Before an optimizer steps, all backwards before it have ended."""
    while _waiting:
        _waiting.pop().look()
