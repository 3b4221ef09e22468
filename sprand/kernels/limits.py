"""What a device offers to a kernel, and how work is cut into parts that fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Whole = TypeVar("Whole", int, Tensor)


def ceil_div(number: Whole, size: int) -> Whole:
    """How many parts of a size hold so many things; of a tensor, entry by entry."""
    return -(-number // size)


@dataclass(frozen=True)
class Limits:
    """What a device offers; by default an H200.

    Attributes:
        shared_bytes: shared memory of a block.
        processors: multiprocessors.
    """

    shared_bytes: int = 227 << 10
    processors: int = 132

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """The limits of a GPU; the default elsewhere."""
        if device.type != "cuda":
            return cls()
        facts = torch.cuda.get_device_properties(device)
        return cls(facts.shared_memory_per_block_optin, facts.multi_processor_count)
