"""Loads the compiled kernels where they are built, and says which kernel serves which operator on which device."""

from __future__ import annotations

import functools
import importlib
import warnings

import torch

from . import ops

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."
HOW_TO = f"install a C++ compiler, then run in sprand's source folder: {REINSTALL}"

_KERNELS = {"cpu": ("CPU", "C++"), "cuda": ("CUDA", "CUDA")}


def _load(module: str) -> str | None:
    try:
        importlib.import_module(f"sprand.{module}")
    except ModuleNotFoundError:
        return "not built"
    except ImportError as error:
        return f"built, but it does not load: {error}"
    return None


problems: dict[str, str | None] = {module: _load(module) for module in ("_C", "_C_cuda")}


def has_extension() -> bool:
    """Whether the compiled CPU kernels are loaded."""
    return problems["_C"] is None


def kernel_of(op: str, device: str | torch.device) -> str:
    """Which kernel the dispatcher picks.

    Args:
        op: name of an operator, a key of `sprand.kernels.ops.SCHEMAS`.
        device: for example `"cpu"` or `"cuda:0"`.

    Returns:
        `"C++"`, `"CUDA"` or `"reference"` (plain PyTorch).

    Raises:
        ValueError: There is no such operator.
    """
    if op not in ops.SCHEMAS:
        raise ValueError(f"kernel_of: expected one of {', '.join(ops.SCHEMAS)}, got {op!r}")
    key, name = _KERNELS.get(torch.device(device).type, (None, None))
    if key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"sprand::{op}", key):
        return name
    return "reference"


def instruction_set() -> str:
    """The instruction set that the CPU kernels use on this machine, such as `"avx512"`."""
    return torch.ops.sprand._instruction_set() if has_extension() else "PyTorch's own"


@functools.cache
def warn_if_slow() -> None:
    """Say, once per process, that the compiled CPU kernels are missing and how to get them."""
    if not has_extension():
        warnings.warn(
            f"sprand runs without its compiled kernels (sprand._C: {problems['_C']}). To train fast, {HOW_TO}", stacklevel=3
        )
