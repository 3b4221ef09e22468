"""The CUDA kernels, compiled by g++ and run on the CPU with one fiber per thread: the problem table, and every thread order."""

from __future__ import annotations

import pytest
import torch

from problems import (
    INDEX_DTYPES,
    PROBLEMS,
    AdamWProblem,
    adamw_on_dense,
    assert_within,
    bits,
    check_sddmm,
    guarded,
    guards_hold,
    make_adamw,
    make_entries,
    make_sddmm,
    oracle_patch,
    oracle_scatter_add,
    plain_patch,
    plain_scatter_add,
    run_problems,
    tolerance,
)
from sprand import native
from sprand.kernels import ops as sprand_ops
from sprand.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDINARY, LARGE = PROBLEMS[0], PROBLEMS[-1]
SPLIT = next(problem for problem in PROBLEMS if problem.reason == "more tokens than one token block")
ADAMW = {"lr": 2**-7, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": False}

problem_table = pytest.mark.parametrize("problem", PROBLEMS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
index_dtypes = pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def run_adamw(emulated, made: AdamWProblem, lr_tensor=None, grad_coef=None, found_inf=None, **options) -> None:
    """All steps of `made` in place."""
    chosen = ADAMW | options
    rest = chosen["lr"], *chosen["betas"], chosen["eps"], chosen["weight_decay"], chosen["maximize"]
    for grads in made.grads:
        for step in made.steps:
            step += 1
        emulated.sparse_adamw_(
            made.weights, made.indices, made.bases, made.deltas, grads, made.exp_avgs, made.exp_avg_sqs, made.steps, made.scales,
            *rest, lr_tensor, grad_coef, found_inf,
        )  # fmt: skip


def check_adamw(made: AdamWProblem, coef: float = 1.0, **options) -> None:
    """Deltas and moments of all targets together against dense AdamW; weights are the patch of those deltas, bit for bit."""
    oracle = adamw_on_dense(made, torch.float64, coef, **ADAMW | options)
    plain = adamw_on_dense(made, torch.float32, coef, **ADAMW | options)
    for name, values in (("delta", made.deltas), ("exp_avg", made.exp_avgs), ("exp_avg_sq", made.exp_avg_sqs)):
        exact, ordinary = (torch.cat([target[name] for target in targets]) for targets in (oracle, plain))
        assert_within(torch.cat(values), exact, tolerance(ordinary, exact, torch.float32))
    for weight, *patch in zip(made.weights, made.indices, made.bases, made.deltas, made.scales, strict=True):
        expected = weight.clone()
        reference.patch_(expected, *patch)
        assert torch.equal(bits(weight), bits(expected))


@pytest.mark.parametrize("op", sorted(set(sprand_ops.SCHEMAS) - set(sprand_ops.ON_BLAS)))
def test_every_operator_has_a_kernel(op, emulated):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sprand_simt::{op}", "CPU")
    if native.problems["_C_cuda"] is None:
        assert native.kernel_of(op, "cuda") == "CUDA"


@problem_table
@dtypes
@index_dtypes
def test_sddmm(problem, dtype, index_dtype, emulated):
    grad_output, input, indices = make_sddmm(problem, dtype, index_dtype)
    check_sddmm(emulated.sddmm(grad_output, input, indices), grad_output, input, indices)


@dtypes
def test_sddmm_takes_any_strides(dtype, emulated):
    grad_output, input, indices = make_sddmm(ORDINARY, dtype, torch.int32)
    expected = emulated.sddmm(grad_output, input, indices)
    assert torch.equal(emulated.sddmm(grad_output.T.contiguous().T, input.T.contiguous().T, indices), expected)
    assert torch.equal(emulated.sddmm(grad_output.repeat_interleave(2, 0)[::2], input, indices), expected)


@dtypes
def test_sddmm_reads_nothing_outside_its_inputs(dtype, emulated):
    for problem in (ORDINARY, SPLIT, LARGE):
        grad_output, input, indices = make_sddmm(problem, dtype, torch.int32)
        expected = emulated.sddmm(grad_output, input, indices)
        assert torch.equal(emulated.sddmm(guarded(grad_output)[0], guarded(input)[0], indices), expected)


@problem_table
@dtypes
@index_dtypes
def test_gather_patch_and_scatter_add(problem, dtype, index_dtype, emulated):
    entries = make_entries(problem, dtype, index_dtype)
    where = entries.indices.long()
    assert torch.equal(bits(emulated.gather(entries.weight, entries.indices)), bits(entries.weight.flatten()[where]))

    def patch(ops, weight, scale):
        ops.patch_(weight, entries.indices, entries.base, entries.delta, scale)

    def scatter_add(ops, weight, scale):
        ops.scatter_add_all_([weight], [entries.indices], [entries.delta], [scale])

    for write, scale, oracle_of, plain_of in (
        (patch, 0.3, oracle_patch, plain_patch),
        (scatter_add, -1.7, oracle_scatter_add, plain_scatter_add),
    ):
        weight, memory = guarded(entries.weight)
        write(emulated, weight, scale)
        assert guards_hold(memory)
        expected = entries.weight.clone()
        write(reference, expected, scale)
        assert torch.equal(bits(weight), bits(expected))
        oracle = oracle_of(entries, scale)
        assert_within(weight, oracle, tolerance(plain_of(entries, scale), oracle, dtype))

    weight = entries.weight.clone()
    emulated.patch_(weight, entries.indices, entries.base, None)
    assert torch.equal(bits(emulated.gather(weight, entries.indices)), bits(entries.base))


@dtypes
@index_dtypes
def test_indices_outside_of_the_weight_are_not_followed(dtype, index_dtype, emulated):
    """No host can look at a pattern on a device without waiting for it: the kernels hold every index inside the weight."""
    entries = make_entries(ORDINARY, dtype, index_dtype)
    numel, count = entries.weight.numel(), 6
    indices = torch.tensor([-(2**31), -1, 3, numel - 1, numel, 2**31 - 1], dtype=index_dtype)
    good, where = torch.tensor([2, 3]), torch.tensor([3, numel - 1])
    base, values = entries.base[:count].contiguous(), torch.ones(count)
    gathered = emulated.gather(entries.weight, indices)
    assert torch.equal(gathered[good], entries.weight.flatten()[where])
    assert gathered[[0, 1, 4, 5]].count_nonzero() == 0

    weight, memory = guarded(entries.weight)
    emulated.patch_(weight, indices, base, values, 1.0)
    emulated.scatter_add_all_([weight], [indices], [values], [1.0])
    lists = [[values.clone()] for _ in range(4)]
    emulated.sparse_adamw_([weight], [indices], [base], *lists, [torch.ones(())], [1.0], 0.1, 0.9, 0.99, 1e-8, 0.0, False)
    assert guards_hold(memory)
    changed = (weight != entries.weight).flatten().nonzero().flatten()
    assert set(changed.tolist()) == set(where.tolist())

    grad_output, input, _ = make_sddmm(ORDINARY, dtype, index_dtype)
    sums = emulated.sddmm(grad_output, input, indices)
    assert torch.equal(sums[good], emulated.sddmm(grad_output, input, where.to(index_dtype)))
    assert sums[[0, 1, 4, 5]].count_nonzero() == 0


@dtypes
@pytest.mark.parametrize("delta, scale", [(0.0, 1.0), (-0.0, 1.0), (1.5, 0.0)])
def test_zero_change_keeps_the_bits_of_base(dtype, delta, scale, emulated):
    info = torch.finfo(dtype)
    base = torch.tensor([0.0, -0.0, info.max, info.min, -info.tiny, float("inf"), float("-inf")], dtype=dtype)
    weight = torch.ones(len(base), dtype=dtype)
    emulated.patch_(weight, torch.arange(len(base)), base, torch.full((len(base),), delta), scale)
    assert torch.equal(bits(weight), bits(base))


@problem_table
@dtypes
@index_dtypes
def test_sparse_adamw(problem, dtype, index_dtype, emulated):
    made = make_adamw([problem], dtype, index_dtype)
    run_adamw(emulated, made)
    check_adamw(made)


@pytest.mark.parametrize(
    "options",
    [{"maximize": True}, {"weight_decay": 0.0}, {"betas": (0.0, 0.5)}, {"betas": (0.95, 0.99999)}, {"eps": 1e-3}],
    ids=str,
)
def test_sparse_adamw_takes_the_options_of_adamw(options, emulated):
    made = make_adamw(PROBLEMS[:-1], torch.float32, torch.int32, steps=5)
    run_adamw(emulated, made, **options)
    check_adamw(made, **options)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])
