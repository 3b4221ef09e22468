"""PEFT's `convert_to_lora` and `save_as_lora`, exact for whole columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora import conversion
from torch import Tensor, nn

from ..kernels.dtypes import HALVES
from .changes import Change
from .layer import SprandLayer
from .lora import Factors

Converter = Callable[..., tuple[Tensor, Tensor, int]]  # of one layer: lora_A, lora_B and their rank
CONVERTER = "_convert_module_to_lora"  # of PEFT, which it calls for every layer


def install() -> None:
    """Let PEFT convert layers of sprand by the columns that they train.

    It would otherwise take their changes, as dense matrices, apart by singular values, which is neither exact nor fast. A PEFT
    without this function of one layer does so.
    """
    of_peft = getattr(conversion, CONVERTER, None)
    if of_peft is not None and not hasattr(of_peft, "of_peft"):
        setattr(conversion, CONVERTER, _with_columns(of_peft))


def _with_columns(of_peft: Converter) -> Converter:
    """PEFT's function for one layer, which sees layers of sprand first."""

    def convert(module: nn.Module, rank: float, adapter_name: str = "default") -> tuple[Tensor, Tensor, int]:
        if not isinstance(module, SprandLayer):
            return of_peft(module, rank, adapter_name)
        if not module.sprand_trains(adapter_name):
            return torch.empty(0), torch.empty(0), 0
        factors = _factors(module, adapter_name)
        if rank < (1 if isinstance(rank, float) else factors.rank):  # an approximation is asked for
            return of_peft(module, rank, adapter_name)
        a, b = factors.tensors("", factors.rank, torch.float32).values()
        return a, b, factors.rank

    convert.of_peft = of_peft
    return convert


@torch.no_grad()
def _factors(layer: SprandLayer, adapter_name: str) -> Factors:
    """What an adapter changes of the layer's weight; of a 16-bit weight the change to the bit."""
    site, target = layer.sprand_site("weight"), layer.sprand_targets["weight"]
    indices, values = target.indices[adapter_name], target.deltas[adapter_name].detach().float()
    base = layer.sprand_base_of("weight", adapter_name) if site.backend is None else None
    change = Change(site.name, site.shape, indices, values, base if base is not None and base.dtype in HALVES else None)
    return Factors.of(change.exact(), site)
