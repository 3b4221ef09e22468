"""Sorted index lists on the host: the compiled door and the PyTorch one give the same answers, and the right ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sprand.kernels import host


@pytest.fixture(params=["compiled", "torch"])
def door(request, monkeypatch):
    """`sprand.kernels.host` by way of the compiled module, then by way of PyTorch."""
    if request.param == "torch":
        monkeypatch.setattr(host, "_host", None)
    elif not host.has_extension():
        pytest.skip("sprand._host is not built")
    return host


def both_doors(call):
    """The result with the compiled module where there is one, and with PyTorch."""
    compiled, kept = call(), host._host
    host._host = None
    try:
        return compiled, call()
    finally:
        host._host = kept


def first_bad_slowly(values: list[int], numel: int) -> int:
    for place, value in enumerate(values):
        if value < 0 or value >= numel or (place and value <= values[place - 1]):
            return place
    return -1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("values", "numel", "expected"),
    [
        ([], 0, -1),
        ([0], 1, -1),
        ([0, 3, 9], 10, -1),
        ([0, 3, 10], 10, 2),
        ([-1, 3], 10, 0),
        ([2, 2], 10, 1),
        ([5, 4, 99], 10, 1),
        ([0], 0, 0),
        ([2**31 - 1], 2**31, -1),
    ],
)
def test_first_bad_index(door, dtype, values, numel, expected):
    assert door.first_bad_index(torch.tensor(values, dtype=dtype), numel) == expected


def test_first_bad_index_beyond_32_bits(door):
    assert door.first_bad_index(torch.tensor([1, 2**40]), 2**40 + 1) == -1
    assert door.first_bad_index(torch.tensor([1, 2**40]), 2**40) == 1


def test_first_bad_index_reads_strided_lists(door):
    assert door.first_bad_index(torch.tensor([0, 9, 1, 8, 2, 7])[::2], 3) == -1


@given(st.lists(st.integers(-2, 30), max_size=12), st.integers(0, 31), st.sampled_from([torch.int32, torch.int64]))
@settings(deadline=None)
def test_first_bad_index_of_anything(values, numel, dtype):
    indices = torch.tensor(values, dtype=dtype)
    assert both_doors(lambda: host.first_bad_index(indices, numel)) == (first_bad_slowly(values, numel),) * 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "lists", [[[1, 4, 9]], [[1, 4], [4, 5]], [[], [3]], [[]], [[], []], [[0, 7], [1, 7], [0, 1, 2], [9], [7]]]
)
def test_merge_indices(door, dtype, lists):
    union, positions = door.merge_indices([torch.tensor(values, dtype=dtype) for values in lists])
    assert union.dtype == dtype
    assert union.tolist() == sorted(set().union(*lists))
    assert len(positions) == len(lists)
    for values, places in zip(lists, positions, strict=True):
        assert places.dtype == torch.int64
        assert union[places].tolist() == values


ascending = st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 40), unique=True, max_size=60).map(sorted)


@given(st.lists(ascending, min_size=1, max_size=9), st.sampled_from([torch.int32, torch.int64]))
@settings(deadline=None)
def test_merge_indices_of_anything(lists, dtype):
    tensors = [torch.tensor(values, dtype=dtype) for values in lists]
    (union, positions), (union_too, positions_too) = both_doors(lambda: host.merge_indices(tensors))
    assert torch.equal(union, union_too)
    assert all(map(torch.equal, positions, positions_too))
    assert union.tolist() == sorted(set().union(*lists))
    assert all(torch.equal(union[places], values) for places, values in zip(positions, tensors, strict=True))


def test_merge_indices_reads_strided_lists(door):
    union, (_, right) = door.merge_indices([torch.tensor([2, 6]), torch.tensor([1, 0, 6, 0])[::2]])
    assert (union.tolist(), right.tolist()) == ([1, 2, 6], [0, 2])


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([], "at least one list"),
        ([torch.tensor([1, 1])], "got 1 at 1 of list 0"),
        ([torch.tensor([1]), torch.tensor([-3])], "got -3 at 0 of list 1"),
        ([torch.tensor([1]), torch.tensor([2], dtype=torch.int32)], "got list 1 as torch.int32"),
        ([torch.tensor([1.0])], "int32 or int64"),
        ([torch.tensor([[1]])], r"got \[1, 1\]"),
    ],
)
def test_merge_indices_refuses(door, lists, message):
    with pytest.raises(ValueError, match=message):
        door.merge_indices(lists)


def test_first_bad_index_refuses_other_dtypes(door):
    with pytest.raises(ValueError, match="int32 or int64, got"):
        door.first_bad_index(torch.tensor([1.0]), 3)