def test_sparse_adamw_reads_its_scalars_from_tensors(shape, emulated):
    made = make_adamw([ORDINARY, SPLIT], torch.bfloat16, torch.int64)
    lr, coef, no = (torch.full(shape, value) for value in (2**-5, 0.25, 0.0))
    run_adamw(emulated, made, lr=123.0, lr_tensor=lr, grad_coef=coef, found_inf=no, maximize=True)
    check_adamw(made, coef=0.25, lr=2**-5, maximize=True)


def test_sparse_adamw_with_found_inf_changes_nothing(emulated):
    made, untouched = (make_adamw([ORDINARY, LARGE], torch.bfloat16, torch.int32, steps=1) for _ in range(2))
    made.grads[0][0][3] = float("nan")
    run_adamw(emulated, made, found_inf=torch.ones(()))
    for name in ("weights", "deltas", "exp_avgs", "exp_avg_sqs"):
        assert all(map(torch.equal, map(bits, getattr(made, name)), map(bits, getattr(untouched, name))))


@pytest.mark.parametrize("key", [0, -1, 2**63 - 1, 0x0123456789ABCDEF])
@index_dtypes
def test_draws_equal_the_reference_bit_for_bit(key, index_dtype, emulated):
    shapes = [(1, 1, 1), (1, 64, 8), (7, 24, 0), (7, 24, 24), (16, 256, 512), (33, 65, 300), (40, 30, 1200), (3000, 8, 700)]
    for rows, cols, nnz in shapes:
        drawn, expected = (torch.full((nnz,), -1, dtype=index_dtype) for _ in range(2))
        emulated.stratified_indices_(drawn, rows, cols, key)
        reference.stratified_indices_(expected, rows, cols, key)
        assert torch.equal(drawn, expected)
        emulated.uniform_indices_(drawn, rows * cols, key)
        reference.uniform_indices_(expected, rows * cols, key)
        assert torch.equal(drawn, expected)


