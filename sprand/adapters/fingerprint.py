"""Fingerprints of base entries: by them an adapter knows the model that it was trained on, also in another dtype."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files import described
from ..kernels.dtypes import dtype_name

DTYPES = {_name: getattr(torch, _name) for _name in ("float64", "float32", "bfloat16", "float16")}
DIGITS = 16  # 64 bits tell bases apart; sprand 0.1.0 wrote twice as many
NARROWER = {torch.float64: (torch.float32, torch.bfloat16, torch.float16), torch.float32: (torch.bfloat16, torch.float16)}


def fingerprints(base: Tensor) -> dict[str, str]:
    """Hashes of base entries, in their dtype and as they would be in narrower ones, so that a base may be cast."""
    dtypes = base.dtype, *NARROWER.get(base.dtype, ())
    return {dtype_name(dtype): described.digest([base.to(dtype)])[:DIGITS] for dtype in dtypes}


def check_base(path: str | Path, name: str, base: Tensor, stored: Mapping[str, str]) -> None:
    """Prove by their fingerprint that entries are those an adapter was trained on.

    The narrower of the two dtypes is compared: a checkpoint may be loaded in another one than it was trained in.

    Args:
        path: of the adapter, for the message.
        name: of the parameter.
        base: `[n]`, its entries.
        stored: the adapter's fingerprint of them, from `fingerprints`.

    Raises:
        ValueError: The entries hold other values.
    """
    trained = next((dtype for dtype in DTYPES if dtype in stored), None)
    here = fingerprints(base)
    common = [dtype for dtype in DTYPES if dtype in stored and dtype in here]
    compared = trained if trained in here else next(iter(common), None)
    if compared is None or stored[compared][:DIGITS] != here[compared]:
        raise ValueError(
            f"{path} was trained on another base: the entries it changes in {name} have other values in this model; load the "
            "base checkpoint it was trained on (and no merged or further trained one)"
        )
