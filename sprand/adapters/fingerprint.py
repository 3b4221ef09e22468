"""What an adapter's files say of a weight: shape, count, and a fingerprint, by which it knows the base it was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import described
from ..files.forms import SHAPE, TEXT, WHOLE, record, table_of
from ..kernels.dtypes import dtype_name

DTYPES = {_name: getattr(torch, _name) for _name in ("float64", "float32", "bfloat16", "float16")}
DIGITS = 8  # 32 bits for each weight tell bases apart; files of earlier formats have up to four times as many
NARROWER = {"float64": ("float32", "bfloat16", "float16"), "float32": ("bfloat16", "float16")}
LINE = re.compile(
    rf"(\d{{1,19}}(?:x\d{{1,19}})*)? (\d{{1,19}}) ({'|'.join(DTYPES)}) ((?:[0-9a-f]{{{DIGITS}}})+)(?: axis ([01]))?", re.ASCII
)
AXES = (0, 1)  # along which whole columns are counted, see `sprand.layers.units`

_HASHES = table_of(TEXT)
_FROZEN = record({"nnz": WHOLE, "fingerprint": _HASHES}, {"added": WHOLE})
_TARGET = record(
    {"shape": SHAPE, "nnz": WHOLE, "fingerprint": _HASHES}, {"quantized": TEXT, "frozen": _FROZEN, "added": WHOLE, "axis": WHOLE}
)


def _check_target(place: str, value: Any) -> None:
    """The form of what an adapter says of one weight: only a quantized base has no fingerprint."""
    _TARGET(place, value)
    parts = [value, value["frozen"]] if "frozen" in value else [value]
    if any(part.get("added", 0) > part["nnz"] for part in parts):
        raise ValueError(f"{place}.added: expected no more entries than there are")
    if "axis" in value and (value["axis"] not in AXES or len(value["shape"]) < 2 or 0 in value["shape"]):
        raise ValueError(f"{place}.axis: expected 0 or 1, of a weight of two dimensions or more, got {value['axis']}")
    if "quantized" not in value and not all(part["fingerprint"] for part in parts):
        raise ValueError(f"{place}.fingerprint: expected hashes by dtype, got none")


check_targets = table_of(_check_target)


def described_target(shape: Iterable[int], base: Tensor, added: int = 0, axis: int | None = None) -> dict[str, Any]:
    """What an adapter says of a weight of this shape, of which it trains entries that hold `base` `[nnz]`.

    Args:
        shape: of the weight.
        base: `[nnz]`.
        added: how many of them, the last ones, are in rows that the weight was given after `apply`.
        axis: the dimension along which the entries are whole columns; None where they are not stored as such.
    """
    return {"shape": list(shape), **described_entries(base, added)} | described_axis(axis)


def described_axis(axis: int | None) -> dict[str, int]:
    """What an adapter says of a weight whose entries are whole columns."""
    return {} if axis is None else {"axis": axis}


def described_entries(base: Tensor, added: int = 0) -> dict[str, Any]:
    """What an adapter says of entries that hold `base` `[nnz]`; of the `added` last ones there is nothing to prove."""
    said = {"nnz": base.numel(), "fingerprint": fingerprints(base[: base.numel() - added])}
    return said | ({"added": added} if added else {})


def line_of(target: Mapping[str, Any]) -> Any:
    """What is said of a weight as one text: shape, count, dtype, fingerprint, and the axis of columns.

    Where there is more to say it stays as it is.
    """
    shape, hashes = "x".join(map(str, target["shape"])), target["fingerprint"]
    dtypes = [dtype for dtype in DTYPES if dtype in hashes]  # widest first
    line = f"{shape} {target['nnz']} {''.join(dtypes[:1])} {''.join(hashes[dtype] for dtype in dtypes)}"
    line += f" axis {target['axis']}" if "axis" in target else ""
    return line if _target_of(line) == target else target


def in_full(targets: Any) -> Any:
    """What a file says of each weight, as `check_targets` knows it; what is no text of `line_of` stays as it is."""
    return {name: _target_of(line) for name, line in targets.items()} if isinstance(targets, dict) else targets


def _target_of(line: Any) -> Any:
    found = LINE.fullmatch(line) if isinstance(line, str) else None
    if found is None:
        return line
    shape, nnz, dtype, digits, axis = found.groups()
    names, hashes = (dtype, *NARROWER.get(dtype, ())), re.findall("." * DIGITS, digits)
    return {
        "shape": [int(size) for size in shape.split("x")] if shape else [],
        "nnz": int(nnz),
        "fingerprint": dict(zip(names, hashes, strict=False)),
        **described_axis(None if axis is None else int(axis)),
    }


def fingerprints(base: Tensor) -> dict[str, str]:
    """Hashes of base entries, in their dtype and as they would be in narrower ones, so that a base may be cast."""
    widest = dtype_name(base.dtype)
    names = widest, *NARROWER.get(widest, ())
    return {name: described.digest([base.to(getattr(torch, name))])[:DIGITS] for name in names}


def check_entries(path: str | Path, name: str, base: Tensor, said: Mapping[str, Any]) -> None:
    """`check_base` of entries by what an adapter says of them; those in added rows, the last ones, can hold anything."""
    check_base(path, name, base[: base.numel() - said.get("added", 0)], said["fingerprint"])


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
