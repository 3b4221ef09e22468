"""The first training forward of a model with columns that wait: it chooses them, or begins to sum what chooses them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import sharding
from ..selection.batches import call, loss_of, mapped
from ..selection.flow import inputs_of
from ..selection.inputs import InputSums
from ..selection.untouched import untouched
from .first_steps import Scoring
from .waiting import Waiting, doors, found, settle

BY_HAND = "call sprand.choose(model, batch) first, on every rank"


def watch(model: nn.Module, scoring: Scoring) -> None:
    """Let the forwards of a model in training mode, with gradients, choose what waits."""
    if _hook() not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_hook(), prepend=True, with_kwargs=True)
        model.register_state_dict_pre_hook(_refuse_state)
        model._sprand_scoring = scoring


def choose(model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor] | None = None) -> nn.Module:
    """Choose the columns that wait for the first training forward, or for the first steps, by one batch, without training.

    Of several processes each calls this, with a batch of its own; they agree. It is for `torch.compile(fullgraph=True)`, for
    models that are sharded before their first forward, and wherever the first batch of training is not the one to choose by.

    Args:
        model: of `sprand.apply(model, layout="columns", strategy="activation")` without data, or of PEFT with such a config.
        batch: what the model takes: a tensor, a tuple, or a mapping. Labels play a part where gradients choose
            (`"token_fisher"`).
        loss_fn: `loss_fn(model, batch)` gives the loss for these; by default it is that of the model's output.

    Returns:
        The same object.

    Raises:
        ValueError: Nothing waits, the model is sharded, a layer is not called on this batch, or the model gives no loss.
    """
    waiting = found(model)
    if not waiting:
        raise ValueError("choose: no columns of this model wait to be chosen; they were chosen already, or drawn, or given")
    device = next(model.parameters()).device
    batch = mapped(batch, lambda tensor: tensor.to(device))
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    at_once, by_gradients = _divided(waiting)
    if at_once:
        _choose(model, at_once, lambda: call(plain, inputs_of(plain, batch, has_loss=False)))
    if by_gradients:
        _choose(model, by_gradients, lambda: loss_of(plain, batch, loss_fn, 0).backward())
    for module in model.modules():
        _look_no_further(module)
    return model


def _divided(waiting: Sequence[Waiting]) -> tuple[list[Waiting], list[Waiting]]:
    """What one forward can choose, and what waits for gradients."""
    return [one for one in waiting if not one.steps], [one for one in waiting if one.steps]


@functools.cache
def _hook() -> Callable[..., None]:
    """What looks before a forward; no compiler does."""
    return torch.compiler.disable(_look, reason=f"sprand chooses columns at the first training forward: {BY_HAND}")


def _look(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Before a forward: choose, if it is one that trains. Where nothing waits any more, look no further."""
    if not module.training or not torch.is_grad_enabled():
        return
    if getattr(module, "_is_replica", False):
        raise ValueError(f"columns cannot be chosen in a replica of nn.DataParallel; {BY_HAND}")
    at_once, by_gradients = _divided(found(module))
    if at_once:
        _choose(module, at_once, lambda: module(*args, **kwargs))
    scoring = getattr(module, "_sprand_scoring", None)  # None where compiled code calls a hook that is gone
    if by_gradients:
        scoring.before_forward(module, by_gradients, (args, dict(kwargs)))
    elif scoring is not None:
        scoring.end()
    _look_no_further(module)


def _look_no_further(module: nn.Module) -> None:
    """Take the hook off a module in which nothing waits any more, of any adapter."""
    keys = [key for key, hook in module._forward_pre_hooks.items() if hook is _hook()]
    if not keys or any(door.any(inner) for inner in module.modules() for door in doors):
        return
    for key in keys:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [key for key, hook in module._state_dict_pre_hooks.items() if hook is _refuse_state]:
        del module._state_dict_pre_hooks[key]
    module._sprand_scoring.end()
    del module._sprand_scoring


def _refuse_state(module: nn.Module, *_: Any) -> None:
    """Refuse a state while columns are being chosen: sums of the steps so far are in none.

    Raises:
        ValueError: They are.
    """
    if module._sprand_scoring.waiting and found(module):
        raise ValueError(
            "state_dict: the columns of this model are being chosen in the first steps of training, and a run that starts from "
            "here would choose others; save after these steps (score_steps), or call sprand.choose(model, batch) before training"
        )


def _choose(model: nn.Module, waiting: Sequence[Waiting], run: Callable[[], Any]) -> None:
    sharding.refuse(model, "the choice of columns", f"before the model is sharded {BY_HAND}")
    sums, by_gradients = InputSums([one.site for one in waiting], waiting[0].score), waiting[0].steps > 0
    with untouched(model, checkpointing=by_gradients), torch.set_grad_enabled(by_gradients), sums.listening():
        run()
    settle(waiting, sums, "what came into them")
