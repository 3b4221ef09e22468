"""The self test: every operator, as the dispatcher serves it on a device, against `reference.py`, in a second or two."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, ops, reference
from .dtypes import LOW_PRECISION, dtype_name

TOKENS, ROWS, COLS, NNZ = 100, 72, 200, 500
# Sums in another order, or other roundings on the way; the rest is exact to the bit.
ROUNDED = ("sddmm", "linear", "linear_grad", "linear_input_grad", "embedding_grad", "sparse_adamw_")


def run(devices: Sequence[str]) -> list[dict[str, Any]]:
    """Test every operator.

    Args:
        devices: for example `["cpu", "cuda"]`.

    Returns:
        One dict per operator, device and dtype: `op`, `device`, `dtype`, `kernel`, `ok`, `problem` (a sentence or None),
        `seconds`.
    """
    results = []
    for device in devices:
        for op in ops.SCHEMAS:
            for dtype in (torch.int32, torch.int64) if op.endswith("indices_") else LOW_PRECISION:
                start = time.perf_counter()
                try:
                    problem = _compare(op, torch.device(device), dtype)
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
                results.append({
                    "op": op,
                    "device": device,
                    "dtype": dtype_name(dtype),
                    "kernel": native.kernel_of(op, device),
                    "ok": problem is None,
                    "problem": problem,
                    "seconds": round(time.perf_counter() - start, 4),
                })  # fmt: skip
    return results


def _compare(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with an operator on one small problem; None where nothing is."""
    on_device = {name: _to(value, device) for name, value in _arguments(op, dtype).items()}
    plain = _arguments(op, dtype)
    results = _written(on_device, getattr(torch.ops.sprand, op)(**on_device))
    expected_results = _written(plain, getattr(reference, op)(**plain))
    for (name, result), (_, expected) in zip(results, expected_results, strict=True):
        problem = _difference(result.cpu(), expected, exact=op not in ROUNDED)
        if problem is not None:
            return f"{name}: {problem}"
    return None


def _difference(result: Tensor, expected: Tensor, exact: bool) -> str | None:
    """What is wrong with a result; None where nothing is."""
    if result.dtype != expected.dtype or result.shape != expected.shape:
        return f"expected {list(expected.shape)} of {expected.dtype}, got {list(result.shape)} of {result.dtype}"
    rounding = 0.0 if exact or not result.is_floating_point() else torch.finfo(result.dtype).eps
    largest = expected.double().abs().max().item()
    allowed = 16 * rounding * largest
    error = (result.double() - expected.double()).abs().max().item()
    return None if error <= allowed else f"off by {error:.3g} (allowed {allowed:.3g})"


def _arguments(op: str, dtype: torch.dtype) -> dict[str, Any]:
    """The same small problem at every call."""
    if op == "stratified_indices_":
        return {"indices": torch.zeros(NNZ, dtype=dtype), "rows": ROWS, "cols": COLS, "key": 1}
    if op == "uniform_indices_":
        return {"indices": torch.zeros(NNZ, dtype=dtype), "numel": ROWS * COLS, "key": 1}
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(kind)

    indices = torch.empty(NNZ, dtype=torch.int32)
    reference.stratified_indices_(indices, ROWS, COLS, 7)
    weight = normal(ROWS, COLS, kind=dtype)
    base = reference.gather(weight, indices)
    if op == "sddmm":
        return {"grad_output": normal(TOKENS, ROWS, kind=dtype), "input": normal(TOKENS, COLS, kind=dtype), "indices": indices}
    if op == "linear":
        return {"input": normal(TOKENS, COLS, kind=dtype), "weight": weight, "bias": normal(ROWS, kind=dtype)}
    if op == "linear_grad":
        return {"grad_output": normal(TOKENS, ROWS, kind=dtype), "input": normal(TOKENS, COLS, kind=dtype)}
    if op == "embedding_grad":
        tokens = torch.arange(TOKENS).square() % 12  # 0, 1, 4 and 9 by turns
        return {"grad_output": normal(TOKENS, COLS, kind=dtype), "tokens": tokens, "indices": indices, "padding_idx": 9}
    if op == "gather":
        return {"weight": weight, "indices": indices}
    if op in ("patch_", "linear_input_grad"):
        entries = {"weight": weight, "indices": indices, "base": base, "delta": normal(NNZ), "scale": 0.5}
        return entries if op == "patch_" else entries | {"grad_output": normal(TOKENS, ROWS, kind=dtype), "transposed": False}
    if op.endswith("_all_"):
        lists = {"weights": [weight, normal(ROWS, COLS)], "indices": [indices, indices.long()], "scales": [0.5, -2.0]}
        if op == "scatter_add_all_":
            return lists | {"values": [normal(NNZ), normal(NNZ)]}
        return lists | {"bases": [base, normal(NNZ)], "deltas": [normal(NNZ), normal(NNZ)]}
    return {
        "weights": [weight], "indices": [indices], "bases": [base], "deltas": [normal(NNZ)], "grads": [normal(NNZ)],
        "exp_avgs": [normal(NNZ)], "exp_avg_sqs": [normal(NNZ).square()], "steps": [torch.tensor([3.0])], "scales": [1.0],
        "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "maximize": False,
    }  # fmt: skip


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_to(item, device) for item in value] if isinstance(value, list) else value


def _written(arguments: dict[str, Any], result: Tensor | None) -> list[tuple[str, Tensor]]:
    """The result and every tensor among the arguments, which also shows a write to the wrong one."""
    tensors = [] if result is None else [("result", result)]
    for name, value in arguments.items():
        items = value if isinstance(value, list) else [value]
        tensors += [(name, item) for item in items if isinstance(item, Tensor)]
    return tensors
