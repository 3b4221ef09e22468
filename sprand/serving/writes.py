"""Setting entries of many weights: one call of an operator for all targets of a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..kernels import ops


def set_entries(parameters: Mapping[str, nn.Parameter], indices: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Let each parameter hold `values` at `indices`, both `[nnz]` by parameter name, on its device and in its dtype."""
    devices: dict[torch.device, list[str]] = {}
    for name in indices:
        devices.setdefault(parameters[name].device, []).append(name)
    for device, names in devices.items():
        ops.patch_all_(
            [parameters[name].data for name in names],
            [indices[name] for name in names],
            [values[name] for name in names],
            None,
            [1.0] * len(names),
        )
        for name in names if device.type == "cuda" else ():  # memory that is dropped stays until this stream has read it
            for tensor in (indices[name], values[name]):
                tensor.record_stream(torch.cuda.current_stream(device))


def check_writable(path: object, parameters: Mapping[str, nn.Parameter], names: list[str]) -> None:
    """Prove that entries of these parameters can be set, each weight under one name.

    Raises:
        ValueError: The memory of a weight is not contiguous, or two are one (tied) weight.
    """
    seen: dict[int, str] = {}
    for name in names:
        weight = parameters[name]
        if not weight.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {weight.stride()} for shape {list(weight.shape)}")
        other = seen.setdefault(weight.data_ptr(), name) if weight.numel() else name
        if other != name:
            raise ValueError(
                f"{path} trained {other} and {name} as two weights, and here they are one (tied); load it into a model where "
                "they are not"
            )
