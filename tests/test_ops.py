"""Every operator against its float64 oracle, dispatched and in plain PyTorch, on the table of `problems.py`."""

from __future__ import annotations

import pytest
import torch

from problems import (
    ORDINARY,
    PROBLEMS,
    assert_within,
    bits,
    check_sddmm,
    dtypes,
    guarded,
    guards_hold,
    implementations,
    index_dtypes,
    make_adamw,
    make_embedding,
    make_entries,
    make_indices,
    make_sddmm,
    oracle_patch,
    oracle_scatter_add,
    plain_patch,
    plain_scatter_add,
    problem_table,
    run_problems,
    skip_unsupported,
    sum_dtype,
    tolerance,
)
from sprand import native
from sprand.kernels import reference


@problem_table
@dtypes
@index_dtypes
@implementations
def test_sddmm_is_the_chosen_part_of_the_weight_gradient(ops, problem, dtype, index_dtype, device):
    skip_unsupported(device, dtype)
    grad_output, input, indices = make_sddmm(problem, dtype, index_dtype, device)
    check_sddmm(ops.sddmm(grad_output, input, indices), grad_output, input, indices)


@dtypes
@implementations
def test_sddmm_takes_any_strides(ops, dtype, device):
    skip_unsupported(device, dtype)
    grad_output, input, indices = make_sddmm(ORDINARY, dtype, torch.int32, device)
    expected = ops.sddmm(grad_output, input, indices)
    transposed = grad_output.T.contiguous().T, input.T.contiguous().T
    strided = grad_output.repeat_interleave(2, 0)[::2], input.repeat_interleave(3, 1)[:, ::3]
    offset = torch.nn.functional.pad(grad_output, (3, 5), value=float("nan"))[:, 3:-5], input
    for left, right in (transposed, strided, offset):
        assert torch.equal(ops.sddmm(left, right, indices), expected)


@implementations
def test_sddmm_of_expanded_gradient_sums_the_input(ops, device):
    _, input, indices = make_sddmm(ORDINARY, torch.float32, torch.int64, device)
    ones = torch.ones((), device=device).expand(ORDINARY.tokens, ORDINARY.rows)
    oracle = input.double().sum(0).expand(ORDINARY.rows, -1)
    result = ops.sddmm(ones, input, indices)
    assert_within(result, oracle.flatten()[indices], tolerance(ones.T @ input, oracle, result.dtype))


