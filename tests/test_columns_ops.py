"""Operators that write whole columns: what they write at the flat indices of the same entries, bit for bit, in every kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from problems import bits, dtypes, guarded, guards_hold, index_dtypes, skip_unsupported, sum_dtype
from sprand.kernels import ops as checked
from sprand.kernels import reference

SHAPES = {
    "a linear layer": (50, 37),
    "one column": (300, 1),
    "HF's Conv1D": (1, 30, 70),
    "a convolution": (20, 15, 3, 3),
    "above a chunk": (600, 40, 2),
}
CHOSEN = {"some": 0.3, "one": 0.0, "all": 1.0}


@dataclass
class Columns:
    """A weight away from its base, columns of it, and the same entries by flat indices."""

    weight: Tensor
    columns: Tensor
    indices: Tensor
    base: Tensor
    delta: Tensor


def made(shape: tuple[int, ...], share: float, dtype: torch.dtype, index_dtype: torch.dtype, device: str = "cpu") -> Columns:
    torch.manual_seed(len(shape) + shape[1])
    weight = torch.randn(shape, device=device).to(dtype)
    columns = torch.randperm(shape[1])[: max(1, round(share * shape[1]))].sort().values
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, columns] = True
    indices = mask.flatten().nonzero().flatten()
    base, delta = torch.randn(len(indices)).to(dtype), torch.randn(len(indices), dtype=sum_dtype(dtype))
    delta[::5] = 0
    here = [values.to(device) for values in (columns.to(index_dtype), indices.to(index_dtype), base, delta)]
    return Columns(weight, *here)


@pytest.fixture(params=["dispatched", "reference", "emulated"])
def kernels(request: pytest.FixtureRequest) -> object:
    """What implements the operators; the CUDA kernels where g++ can build them for the CPU."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return torch.ops.sprand if request.param == "dispatched" else reference


def skip_where_not_served(kernels: object, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and kernels not in (torch.ops.sprand, reference):
        pytest.skip("CUDA kernels take no float64")
    skip_unsupported("cpu", dtype)


@pytest.mark.parametrize("share", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@dtypes
@index_dtypes
def test_patch_of_columns_is_that_of_their_entries(shape, share, dtype, index_dtype, kernels):
    skip_where_not_served(kernels, dtype)
    e = made(shape, share, dtype, index_dtype)
    for delta in (e.delta, None):
        expected = e.weight.clone()
        reference.patch_(expected, e.indices, e.base, delta, 0.3)
        weight, memory = guarded(e.weight)
        assert kernels.patch_(weight, e.columns, e.base, delta, 0.3) is None
        assert guards_hold(memory) and torch.equal(bits(weight), bits(expected))


@dtypes
def test_steps_of_columns_beside_entries_are_those_of_entries(dtype, kernels):
    """Weights of both kinds in one call, of several sizes, two steps of AdamW and a patch of all."""
    skip_where_not_served(kernels, dtype)
    every = [made(shape, 0.3, dtype, torch.int32) for shape in SHAPES.values()]

    def after(positions: Callable[[int, Columns], Tensor]) -> list[Tensor]:
        where = [positions(number, e) for number, e in enumerate(every)]
        weights, deltas = [e.weight.clone() for e in every], [torch.zeros_like(e.delta) for e in every]
        bases, scales = [e.base for e in every], [1.0, 0.5, -2.0, 1.0, 1.0]
        states = [[torch.zeros_like(delta) for delta in deltas] for _ in range(2)]
        for step in (1.0, 2.0):
            steps = [torch.tensor(step) for _ in every]
            grads = [e.delta * step for e in every]
            kernels.sparse_adamw_(
                weights, where, bases, deltas, grads, *states, steps, scales, 0.1, 0.9, 0.999, 1e-8, 0.01, False
            )
        copies = copy.deepcopy(weights)
        kernels.patch_all_(copies, where, bases, None, scales)
        return [*weights, *copies, *deltas, *states[0], *states[1]]

    flat = after(lambda number, e: e.indices)
    for results in (after(lambda number, e: e.columns), after(lambda number, e: e.columns if number % 2 else e.indices)):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(flat, results, strict=True))


def test_an_overflow_leaves_columns_as_they_are(kernels):
    e = made((50, 37), 0.3, torch.float32, torch.int32)
    before = copy.deepcopy(e)
    state = [torch.zeros_like(e.delta) for _ in range(2)]
    one, rest = torch.ones(()), (0.1, 0.9, 0.999, 1e-8, 0.01, False)
    lists = [e.weight], [e.columns], [e.base], [e.delta], [e.delta.clone()], [state[0]], [state[1]], [one.clone()], [1.0]
    kernels.sparse_adamw_(*lists, *rest, None, None, one)
    assert torch.equal(e.weight, before.weight) and torch.equal(e.delta, before.delta) and not state[0].any()


@pytest.mark.parametrize("many", [1, 2])
def test_columns_are_written_alike_on_any_number_of_threads(many, threads):
    threads(many)
    for share in CHOSEN.values():
        e = made((3000, 40, 2), share, torch.float32, torch.int32)
        weight, expected = e.weight.clone(), e.weight.clone()
        torch.ops.sprand.patch_(weight, e.columns, e.base, e.delta, 1.0)
        reference.patch_(expected, e.indices, e.base, e.delta, 1.0)
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_linear_input_grad_patches_the_columns_of_inputs(transposed):
    out, features = 40, 30
    e = made((1, features, out) if transposed else (out, features), 0.2, torch.float64, torch.int32)
    weight, rows = e.weight.view(features, out) if transposed else e.weight, torch.randn(7, out, dtype=torch.float64)
    dense = e.weight.flatten().index_put((e.indices.long(),), e.base + 0.5 * e.delta).view(weight.shape)
    result = checked.linear_input_grad(rows, weight, e.columns, e.base, e.delta, 0.5, transposed)
    torch.testing.assert_close(result, rows @ (dense.t() if transposed else dense), rtol=1e-12, atol=1e-12)


def test_what_fits_neither_entries_nor_columns_is_refused_and_nothing_written():
    e = made((50, 37), 0.3, torch.float32, torch.int32)
    before = e.weight.clone()
    wrong = e.columns.clone()
    wrong[-1] = 37
    calls = {
        r"expected contiguous base \[11\]": lambda: checked.patch_(e.weight, e.columns, e.base[1:].clone(), None),
        r"expected contiguous delta \[550\]": lambda: checked.patch_(e.weight, e.columns, e.base, e.delta[1:].clone()),
        r"base \[11\] of torch.float32": lambda: checked.patch_(e.weight.flatten(), e.columns, e.base, None),
        r"indices in \[0, 37\), got": lambda: checked.patch_(e.weight, wrong, e.base, None),
    }
    for message, call in calls.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
    with pytest.raises(RuntimeError, match="an index for each entry, or the numbers of columns"):
        torch.ops.sprand.patch_(e.weight, e.columns, e.base[1:].clone(), None)
    assert torch.equal(e.weight, before)
