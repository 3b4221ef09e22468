"""`patch_all_` and `scatter_add_all_`: each target as if it were alone, whatever the others are."""

from __future__ import annotations

import pytest
import torch

from problems import (
    DTYPES,
    LARGE,
    PROBLEMS,
    Entries,
    bits,
    guarded,
    guards_hold,
    implementations,
    make_entries,
)
from sprand.kernels import ops as checked
from sprand.kernels import reference

SCALES = (1.0, 0.3, -2.0, 0.0)


def make_targets(device: str) -> list[Entries]:
    """Every problem of the table, dtypes and index dtypes in turn; on the CPU float64 too."""
    dtypes = DTYPES if device == "cpu" else DTYPES[:3]
    return [
        make_entries(problem, dtypes[number % len(dtypes)], (torch.int32, torch.int64)[number % 3 % 2], device, seed=number)
        for number, problem in enumerate((*PROBLEMS, LARGE, *PROBLEMS[:5]))
    ]


def lists_of(targets: list[Entries]) -> dict[str, list]:
    return {
        "indices": [t.indices for t in targets],
        "bases": [t.base for t in targets],
        "deltas": [t.delta for t in targets],
        "scales": [SCALES[number % len(SCALES)] for number in range(len(targets))],
    }


@implementations
@pytest.mark.parametrize("op", ["patch_all_", "patch_all_ without deltas", "scatter_add_all_"])
def test_every_target_gets_the_bits_of_the_operator_for_one(ops, op, threads, device):
    targets = make_targets(device)
    given = lists_of(targets)
    expected = [t.weight.clone() for t in targets]
    for weight, index, base, delta, scale in zip(expected, *given.values(), strict=True):
        if op == "scatter_add_all_":
            reference.scatter_add_all_([weight], [index], [delta], [scale])
        else:
            reference.patch_(weight, index, base, delta if op == "patch_all_" else None, scale)
    for count in (1, 2):
        threads(count)
        weights, memories = zip(*(guarded(t.weight) for t in targets), strict=True)
        if op == "scatter_add_all_":
            result = ops.scatter_add_all_(list(weights), given["indices"], given["deltas"], given["scales"])
        else:
            deltas = given["deltas"] if op == "patch_all_" else None
            result = ops.patch_all_(list(weights), given["indices"], given["bases"], deltas, given["scales"])
        assert result is None
        assert all(map(guards_hold, memories))
        assert all(torch.equal(bits(got), bits(want)) for got, want in zip(weights, expected, strict=True))


@implementations
def test_no_target_is_nothing(ops):
    assert ops.patch_all_([], [], [], [], []) is None
    assert ops.patch_all_([], [], [], None, []) is None
    assert ops.scatter_add_all_([], [], [], []) is None


def test_nothing_is_written_where_one_target_is_refused(device):
    targets = make_targets(device)[:4]
    given = lists_of(targets)
    weights = [t.weight.clone() for t in targets]
    short = [*given["deltas"][:3], given["deltas"][3][1:]]
    calls = (
        lambda ops: ops.patch_all_(weights, given["indices"], given["bases"], short, given["scales"]),
        lambda ops: ops.scatter_add_all_(weights, given["indices"], short, given["scales"]),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"_all_: expected .*got "):
            call(checked)
        if device == "cuda" or torch._C._dispatch_has_kernel_for_dispatch_key("sprand::patch_all_", "CPU"):
            with pytest.raises(RuntimeError, match="expected contiguous"):
                call(torch.ops.sprand)
    assert all(torch.equal(bits(weight), bits(t.weight)) for weight, t in zip(weights, targets, strict=True))