@dtypes
@implementations
def test_sddmm_reads_no_row_or_column_that_was_not_chosen(ops, dtype, device):
    skip_unsupported(device, dtype)
    problem = next(problem for problem in PROBLEMS if problem.reason == "most rows empty")
    grad_output, input, indices = make_sddmm(problem, dtype, torch.int32, device)
    expected = ops.sddmm(grad_output, input, indices)
    unused_rows = torch.ones(problem.rows, dtype=torch.bool, device=device).index_fill(0, indices.long() // problem.cols, False)
    unused_cols = torch.ones(problem.cols, dtype=torch.bool, device=device).index_fill(0, indices.long() % problem.cols, False)
    assert unused_rows.any() and unused_cols.any()
    grad_output, _ = guarded(grad_output.masked_fill(unused_rows, float("nan")))
    input, _ = guarded(input.masked_fill(unused_cols, float("inf")))
    assert torch.equal(ops.sddmm(grad_output, input, indices), expected)


@problem_table
@dtypes
@implementations
def test_linear_grad_is_the_weight_gradient(ops, problem, dtype, device):
    skip_unsupported(device, dtype)
    grad_output, input, _ = make_sddmm(problem, dtype, torch.int32, device)
    oracle = grad_output.double().T @ input.double()
    result = ops.linear_grad(grad_output, input)
    assert result.is_contiguous() and result.dtype == sum_dtype(dtype)
    plain = grad_output.float().T @ input.float()
    assert_within(result, oracle, tolerance(plain, oracle, result.dtype))


@dtypes
@implementations
def test_linear_grad_takes_any_strides(ops, dtype, device):
    skip_unsupported(device, dtype)
    grad_output, input, _ = make_sddmm(ORDINARY, dtype, torch.int32, device)
    oracle = grad_output.double().T @ input.double()
    offset = torch.nn.functional.pad(grad_output, (3, 5), value=float("nan"))[:, 3:-5], input.T.contiguous().T
    result = ops.linear_grad(*offset)
    plain = grad_output.float().T @ input.float()
    assert_within(result, oracle, tolerance(plain, oracle, result.dtype))


@problem_table
@dtypes
@implementations
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_input_grad_is_that_of_the_patched_weight(ops, problem, dtype, transposed, device):
    skip_unsupported(device, dtype)
    entries = make_entries(problem, dtype, torch.int32, device)
    weight = oracle_patch(entries, 0.5)
    grad_output = torch.randn(7, weight.shape[1 if transposed else 0], dtype=dtype, device=device)
    result = ops.linear_input_grad(grad_output, entries.weight, entries.indices, entries.base, entries.delta, 0.5, transposed)
    used = weight.to(dtype)  # rounded as a weight is
    oracle = grad_output.double() @ (used.T if transposed else used).double()
    assert result.shape == oracle.shape and result.dtype == dtype
    plain = torch.float32 if dtype == torch.float64 else dtype
    limit = tolerance(grad_output.to(plain) @ (used.T if transposed else used).to(plain), oracle, dtype)
    assert_within(result, oracle, limit)


@problem_table
@dtypes
@index_dtypes
@implementations
def test_gather_reads_the_bits(ops, problem, dtype, index_dtype, device):
    skip_unsupported(device, dtype)
    entries = make_entries(problem, dtype, index_dtype, device)
    expected = entries.weight.flatten()[entries.indices.long()]
    assert torch.equal(bits(ops.gather(entries.weight, entries.indices)), bits(expected))


@problem_table
@dtypes
@index_dtypes
def test_patch_is_accurate_and_equal_in_both(problem, dtype, index_dtype, device):
    skip_unsupported(device, dtype)
    entries = make_entries(problem, dtype, index_dtype, device)
    scale = 0.3
    patched = {}
    for name, ops in (("dispatched", torch.ops.sprand), ("reference", reference)):
        patched[name], memory = guarded(entries.weight)
        assert ops.patch_(patched[name], entries.indices, entries.base, entries.delta, scale) is None
        assert guards_hold(memory)
        oracle = oracle_patch(entries, scale)
        assert_within(patched[name], oracle, tolerance(plain_patch(entries, scale), oracle, dtype))
    assert torch.equal(bits(patched["dispatched"]), bits(patched["reference"]))


@problem_table
@dtypes
@index_dtypes
def test_scatter_add_is_accurate_and_equal_in_both(problem, dtype, index_dtype, device):
    skip_unsupported(device, dtype)
    entries = make_entries(problem, dtype, index_dtype, device)
    scale = -1.7
    added = {}
    for name, ops in (("dispatched", torch.ops.sprand), ("reference", reference)):
        added[name], memory = guarded(entries.weight)
        assert ops.scatter_add_all_([added[name]], [entries.indices], [entries.delta], [scale]) is None
        assert guards_hold(memory)
        oracle = oracle_scatter_add(entries, scale)
        assert_within(added[name], oracle, tolerance(plain_scatter_add(entries, scale), oracle, dtype))
    assert torch.equal(bits(added["dispatched"]), bits(added["reference"]))


@dtypes
@implementations
def test_only_chosen_entries_are_written(ops, dtype, device):
    skip_unsupported(device, dtype)
    entries = make_entries(ORDINARY, dtype, torch.int32, device)
    chosen = torch.zeros(entries.weight.numel(), dtype=torch.bool, device=device)
    chosen[entries.indices.long()] = True
    poisoned = torch.where(chosen.view_as(entries.weight), entries.weight, float("nan"))
    for write in (
        lambda weight: ops.patch_(weight, entries.indices, entries.base, entries.delta),
        lambda weight: ops.scatter_add_all_([weight], [entries.indices], [entries.delta], [0.5]),
    ):
        weight = poisoned.clone()
        write(weight)
        assert torch.equal(bits(weight).flatten()[~chosen], bits(poisoned).flatten()[~chosen])
        assert weight.flatten()[chosen].isfinite().all()


@dtypes
@index_dtypes
@implementations
def test_patch_without_delta_puts_base_back_bit_for_bit(ops, dtype, index_dtype, device):
    skip_unsupported(device, dtype)
    entries = make_entries(ORDINARY, dtype, index_dtype, device)
    original = entries.weight.clone()
    base = ops.gather(entries.weight, entries.indices)
    for scale in (1.0, -3.0):
        ops.patch_(entries.weight, entries.indices, base, entries.delta, scale)
        assert not torch.equal(entries.weight, original)
    ops.patch_(entries.weight, entries.indices, base, None)
    assert torch.equal(bits(entries.weight), bits(original))


@dtypes
@implementations
@pytest.mark.parametrize("delta, scale", [(0.0, 1.0), (-0.0, 1.0), (1.5, 0.0), (-1.5, 0.0)])
def test_zero_change_keeps_the_bits_of_base(ops, dtype, device, delta, scale):
    skip_unsupported(device, dtype)
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.max, info.min, info.tiny, -info.smallest_normal, info.eps, float("inf"), float("-inf")]
    base = torch.tensor(special, dtype=dtype, device=device)
    weight = torch.zeros(3, 7, dtype=dtype, device=device)
    indices = torch.arange(1, 1 + 2 * len(special), 2, dtype=torch.int32, device=device)
    change = torch.full(base.shape, delta, dtype=sum_dtype(dtype), device=device)
    ops.patch_(weight, indices, base, change, scale)
    assert torch.equal(bits(weight.flatten()[indices.long()]), bits(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@implementations
def test_patch_rounds_once_from_float32(ops, dtype, device):
    eps = torch.finfo(dtype).eps
    base = torch.tensor([1.0, 1.0, 1.0], dtype=dtype, device=device)
    delta = torch.tensor([eps * 0.499, eps * 0.501, eps * 1.501], device=device)  # in units of the last place: 0.499 ...
    weight = torch.zeros(3, dtype=dtype, device=device)
    ops.patch_(weight, torch.arange(3, dtype=torch.int32, device=device), base, delta)
    assert weight.tolist() == [1.0, 1.0 + eps, 1.0 + 2 * eps]


@implementations
def test_patch_rounds_the_product_before_the_sum(ops, device):
    scale, delta = 1 + 2**-12, 1 + 2**-12  # the product 1 + 2**-11 + 2**-24 is a tie, rounded to 1 + 2**-11
    weight = torch.zeros(1, device=device)
    base = torch.tensor([-1.0], device=device)
    ops.patch_(weight, torch.zeros(1, dtype=torch.int32, device=device), base, torch.tensor([delta], device=device), scale)
    assert weight.item() == 2**-11


@pytest.mark.parametrize("op", ["patch_", "patch_all_", "scatter_add_all_", "sparse_adamw_"])
def test_writes_leave_the_autograd_version_alone(op, device):
    arguments = sample_calls(device)[op]
    targets, deltas = arguments[0], arguments[2 if op.startswith("scatter_add") else 3]
    if isinstance(targets, torch.Tensor):
        targets, deltas = [targets], [deltas]
    for delta in deltas:
        delta.requires_grad_()
    with torch.no_grad():
        getattr(torch.ops.sprand, op)(*arguments)
    for weight in targets:
        assert weight._version == 0
        assert not weight.requires_grad


@dtypes
@implementations
def test_sddmm_repeats_bit_for_bit_on_any_number_of_threads(ops, dtype, threads, device):
    skip_unsupported(device, dtype)
    for problem in PROBLEMS:
        arguments = make_sddmm(problem, dtype, torch.int32, device)
        threads(1)
        alone = ops.sddmm(*arguments)
        threads(2)
        for _ in range(2):
            assert torch.equal(ops.sddmm(*arguments), alone)


def sample_calls(device: str = "cpu") -> dict[str, tuple]:
    """One call of each operator."""
    made = make_adamw([PROBLEMS[3], ORDINARY], torch.bfloat16, torch.int32, device, steps=1)
    entries = make_entries(ORDINARY, torch.float32, torch.int32, device)
    lists = (made.weights, made.indices, made.bases, made.deltas, made.grads[0], made.exp_avgs, made.exp_avg_sqs)
    one, zero = torch.ones((), device=device), torch.zeros((), device=device)
    steps = [one.clone() for _ in made.steps]
    written = entries.weight.clone(), entries.indices, entries.base, entries.delta, 0.5
    torch.ops.sprand.patch_(*written)
    return {
        "sddmm": make_sddmm(ORDINARY, torch.bfloat16, torch.int32, device),
        "linear": (make_sddmm(ORDINARY, torch.bfloat16, torch.int32, device)[1], entries.weight.bfloat16(), None, False),
        "linear_grad": make_sddmm(ORDINARY, torch.bfloat16, torch.int32, device)[:2],
        "linear_input_grad": (torch.randn(9, ORDINARY.rows, device=device), *written, False),
        "embedding_grad": (*make_embedding(ORDINARY, torch.bfloat16, torch.int32, device), 3),
        "gather": (entries.weight, entries.indices),
        "patch_": (entries.weight, entries.indices, entries.base, entries.delta, 0.5),
        "patch_all_": (made.weights, made.indices, made.bases, made.deltas, made.scales),
        "scatter_add_all_": (made.weights, made.indices, made.grads[0], made.scales),
        "sparse_adamw_": (*lists, steps, made.scales, 0.1, 0.9, 0.999, 1e-8, 0.01, False, None, one, zero),
        "stratified_indices_": (make_indices(ORDINARY, torch.int32, device), ORDINARY.rows, ORDINARY.cols, 7),
        "uniform_indices_": (make_indices(ORDINARY, torch.int64, device), ORDINARY.rows * ORDINARY.cols, 7),
    }


@pytest.mark.parametrize("op", sample_calls())
def test_opcheck(op, device):
    torch.library.opcheck(getattr(torch.ops.sprand, op).default, sample_calls(device)[op])


@pytest.mark.parametrize("op", ["patch_", "patch_all_", "gather", "sddmm", "embedding_grad"])
def test_opcheck_of_empty_and_optional(op, device):
    problem = PROBLEMS[1]
    entries = make_entries(problem, torch.float32, torch.int32, device)
    calls = {
        "patch_": (entries.weight, entries.indices, entries.base, None),
        "patch_all_": ([entries.weight], [entries.indices], [entries.base], None, [1.0]),
        "gather": (entries.weight, entries.indices),
        "sddmm": make_sddmm(problem, torch.float32, torch.int64, device),
        "embedding_grad": make_embedding(problem, torch.float32, torch.int64, device),
    }
    torch.library.opcheck(getattr(torch.ops.sprand, op).default, calls[op])


@dtypes
def test_fakes_tell_shape_and_dtype(dtype):
    grad_output, input, indices = (value.to("meta") for value in make_sddmm(ORDINARY, dtype, torch.int32))
    result = torch.ops.sprand.sddmm(grad_output, input, indices)
    assert (result.shape, result.dtype, result.device.type) == ((ORDINARY.nnz,), sum_dtype(dtype), "meta")
    result = torch.ops.sprand.linear_grad(grad_output, input)
    shape = ORDINARY.rows, ORDINARY.cols
    assert (result.shape, result.dtype, result.device.type) == (shape, sum_dtype(dtype), "meta")
    result = torch.ops.sprand.embedding_grad(input, torch.empty(ORDINARY.tokens, dtype=torch.int64, device="meta"), indices)
    assert (result.shape, result.dtype, result.device.type) == ((ORDINARY.nnz,), sum_dtype(dtype), "meta")
    weight = torch.empty(ORDINARY.rows, ORDINARY.cols, dtype=dtype, device="meta")
    result = torch.ops.sprand.gather(weight, indices)
    assert (result.shape, result.dtype, result.device.type) == ((ORDINARY.nnz,), dtype, "meta")


def test_ops_compile_without_graph_breaks(device):
    grad_output, input, indices = make_sddmm(ORDINARY, torch.float32, torch.int32, device)
    entries = make_entries(ORDINARY, torch.float32, torch.int32, device)

    def step(weight):
        delta = torch.ops.sprand.sddmm(grad_output * 2, input, indices) + 1
        torch.ops.sprand.patch_(weight, indices, entries.base, delta, 0.5)
        torch.ops.sprand.scatter_add_all_([weight], [indices], [delta], [0.125])
        return torch.ops.sprand.gather(weight, indices) * 3

    eager_weight, compiled_weight = entries.weight.clone(), entries.weight.clone()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(compiled_weight), step(eager_weight))
    assert torch.equal(compiled_weight, eager_weight)


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@index_dtypes
def test_generators_equal_the_reference_bit_for_bit(key, index_dtype, device):
    small = [(1, 1, 1), (1, 64, 8), (7, 24, 0), (7, 24, 5), (7, 24, 24)]
    for rows, cols, nnz in (*small, (16, 256, 512), (33, 65, 300), (40, 30, 1200), (3000, 8, 700), (2, 100_000, 777)):
        drawn, expected = (torch.full((nnz,), -1, dtype=index_dtype, device=device) for _ in range(2))
        assert torch.ops.sprand.stratified_indices_(drawn, rows, cols, key) is None
        reference.stratified_indices_(expected, rows, cols, key)
        assert torch.equal(drawn, expected)
        assert torch.ops.sprand.uniform_indices_(drawn, rows * cols, key) is None
        reference.uniform_indices_(expected, rows * cols, key)
        assert torch.equal(drawn, expected)


@run_problems
@pytest.mark.parametrize("key", [0, -1, 0x0123456789ABCDEF])
@index_dtypes
def test_runs_equal_the_reference_bit_for_bit(rows, cols, nnz, run, key, index_dtype, device):
    drawn, expected = (torch.full((nnz,), -1, dtype=index_dtype, device=device) for _ in range(2))
    assert torch.ops.sprand.stratified_indices_(drawn, rows, cols, key, *run) is None
    reference.stratified_indices_(expected, rows, cols, key, *run)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("rows, cols", [(1, 2**32 - 1), (3, 2**32 - 8), (2**20, 2**20)])
def test_generators_equal_the_reference_on_huge_matrices(rows, cols, device):
    drawn, expected = (torch.full((3000,), -1, device=device) for _ in range(2))
    drawn, expected = drawn.long(), expected.long()
    torch.ops.sprand.stratified_indices_(drawn, rows, cols, 11)
    reference.stratified_indices_(expected, rows, cols, 11)
    assert torch.equal(drawn, expected)
    torch.ops.sprand.uniform_indices_(drawn, 2**62 - 1, 11)
    reference.uniform_indices_(expected, 2**62 - 1, 11)
    assert torch.equal(drawn, expected)


@pytest.mark.skipif(not native.has_extension(), reason="the compiled CPU kernels are not there; PyTorch sums in another order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sddmm_of_rows_that_share_columns_is_that_of_each_row_alone(dtype):
    """Sharing a load changes no bit, on the CPU and within a block of tokens."""
    for problem in PROBLEMS:
        if problem.where.startswith(("runs", "equal")):
            grad_output, input, indices = make_sddmm(problem, dtype, torch.int32)
            together = torch.ops.sprand.sddmm(grad_output[:32], input[:32], indices)
            for row in (0, problem.rows // 2, problem.rows - 1):
                there = indices // problem.cols == row
                alone = torch.ops.sprand.sddmm(grad_output[:32], input[:32], indices[there])
                assert torch.equal(together[there], alone)
