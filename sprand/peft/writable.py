"""Memory of base weights: entries are written into it, so it must be ordinary memory that can be written."""

from __future__ import annotations

import bisect
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")


def check_writable(name: str, weight: Tensor, read_only: list[tuple[int, int]]) -> None:
    """Prove that entries can be written into a weight.

    Args:
        name: of the weight, for the messages.
        weight: any shape and device.
        read_only: the result of `read_only_ranges`.

    Raises:
        ValueError: The weight is an inference tensor, no floating point, not contiguous, or lies in read-only memory.
    """
    if weight.is_inference():
        raise ValueError(
            f"{name}: this weight was made under torch.inference_mode, and cannot be trained; load the model outside of it"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point weight, got {weight.dtype}, quantized in a way that PEFT does not know; load the "
            "model in 16 or 32 bits, or quantize it with bitsandbytes"
        )
    if type(weight.data) is not Tensor or weight.device.type != "cpu" or not weight.numel():
        return
    if not weight.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous memory, got strides {weight.stride()} for shape {list(weight.shape)}; call "
            "model.to(memory_format=torch.contiguous_format) first"
        )
    if _within(weight.data_ptr(), read_only):
        raise ValueError(
            f"{name}: this weight lies in read-only memory (a file mapped for reading), and entries cannot be written into it; "
            "copy it first, weight.data = weight.data.clone()"
        )


def read_only_ranges() -> list[tuple[int, int]]:
    """First and last address of every range that Linux maps without the right to write; empty on other systems."""
    if not MAPS.exists():
        return []
    ranges = []
    for line in MAPS.read_text().splitlines():
        addresses, rights, *_ = line.split(maxsplit=2)
        if "w" not in rights:
            first, end = addresses.split("-")
            ranges.append((int(first, 16), int(end, 16)))
    return sorted(ranges)


def _within(address: int, ranges: list[tuple[int, int]]) -> bool:
    place = bisect.bisect_right(ranges, (address, 2**64)) - 1
    return place >= 0 and address < ranges[place][1]