@run_problems
@index_dtypes
def test_runs_equal_the_reference_bit_for_bit(rows, cols, nnz, run, index_dtype, emulated):
    drawn, expected = (torch.full((nnz,), -1, dtype=index_dtype) for _ in range(2))
    emulated.stratified_indices_(drawn, rows, cols, -5, *run)
    reference.stratified_indices_(expected, rows, cols, -5, *run)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("rows, cols", [(1, 2**32 - 1), (3, 2**32 - 8), (2**20, 2**20)])
def test_draws_equal_the_reference_on_huge_matrices(rows, cols, emulated):
    drawn, expected = (torch.full((600,), -1, dtype=torch.int64) for _ in range(2))
    emulated.stratified_indices_(drawn, rows, cols, 11)
    reference.stratified_indices_(expected, rows, cols, 11)
    assert torch.equal(drawn, expected)
    emulated.uniform_indices_(drawn, 2**62 - 1, 11)
    reference.uniform_indices_(expected, 2**62 - 1, 11)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("problem", [ORDINARY, SPLIT, LARGE], ids=str)
def test_results_do_not_depend_on_the_order_of_threads(problem, simt, emulated):
    def run() -> list[torch.Tensor]:
        made = make_adamw([problem], torch.bfloat16, torch.int32, steps=2)
        entries = make_entries(problem, torch.bfloat16, torch.int32)
        run_adamw(emulated, made)
        patched, added = entries.weight.clone(), entries.weight.clone()
        emulated.patch_(patched, entries.indices, entries.base, entries.delta)
        emulated.scatter_add_all_([added], [entries.indices], [entries.delta], [1.0])
        drawn, shuffled = torch.empty_like(entries.indices), torch.empty_like(entries.indices)
        emulated.stratified_indices_(drawn, problem.rows, problem.cols, 3)
        emulated.uniform_indices_(shuffled, problem.rows * problem.cols, 3)
        sums = emulated.sddmm(*make_sddmm(problem, torch.bfloat16, torch.int32))
        values = emulated.gather(entries.weight, entries.indices)
        return [sums, values, patched, added, drawn, shuffled, *made.weights, *made.deltas, *made.exp_avgs, *made.exp_avg_sqs]

    expected = run()
    for order in simt.ORDERS[1:]:
        simt.set_order(order)
        for result, first in zip(run(), expected, strict=True):
            assert torch.equal(bits(result), bits(first))


def test_wrong_arguments_are_refused(emulated):
    entries = make_entries(ORDINARY, torch.float32, torch.int32)
    weight, indices, base, delta = entries.weight, entries.indices, entries.base, entries.delta
    calls = {
        "float32, bfloat16 or float16": lambda: emulated.gather(weight.double(), indices),
        "int32 or int64": lambda: emulated.gather(weight, indices.short()),
        "contiguous weight": lambda: emulated.patch_(weight.T, indices, base, delta),
        "base": lambda: emulated.patch_(weight, indices, base.half(), delta),
        "delta": lambda: emulated.patch_(weight, indices, base, delta[1:]),
        "values": lambda: emulated.scatter_add_all_([weight], [indices], [delta.double()], [1.0]),
        "input \\[T, in\\]": lambda: emulated.sddmm(weight, weight[1:], indices),
        "one length": lambda: emulated.sparse_adamw_([weight], [], [], [], [], [], [], [], [], 0.1, 0.9, 0.99, 1e-8, 0.0, False),
        "more entries": lambda: emulated.stratified_indices_(indices, 2, 3, 0),
        "runs of 2 x 1": lambda: emulated.stratified_indices_(indices, 9, 64, 0, 2, 1),
        "positions": lambda: emulated.uniform_indices_(indices, 5, 0),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()
