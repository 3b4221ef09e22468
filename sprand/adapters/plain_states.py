"""States of a plain model: a new base where no entries are asked for, else refused before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..layers.attached import AttachedModule
from ..layers.module import sparse_modules
from ..layers.sites import joined, plain_name
from .in_full import take_base, take_unfrozen
from .state import State, known_state, tensor_names


def watch(model: nn.Module, state: State) -> None:
    """Look at every state that the model is to load."""
    before, after = model.register_load_state_dict_pre_hook(_prove), model.register_load_state_dict_post_hook(_forgive)
    state.handles += [before, after]


def _prove(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a state is loaded, refuse a plain one, or let it be a new base.

    Raises:
        ValueError: All of the model's state is asked for.
    """
    state = known_state(model)
    if state is None:
        return
    take_unfrozen(model, state)  # while it holds its base
    if state.takes_plain_states:
        return
    if not _is_strict():
        given = {plain_name(name.removeprefix(prefix)): value for name, value in state_dict.items()}
        if not any("sprand_" in name for name in given):
            take_base(model, state, given)
        return
    for name, module in sparse_modules(model):
        if not isinstance(module, AttachedModule):
            continue
        inside = f"{prefix}{name}." if name else prefix
        for parameter in module.without_entries(state_dict, inside):
            raise ValueError(
                f"load_state_dict: the state has {joined(name, parameter)} and none of the entries that train there, as that of "
                "a plain model; to resume a Trainer give it SparseCheckpointCallback, load an adapter by sprand.load(model, "
                "path), or take the state as a new base by load_state_dict(state, strict=False)"
            )


def _is_strict() -> bool:
    """Whether the `load_state_dict` that calls this asks for all keys: torch tells its hooks nothing of that."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
        frame = frame.f_back
    return frame is not None and frame.f_locals["strict"]


def _forgive(model: nn.Module, keys: Any) -> None:
    """Let a state that was expected without entries lack nothing."""
    state = known_state(model)
    if state is not None and state.takes_plain_states:
        own = set(chain.from_iterable(tensor_names(model)))
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in own]
