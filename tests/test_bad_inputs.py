"""What the operators refuse: the message names the operator, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from sprand import native
from sprand.kernels import ops

WEIGHT = torch.zeros(4, 6)
INDICES = torch.tensor([1, 5, 23], dtype=torch.int32)
ENTRIES = torch.zeros(3)
TOKENS = torch.tensor([3, 0])
ADAMW = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


def adamw(**changed):
    """`sparse_adamw_` on one target, some of its lists changed."""
    names = ("weights", "indices", "bases", "deltas", "grads", "exp_avgs", "exp_avg_sqs", "steps", "scales")
    values = (WEIGHT, INDICES, *[ENTRIES] * 5, torch.ones(()), 1.0)
    lists = {name: [value] for name, value in zip(names, values, strict=True)} | changed
    ops.sparse_adamw_(**lists, **ADAMW)


def input_grad(**changed):
    names = ("grad_output", "weight", "indices", "base", "delta")
    values = (torch.zeros(2, WEIGHT.shape[0]), WEIGHT, INDICES, ENTRIES, ENTRIES)
    ops.linear_input_grad(**dict(zip(names, values, strict=True)) | changed, scale=1.0, transposed=False)


BAD = {
    "sddmm of a 3-d input": lambda: ops.sddmm(torch.zeros(2, 4), torch.zeros(1, 2, 6), INDICES),
    "sddmm of different tokens": lambda: ops.sddmm(torch.zeros(2, 4), torch.zeros(3, 6), INDICES),
    "sddmm of two dtypes": lambda: ops.sddmm(torch.zeros(2, 4), torch.zeros(2, 6).bfloat16(), INDICES),
    "sddmm of integers": lambda: ops.sddmm(torch.zeros(2, 4).int(), torch.zeros(2, 6).int(), INDICES),
    "sddmm on two devices": lambda: ops.sddmm(torch.zeros(2, 4), torch.zeros(2, 6, device="meta"), INDICES),
    "sddmm with float indices": lambda: ops.sddmm(torch.zeros(2, 4), torch.zeros(2, 6), INDICES.float()),
    "sddmm with 2-d indices": lambda: ops.sddmm(torch.zeros(2, 4), torch.zeros(2, 6), INDICES[None]),
    "sddmm with strided indices": lambda: ops.sddmm(torch.zeros(2, 4), torch.zeros(2, 6), INDICES[::2]),
    "sddmm with indices elsewhere": lambda: ops.sddmm(torch.zeros(2, 4), torch.zeros(2, 6), INDICES.to("meta")),
    "linear_grad of a 3-d input": lambda: ops.linear_grad(torch.zeros(2, 4), torch.zeros(1, 2, 6)),
    "linear_grad of different tokens": lambda: ops.linear_grad(torch.zeros(2, 4), torch.zeros(3, 6)),
    "linear_grad of two dtypes": lambda: ops.linear_grad(torch.zeros(2, 4), torch.zeros(2, 6).bfloat16()),
    "linear_grad of integers": lambda: ops.linear_grad(torch.zeros(2, 4).int(), torch.zeros(2, 6).int()),
    "linear_input_grad of a transposed weight": lambda: input_grad(weight=WEIGHT.T),
    "linear_input_grad of other features": lambda: input_grad(grad_output=torch.zeros(2, 5)),
    "linear_input_grad with a short base": lambda: input_grad(base=ENTRIES[:2]),
    "linear_input_grad with a long delta": lambda: input_grad(delta=torch.zeros(4)),
    "embedding_grad of a 3-d gradient": lambda: ops.embedding_grad(torch.zeros(1, 2, 6), TOKENS, INDICES),
    "embedding_grad of 2-d tokens": lambda: ops.embedding_grad(torch.zeros(2, 6), TOKENS[None], INDICES),
    "embedding_grad of fewer tokens": lambda: ops.embedding_grad(torch.zeros(2, 6), TOKENS[1:], INDICES),
    "embedding_grad of float tokens": lambda: ops.embedding_grad(torch.zeros(2, 6), TOKENS.float(), INDICES),
    "embedding_grad of tokens elsewhere": lambda: ops.embedding_grad(torch.zeros(2, 6), TOKENS.to("meta"), INDICES),
    "embedding_grad of integers": lambda: ops.embedding_grad(torch.zeros(2, 6).int(), TOKENS, INDICES),
    "embedding_grad with strided indices": lambda: ops.embedding_grad(torch.zeros(2, 6), TOKENS, INDICES[::2]),
    "embedding_grad without features": lambda: ops.embedding_grad(torch.zeros(2, 0), TOKENS, INDICES),
    "embedding_grad with a negative padding": lambda: ops.embedding_grad(torch.zeros(2, 6), TOKENS, INDICES, -1),
    "gather from a transposed weight": lambda: ops.gather(WEIGHT.T, INDICES),
    "gather of more than there is": lambda: ops.gather(torch.zeros(2), INDICES),
    "gather from complex": lambda: ops.gather(WEIGHT.to(torch.complex64), INDICES),
    "patch_ with a base of another dtype": lambda: ops.patch_(WEIGHT.bfloat16(), INDICES, ENTRIES, ENTRIES),
    "patch_ with a short base": lambda: ops.patch_(WEIGHT, INDICES, ENTRIES[:2], ENTRIES),
    "patch_ with a bfloat16 delta": lambda: ops.patch_(WEIGHT.bfloat16(), INDICES, ENTRIES.bfloat16(), ENTRIES.bfloat16()),
    "patch_ with a long delta": lambda: ops.patch_(WEIGHT, INDICES, ENTRIES, torch.zeros(4)),
    "patch_ with a delta elsewhere": lambda: ops.patch_(WEIGHT, INDICES, ENTRIES, ENTRIES.to("meta")),
    "patch_all_ with a list too short": lambda: ops.patch_all_([WEIGHT], [INDICES], [], None, [1.0]),
    "patch_all_ with a delta too many": lambda: ops.patch_all_([WEIGHT], [INDICES], [ENTRIES], [ENTRIES] * 2, [1.0]),
    "patch_all_ with a short delta": lambda: ops.patch_all_([WEIGHT], [INDICES], [ENTRIES], [ENTRIES[1:]], [1.0]),
    "patch_all_ with a base of another dtype": lambda: ops.patch_all_([WEIGHT], [INDICES], [ENTRIES.half()], None, [1.0]),
    "patch_all_ on two devices": lambda: ops.patch_all_(
        [WEIGHT, WEIGHT.to("meta")], [INDICES, INDICES.to("meta")], [ENTRIES, ENTRIES.to("meta")], None, [1.0, 1.0]
    ),
    "scatter_add_all_ without scales": lambda: ops.scatter_add_all_([WEIGHT], [INDICES], [ENTRIES], []),
    "scatter_add_all_ with strided values": lambda: ops.scatter_add_all_([WEIGHT], [INDICES], [torch.zeros(6)[::2]], [1.0]),
    "scatter_add_all_ to a transposed weight": lambda: ops.scatter_add_all_([WEIGHT.T], [INDICES], [ENTRIES], [1.0]),
    "sparse_adamw_ with a list too short": lambda: adamw(grads=[]),
    "sparse_adamw_ with a scale too many": lambda: adamw(scales=[1.0, 2.0]),
    "sparse_adamw_ with a short gradient": lambda: adamw(grads=[ENTRIES[:2]]),
    "sparse_adamw_ with a bfloat16 moment": lambda: adamw(exp_avgs=[ENTRIES.bfloat16()]),
    "sparse_adamw_ with a transposed weight": lambda: adamw(weights=[WEIGHT.T]),
    "stratified_indices_ of more than there is": lambda: ops.stratified_indices_(INDICES.clone(), 1, 2, 0),
    "stratified_indices_ of too many rows": lambda: ops.stratified_indices_(INDICES.long(), 2**32, 1, 0),
    "stratified_indices_ of runs that do not divide the rows": lambda: ops.stratified_indices_(INDICES[:2].clone(), 5, 60, 0, 2),
    "stratified_indices_ of part of a run": lambda: ops.stratified_indices_(INDICES[:3].clone(), 8, 60, 0, 2),
    "stratified_indices_ of runs of nothing": lambda: ops.stratified_indices_(INDICES.clone(), 8, 60, 0, 0),
    "stratified_indices_ in too small integers": lambda: ops.stratified_indices_(INDICES.clone(), 2**16, 2**16, 0),
    "stratified_indices_ in float": lambda: ops.stratified_indices_(ENTRIES.clone(), 4, 6, 0),
    "uniform_indices_ of more than there is": lambda: ops.uniform_indices_(INDICES.clone(), 2, 0),
    "uniform_indices_ in too small integers": lambda: ops.uniform_indices_(INDICES.clone(), 2**31 + 1, 0),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "_"))
def test_a_wrong_argument_is_named(case):
    op = case.split()[0]
    with pytest.raises(ValueError, match=r"expected .*got ") as raised:
        BAD[case]()
    assert str(raised.value).startswith(f"{op}: expected ")


def test_the_largest_position_of_int32_is_allowed():
    drawn = torch.empty(50, dtype=torch.int32)
    ops.uniform_indices_(drawn, 2**31, 3)
    assert drawn.min() >= 0
    ops.stratified_indices_(drawn, 2**15, 2**16, 3)
    assert (drawn.diff() > 0).all() and drawn[0] >= 0


CALLS = {
    "sddmm": lambda weight, bad: ops.sddmm(torch.ones(2, 4), torch.ones(2, 6), bad),
    "gather": lambda weight, bad: ops.gather(weight, bad),
    "patch_": lambda weight, bad: ops.patch_(weight, bad, ENTRIES, ENTRIES + 1),
    "patch_all_": lambda weight, bad: ops.patch_all_([weight], [bad], [ENTRIES], [ENTRIES + 1], [1.0]),
    "scatter_add_all_": lambda weight, bad: ops.scatter_add_all_([weight], [bad], [ENTRIES + 1], [1.0]),
    "sparse_adamw_": lambda weight, bad: adamw(weights=[weight], indices=[bad], grads=[ENTRIES + 1]),
}


@pytest.mark.skipif(not native.has_extension(), reason="the compiled CPU kernels are not there; PyTorch has messages of its own")
@pytest.mark.parametrize("bad", [[1, 5, 24], [-1, 5, 23]], ids=["behind", "before"])
@pytest.mark.parametrize("op", CALLS)
def test_indices_of_another_weight_are_refused_and_nothing_is_written(op, bad):
    weight = WEIGHT.clone()
    with pytest.raises(
        RuntimeError, match=rf"{op}: expected indices in \[0, 24\), got {bad[0]} to {bad[-1]}; they belong to another"
    ):
        CALLS[op](weight, torch.tensor(bad, dtype=torch.int32))
    assert torch.equal(weight, WEIGHT)
