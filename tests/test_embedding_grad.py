"""`embedding_grad` dispatched, in plain PyTorch and by the emulated CUDA kernel: problem table, frequent and foreign tokens."""

from __future__ import annotations

import pytest
import torch

from problems import (
    ORDINARY,
    PROBLEMS,
    Problem,
    assert_within,
    bits,
    dtypes,
    guarded,
    index_dtypes,
    make_embedding,
    make_indices,
    oracle_embedding_dense,
    plain_embedding_dense,
    problem_table,
    skip_unsupported,
    sum_dtype,
    tolerance,
)
from sprand.kernels import reference

LONG = next(problem for problem in PROBLEMS if problem.reason == "more tokens than one token block")


@pytest.fixture(params=["dispatched", "reference", "emulated"])
def embedding_grad(request, device):
    """The operator in one of its forms; whatever the emulated one allocates is full of NaN before it writes."""
    if request.param == "dispatched":
        yield torch.ops.sprand.embedding_grad
        return
    if device == "cuda":
        pytest.skip("the dispatched operator is the one for this device")
    if request.param == "reference":
        yield reference.embedding_grad
        return
    emulated = request.getfixturevalue("simt")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield emulated.ops.embedding_grad
    torch.use_deterministic_algorithms(False)


def skip_where_unsupported(embedding_grad, device: str, dtype: torch.dtype) -> None:
    skip_unsupported("cuda" if "simt" in str(embedding_grad) else device, dtype)


def check(embedding_grad, rows: int, grad_output, tokens, indices, padding_idx=None) -> None:
    result = embedding_grad(grad_output, tokens, indices, padding_idx)
    assert result.dtype == sum_dtype(grad_output.dtype)
    assert result.shape == indices.shape
    oracle = oracle_embedding_dense(grad_output, tokens, rows, padding_idx)
    limit = tolerance(
        plain_embedding_dense(grad_output, tokens, rows), oracle_embedding_dense(grad_output, tokens, rows), result.dtype
    )
    assert_within(result, oracle.flatten()[indices.long()], limit)


