"""Nested state on disk, such as an optimizer's `state_dict`: tensors as safetensors, the rest as JSON, and back, to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import described

KEY = "sprand_state"
SCALARS = (bool, int, str, type(None))


def write(file: Path, kind: str, state: Mapping[str, Any]) -> None:
    """Write a state in one atomic step.

    Args:
        file: where to; its folder is made if it is not there.
        kind: what the state is of; `read` asks for the same.
        state: dicts, lists, tuples, tensors, numbers, texts and None, nested.

    Raises:
        OSError: The file cannot be written; one that was there is untouched.
        TypeError: The state holds something else.
    """
    tensors: dict[str, Tensor] = {}
    described.write(file, KEY, {"kind": kind, "state": _packed(state, tensors)}, tensors)


def read(file: Path, kind: str) -> dict[str, Any]:
    """A state written by `write`: equal in every type and bit, its tensors on the CPU.

    Raises:
        FileNotFoundError: No such file exists.
        ValueError: The file is damaged, or holds the state of something else.
    """
    description, tensors = described.read(file, KEY, "state")
    if description.get("kind") != kind:
        raise ValueError(f"{file} holds the state of {str(description.get('kind'))[:80]!r}, expected that of {kind!r}")
    try:
        state = _unpacked(description.get("state"), tensors)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} is damaged: expected a state of named parts, got {type(state).__name__}")
    return state


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The same in JSON types: what JSON has not is an object of one field that names its kind."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) in SCALARS:
        return value
    if isinstance(value, list):
        return [_packed(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_packed(item, tensors) for item in value]}
    if isinstance(value, Mapping) and all(type(key) in (int, str) for key in value):
        return {"dict": [[key, _packed(item, tensors)] for key, item in value.items()]}
    raise TypeError(f"a state can hold dicts, lists, tuples, tensors, numbers, texts and None, got {type(value).__name__}")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if type(value) in (*SCALARS, float):
        return value
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "tensor" and isinstance(content, str) and content in tensors:
            return tensors[content]
        if kind == "float" and content in ("nan", "inf", "-inf"):
            return float(content)
        if kind == "tuple" and isinstance(content, list):
            return tuple(_unpacked(item, tensors) for item in content)
        if kind == "dict" and isinstance(content, list):
            pairs = [item for item in content if isinstance(item, list) and len(item) == 2 and type(item[0]) in (int, str)]
            if len(pairs) == len(content):
                return {key: _unpacked(item, tensors) for key, item in pairs}
    raise ValueError(f"expected a part of a state, got {str(value)[:60]}")
