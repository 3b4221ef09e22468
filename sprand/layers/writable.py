"""Memory of weights: entries are written into it, so it must be ordinary memory that can be written."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")


def check_writable(weights: Mapping[str, Tensor]) -> None:
    """Prove that entries can be written into weights.

    Args:
        weights: tensors of any shape and device, by their names.

    Raises:
        ValueError: One is an inference tensor, no floating point, not contiguous, or lies in read-only memory.
    """
    read_only = _read_only_ranges()
    for name, weight in weights.items():
        _check_kind(name, weight)
        plain = type(weight.data) is Tensor and weight.device.type == "cpu" and weight.numel()
        if plain and _within(weight.data_ptr(), read_only):
            raise ValueError(
                f"{name}: this weight lies in read-only memory (a file mapped for reading), and entries cannot be written into "
                "it; copy it first, weight.data = weight.data.clone()"
            )


def _check_kind(name: str, weight: Tensor) -> None:
    if weight.is_inference():
        raise ValueError(
            f"{name}: this weight was made under torch.inference_mode, and cannot be trained; load the model outside of it"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point weight, got {weight.dtype}, quantized in a way that nothing here can read; load "
            "the model in 16 or 32 bits, or quantize it with bitsandbytes and train it through sprand.peft"
        )
    if type(weight.data) is Tensor and not weight.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous memory, got strides {weight.stride()} for shape {list(weight.shape)}; call "
            "model.to(memory_format=torch.contiguous_format) first"
        )


def _read_only_ranges() -> list[tuple[int, int]]:
    """First and last address of every range that Linux maps without the right to write; empty on other systems."""
    if not MAPS.exists():
        return []
    lines = [line.split(maxsplit=2) for line in MAPS.read_text().splitlines()]
    return sorted(tuple(int(value, 16) for value in line[0].split("-")) for line in lines if "w" not in line[1])


def _within(address: int, ranges: list[tuple[int, int]]) -> bool:
    at = bisect.bisect_right(ranges, (address, 2**64)) - 1
    return at >= 0 and address < ranges[at][1]