@problem_table
@dtypes
@index_dtypes
def test_it_is_the_chosen_part_of_the_dense_gradient(embedding_grad, problem, dtype, index_dtype, device):
    skip_where_unsupported(embedding_grad, device, dtype)
    if problem.rows == 0:
        grad_output, tokens, indices = make_embedding(problem, dtype, index_dtype, device)
        assert embedding_grad(grad_output, tokens, indices).shape == (0,)
        return
    arguments = make_embedding(problem, dtype, index_dtype, device)
    check(embedding_grad, problem.rows, *arguments)
    check(embedding_grad, problem.rows, *arguments, problem.rows // 2)


@pytest.mark.parametrize("frequent", [31, 32, 33, 63, 64, 65, 200])
@pytest.mark.parametrize("before", [0, 1, 31, 40])
def test_a_frequent_token_among_others(embedding_grad, frequent, before, device):
    """Runs of tokens that begin and end anywhere in a block's part of the sorted tokens, also two long ones in a row."""
    generator = torch.Generator().manual_seed(frequent)
    tokens = torch.cat(
        [torch.randint(0, 4, (before,)), torch.full((frequent,), 4), torch.full((70,), 5), torch.tensor([7, 9, 9])]
    )
    tokens = tokens[torch.randperm(len(tokens), generator=generator)].to(device)
    grad_output = torch.randn(len(tokens), 300, generator=generator).to(device)
    problem = Problem("", len(tokens), 10, 300, 2900)
    check(embedding_grad, 10, grad_output, tokens, make_indices(problem, torch.int32, device))


def test_tokens_that_meet_no_entry_give_zeros(embedding_grad, device):
    grad_output = torch.full((100, 8), float("nan"), device=device)
    indices = torch.tensor([0, 7, 40, 41], dtype=torch.int32, device=device)  # rows 0 and 5
    tokens = torch.tensor([1, 4, 6, 1000], device=device).repeat(25)
    assert torch.equal(embedding_grad(grad_output, tokens, indices), torch.zeros(4, device=device))
    grad_output[:50] = 1.0
    tokens[:50] = 5
    assert embedding_grad(grad_output, tokens, indices).tolist() == [0.0, 0.0, 50.0, 50.0]


@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
def test_tokens_outside_the_vocabulary_are_left_out(embedding_grad, token_dtype, device):
    grad_output, tokens, indices = make_embedding(LONG, torch.float32, torch.int32, device)
    expected = embedding_grad(grad_output, tokens, indices)
    info = torch.iinfo(token_dtype)
    foreign = torch.tensor([-1, info.min, info.max, LONG.rows, -LONG.rows] * 40, dtype=token_dtype, device=device)
    more = torch.cat([foreign, tokens.to(token_dtype), foreign])
    padded = torch.nn.functional.pad(grad_output, (0, 0, len(foreign), len(foreign)), value=float("nan"))
    assert torch.equal(bits(embedding_grad(padded, more, indices)), bits(expected))


@dtypes
def test_it_reads_nothing_that_was_not_chosen(embedding_grad, dtype, device):
    skip_where_unsupported(embedding_grad, device, dtype)
    problem = next(problem for problem in PROBLEMS if problem.reason == "most rows empty")
    grad_output, tokens, indices = make_embedding(problem, dtype, torch.int32, device)
    tokens[1::3] = indices[0] // problem.cols
    expected = embedding_grad(grad_output, tokens, indices)
    assert expected.any()
    used = torch.zeros_like(grad_output, dtype=torch.bool)
    rows, columns = indices.long() // problem.cols, indices.long() % problem.cols
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        used[tokens == row, column] = True
    assert not used.all()
    poisoned, _ = guarded(grad_output.masked_fill(~used, float("nan")))
    assert torch.equal(bits(embedding_grad(poisoned, tokens, indices)), bits(expected))


def test_positions_out_of_order_read_nothing_outside(embedding_grad, device):
    grad_output, tokens, indices = make_embedding(LONG, torch.float32, torch.int32, device)
    grad_output, _ = guarded(grad_output)
    shuffled = indices[torch.randperm(len(indices), device=device)]
    repeated = indices[-1:].repeat(LONG.cols + 50)
    for positions in (shuffled, repeated, torch.cat([indices, shuffled])):
        assert embedding_grad(grad_output, tokens, positions).isfinite().all()


@dtypes
def test_it_takes_any_strides_and_token_dtype(embedding_grad, dtype, device):
    skip_where_unsupported(embedding_grad, device, dtype)
    grad_output, tokens, indices = make_embedding(LONG, dtype, torch.int64, device)
    expected = embedding_grad(grad_output, tokens, indices)
    for rows, numbers in (
        (grad_output.T.contiguous().T, tokens.int()),
        (grad_output.repeat_interleave(2, 0)[::2], tokens.repeat_interleave(3)[::3]),
        (torch.nn.functional.pad(grad_output, (3, 5), value=float("nan"))[:, 3:-5], tokens),
    ):
        assert torch.equal(embedding_grad(rows, numbers, indices), expected)
    ones = torch.ones((), dtype=dtype, device=device).expand(LONG.tokens, LONG.cols)
    times_met = torch.bincount(tokens, minlength=LONG.rows)[indices // LONG.cols]
    assert torch.equal(embedding_grad(ones, tokens, indices), times_met.to(expected.dtype))


def test_a_row_is_summed_alike_whatever_the_other_tokens(embedding_grad, device):
    grad_output, tokens, indices = make_embedding(LONG, torch.float32, torch.int32, device)
    together = embedding_grad(grad_output, tokens, indices)
    for row in range(LONG.rows):
        mine = indices // LONG.cols == row
        alone = embedding_grad(grad_output[tokens == row], tokens[tokens == row], indices)
        assert torch.equal(bits(alone[mine]), bits(together[mine]))


@dtypes
def test_all_threads_and_the_cuda_kernel_give_the_same_bits(dtype, simt, threads):
    skip_unsupported("cuda", dtype)
    try:
        for problem in PROBLEMS:
            arguments = make_embedding(problem, dtype, torch.int32)
            threads(1)
            expected = torch.ops.sprand.embedding_grad(*arguments)
            for count in (2, 3):
                threads(count)
                assert torch.equal(bits(torch.ops.sprand.embedding_grad(*arguments)), bits(expected))
            for order in simt.ORDERS:
                simt.set_order(order)
                assert torch.equal(bits(simt.ops.embedding_grad(*arguments)), bits(expected)), (problem, order)
    finally:
        simt.set_order(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_bits_of_the_cpu_without_waiting():
    arguments = make_embedding(Problem("", 16384, 3000, 512, 60_000), torch.bfloat16, torch.int32)
    expected = torch.ops.sprand.embedding_grad(*arguments)
    there = [value.cuda() for value in arguments]
    torch.ops.sprand.embedding_grad(*there)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    result = torch.ops.sprand.embedding_grad(*there)
    assert not busy.query()
    assert torch.equal(result.cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.sprand.embedding_grad(*there)
    graph.replay()
    assert torch.equal(captured.cpu(), expected)


def test_wrong_arguments_are_refused(simt):
    grad_output, tokens, indices = make_embedding(ORDINARY, torch.float32, torch.int32)
    calls = {
        "float32, bfloat16 or float16": (grad_output.double(), tokens, indices),
        "tokens \\[T\\]": (grad_output, tokens[1:], indices),
        "tokens of int32 or int64": (grad_output, tokens.short(), indices),
        "indices of int32 or int64": (grad_output, tokens, indices.short()),
        "more indices": (grad_output[:, :0], tokens, indices),
    }
    for message, arguments in calls.items():
        with pytest.raises(RuntimeError, match=message):
            simt.ops.embedding_grad(*arguments)
