"""Products of 16-bit operands on a CPU without instructions for them: in float32, by blocks of the weight's rows.

PyTorch multiplies such operands by oneDNN where the instruction set allows it, and elsewhere by loops of its own. The one that
backward needs, `grad_output @ weight`, is some fifty times as slow as the product in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .dtypes import HALVES

ENTRIES_AT_ONCE = 1 << 20  # of a weight that are held in float32


def may_lack_product(operand: Tensor) -> bool:
    """Whether some CPUs have no product of such operands; a graph that is compiled may not ask this one."""
    return operand.dtype in HALVES and operand.device.type == "cpu"


def lacks_product(operand: Tensor) -> bool:
    """Whether this CPU has no product of such operands, or `torch.backends.mkldnn` is switched off now."""
    return may_lack_product(operand) and not (torch.backends.mkldnn.enabled and _has_instructions(operand.dtype))


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """What PyTorch itself asks before it calls oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    onednn = torch.ops.mkldnn
    return onednn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else onednn._is_mkldnn_fp16_supported()


def linear_in_float32(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """`F.linear`, summed in float32 and rounded once; neither the weight nor, if transposed, the input is copied whole.

    Args:
        input: `[..., in]`, 16 bits.
        weight: `[out, in]`, or `[in, out]` if transposed; it is cast to the dtype of `input`.
        bias: `[out]` or None.
        transposed: see weight.

    Returns:
        `[..., out]` in the dtype of `input`.
    """
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    output = (_by_inputs if transposed else _by_outputs)(rows, weight, bias)
    return output.view(*input.shape[:-1], output.shape[-1])


def _by_outputs(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = rows.new_empty(len(rows), len(weight))
    wide = rows.float()
    for part in _blocks(weight):
        block = wide.new_empty(len(rows), part.stop - part.start)
        torch.mm(wide, weight[part].to(rows.dtype).float().t(), out=block)  # autocast leaves `out=` and `_` alone
        output[:, part] = block if bias is None else block.add_(bias[part])
    return output


def _by_inputs(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = rows.new_zeros((len(rows), weight.shape[1]), dtype=torch.float32)
    if bias is not None:
        output += bias
    for part in _blocks(weight):
        output.addmm_(rows[:, part].float(), weight[part].to(rows.dtype).float())
    return output.to(rows.dtype)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight, so many at a time that they have `ENTRIES_AT_ONCE` entries."""
    size = max(1, ENTRIES_AT_ONCE // max(1, weight.shape[1]))
    return (slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size))
