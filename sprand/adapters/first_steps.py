"""The first steps of training: gradients are summed for the choice of columns, nothing trains meanwhile, and they are chosen."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..layers import reads, sharding
from ..selection.batches import count_of
from ..selection.inputs import InputSums
from .waiting import Waiting, settle

BY_HAND = "call sprand.choose(model, batch) before training"

_running: weakref.WeakSet[Scoring] = weakref.WeakSet()
_hooks: list[Any] = []


class Scoring:
    """The sums of one model in its first steps of training, from its first forward until the one after the choice.

    A step is one of any optimizer with a parameter of the model, after a forward of it; what several optimizers do in turn is
    one, and so is what one does in parts (ZeRO-3). All gradients that such an optimizer holds are dropped before, so that nothing
    moves, no moments are made and nothing decays. Each step's sums count by the square of its examples: of a loss that is a mean
    over them, the gradient of each example's own loss is summed, as it is over batches of data.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.waiting: list[Waiting] = []
        self.sums: InputSums | None = None
        self.count = 0  # of steps that were summed
        self.examples = 0  # since the last of them

    def before_forward(self, model: nn.Module, waiting: list[Waiting], inputs: Any) -> None:
        """Let the backward of a forward that begins now add to the sums.

        Args:
            model: what is called.
            waiting: what is to be chosen in it.
            inputs: what it is called with.

        Raises:
            ValueError: FSDP1 has sharded the model, or its entries have moved already.
        """
        sharding.refuse_fsdp1(model, "the choice of columns")
        _refuse_moved(waiting)
        if _names(waiting) != _names(self.waiting):
            self._drop_scores()
            self.sums, self.count, self.examples = InputSums([one.site for one in waiting], waiting[0].score), 0, 0
        self.model, self.waiting = model, waiting
        for one in waiting:
            for target in one.targets:
                target.scores = self._scores_of(one)
        self.examples += count_of(inputs) or 1
        _running.add(self)
        if not _hooks:
            hook = torch.compiler.disable(_before_step, reason=f"sprand chooses columns in the first steps: {BY_HAND}")
            _hooks.append(register_optimizer_step_pre_hook(hook))

    def before_step(self, optimizer: torch.optim.Optimizer, closure: Any) -> None:
        """Let a step that begins now change nothing, and choose if it is the last one that is waited for.

        Raises:
            ValueError: The sums of the step cannot be told, or say nothing of a weight.
        """
        sharding.reshard(self.model)
        engine = _engine()
        held = [p for group in optimizer.param_groups for p in group["params"]]
        known = held if engine is None else engine.parameters()
        if not {id(p) for p in known} & {id(p) for p in self.model.parameters()}:
            return
        _refuse_step(optimizer, closure, engine)
        for p in held:
            p.grad = None
        if self.examples:
            self._end_step()

    def end(self) -> None:
        """Take no further part in any step."""
        self._drop_scores()
        _running.discard(self)
        if not _running:
            while _hooks:
                _hooks.pop().remove()

    def _scores_of(self, one: Waiting) -> Tensor:
        """What gathers the sums of a weight in the step that is under way."""
        scores, total = one.targets[0].scores, self.sums.values[one.site.name]
        if scores is None or scores.device != one.site.device:
            scores = torch.zeros_like(total, device=one.site.device, requires_grad=True)
        return scores

    def _end_step(self) -> None:
        for one in self.waiting:
            scores = one.targets[0].scores
            if scores.grad is not None:
                self.sums.called.add(one.site.name)
                self.sums.values[one.site.name] += scores.grad.to(self.sums.values[one.site.name].device) * self.examples**2
                scores.grad = None
        self.count, self.examples = self.count + 1, 0
        if self.count >= max(one.steps for one in self.waiting):
            self._choose()

    @torch.no_grad()
    def _choose(self) -> None:
        settle(self.waiting, self.sums, f"the gradients of the first {self.count} steps, in which nothing trained")
        self._drop_scores()

    def _drop_scores(self) -> None:
        for target in chain.from_iterable(one.targets for one in self.waiting):
            target.scores = None
        self.waiting = []


def _names(waiting: Sequence[Waiting]) -> list[tuple[str, str]]:
    return [(one.adapter, one.site.name) for one in waiting]


def _before_step(optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for scoring in list(_running):
        scoring.before_step(optimizer, kwargs.get("closure", args[1] if len(args) > 1 else None))


def _engine() -> nn.Module | None:
    """DeepSpeed's engine where one takes this step, whose optimizer holds parts of its parameters, and not these themselves."""
    frame = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if any(cls.__name__ == "DeepSpeedEngine" for cls in type(owner).__mro__):
            return owner
        frame = frame.f_back
    return None


def _refuse_moved(waiting: Sequence[Waiting]) -> None:
    for one in waiting:
        if any(type(delta.data) is Tensor and bool(delta.any()) for delta in one.site.deltas):
            raise ValueError(
                f"{one.site.name}: its entries changed before its columns were chosen, by a step that is none of torch.optim; "
                f"{BY_HAND}"
            )


def _refuse_step(optimizer: torch.optim.Optimizer, closure: Any, engine: nn.Module | None) -> None:
    """Refuse steps in which gradients are scaled, or are made after all hooks have looked."""
    by_scaler = torch.amp.GradScaler._maybe_opt_step.__code__
    is_scaled = getattr(optimizer, "found_inf", None) is not None or reads.is_running(by_scaler)
    what = None
    if closure is not None:
        what = "a step with a closure, which makes its gradients inside"
    elif torch._C._current_graph_task_id() != -1:
        what = "a step inside of backward"
    elif is_scaled or getattr(getattr(engine, "optimizer", None), "loss_scale", 1.0) != 1.0:
        what = "gradients that a GradScaler, or DeepSpeed, has scaled"
    if what is not None:
        raise ValueError(f"the choice of columns in the first steps: {what}, cannot be summed; {BY_HAND}")
