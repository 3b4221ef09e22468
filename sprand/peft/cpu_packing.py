"""4-bit weights that bitsandbytes packs anew when a CPU with AVX512_BF16 evaluates their layer: put back, and left so."""

from __future__ import annotations

from torch import nn

MAY_PACK = "support_avx512bf16_for_cpu"  # an attribute of bitsandbytes' 4-bit layers


def keep_stored_layout(layer: nn.Module) -> bool:
    """Put a layer's 4-bit weight back into the layout in which it is stored, and keep bitsandbytes from packing it again.

    PEFT dequantizes the stored layout only. Packing has rounded the scales of the blocks to bfloat16; they stay rounded, so that
    the layer computes what it did when it was evaluated.

    Args:
        layer: a quantized layer of any library.

    Returns:
        Whether bitsandbytes was free to pack it, for `set_may_pack`.
    """
    _unpack(getattr(layer, "weight", None))
    may_pack = getattr(layer, MAY_PACK, False)
    set_may_pack(layer, False)
    return may_pack


def set_may_pack(layer: nn.Module, value: bool) -> None:
    """Let bitsandbytes pack a layer's weight when it is evaluated, or not; other layers stay as they are."""
    if hasattr(layer, MAY_PACK):
        setattr(layer, MAY_PACK, value)


def _unpack(weight: nn.Parameter | None) -> None:
    state = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as stored_layout

    scales = state.absmax.t().float().flatten()
    state.original_nested = False  # or the scales would be quantized once more
    weight.data, weight.quant_state = stored_layout(weight.data, state)
    state.absmax = scales  # which bitsandbytes leaves transposed
