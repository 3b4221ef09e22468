"""What only a GPU can show of the CUDA operators: streams, graph capture, device guard, real sizes. Their table: test_ops.py."""

from __future__ import annotations

import pytest
import torch

from problems import (
    PROBLEMS,
    assert_within,
    bits,
    guarded,
    guards_hold,
    make_adamw,
    make_entries,
    make_indices,
    make_sddmm,
    tolerance,
)
from sprand import native
from sprand.kernels import ops as sprand_ops

if not torch.cuda.is_available():
    pytest.skip("these tests need a CUDA device, and a CUDA build of torch", allow_module_level=True)

pytestmark = pytest.mark.gpu
ops = torch.ops.sprand
ORDINARY, LARGE = PROBLEMS[0], PROBLEMS[-1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
WRITES = {
    "patch_": lambda weight, e: ops.patch_(weight, e.indices, e.base, e.delta, 0.3),
    "scatter_add_all_": lambda weight, e: ops.scatter_add_all_([weight], [e.indices], [e.delta], [-1.7]),
}


@pytest.fixture(autouse=True)
def full_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("op", sorted(set(sprand_ops.SCHEMAS) - set(sprand_ops.ON_BLAS)))
def test_the_cuda_kernels_serve_cuda_tensors(op):
    assert native.kernel_of(op, "cuda") == "CUDA"


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@dtypes
@pytest.mark.parametrize("op", WRITES)
def test_writes_are_those_of_the_cpu_bit_for_bit(op, problem, dtype):
    written = {}
    for device in ("cpu", "cuda"):
        entries = make_entries(problem, dtype, torch.int32, device)
        weight, memory = guarded(entries.weight)
        WRITES[op](weight, entries)
        assert guards_hold(memory)
        written[device] = bits(weight).cpu()
    assert torch.equal(written["cpu"], written["cuda"])


def test_draws_are_those_of_the_cpu():
    for rows, cols, nnz in ((4096, 4096, 167_773), (1000, 777, 7770), (14336, 4096, 1)):
        for draw, size in ((ops.stratified_indices_, (rows, cols)), (ops.uniform_indices_, (rows * cols,))):
            on_cpu, on_gpu = (torch.empty(nnz, dtype=torch.int32, device=device) for device in ("cpu", "cuda"))
            draw(on_cpu, *size, -5)
            draw(on_gpu, *size, -5)
            assert torch.equal(on_cpu, on_gpu.cpu())


@dtypes
@pytest.mark.parametrize(
    "tokens, rows, cols, nnz", [(8192, 2048, 1024, 20_971), (8192, 4096, 4096, 1678), (33, 4096, 4096, 167_773)]
)
def test_sddmm_of_real_sizes_is_accurate_and_repeats(tokens, rows, cols, nnz, dtype):
    grad_output, input = (torch.randn(tokens, width, device="cuda").to(dtype) for width in (rows, cols))
    indices = torch.empty(nnz, dtype=torch.int32, device="cuda")
    ops.stratified_indices_(indices, rows, cols, 1)
    result = ops.sddmm(grad_output, input, indices)
    oracle = (grad_output.double().T @ input.double()).flatten()[indices]
    plain = (grad_output.float().T @ input.float()).flatten()[indices]
    assert_within(result, oracle, tolerance(plain, oracle, torch.float32))
    assert torch.equal(ops.sddmm(grad_output, input, indices), result)


def test_positions_behind_two_to_the_31st():
    numel = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 3 * numel:
        pytest.skip("needs 6 GB of free device memory")
    weight = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    indices = torch.tensor([0, 2**31 - 1, 2**31, numel - 1], device="cuda")
    base = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16, device="cuda")
    ops.patch_(weight, indices, base, None)
    ops.scatter_add_all_([weight], [indices], [base.float()], [1.0])
    assert ops.gather(weight, indices).tolist() == [2.0, 4.0, 6.0, 8.0]
    assert weight[indices].tolist() == [2.0, 4.0, 6.0, 8.0]
    assert weight.count_nonzero().item() == 4


def adamw_arguments(made, step: int) -> tuple:
    lr, coef = (torch.full((), value, device=made.deltas[0].device) for value in (2**-5, 0.25))
    lists = (made.weights, made.indices, made.bases, made.deltas, made.grads[step], made.exp_avgs, made.exp_avg_sqs, made.steps)
    return *lists, made.scales, 0.0, 0.9, 0.999, 1e-8, 0.01, False, lr, coef, torch.zeros_like(lr)


def test_work_goes_to_the_current_stream():
    grad_output, input, indices = make_sddmm(LARGE, torch.bfloat16, torch.int32, "cuda")
    entries = make_entries(LARGE, torch.bfloat16, torch.int32, "cuda")
    expected_sums = ops.sddmm(grad_output, input, indices)
    expected_weight = entries.weight.clone()
    ops.patch_(expected_weight, indices, entries.base, entries.delta)
    late, late_base = torch.zeros_like(input), torch.zeros_like(entries.base)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # a kernel on any other stream runs before the copies and sees zeros
        late.copy_(input)
        late_base.copy_(entries.base)
        sums = ops.sddmm(grad_output, late, indices)
        ops.patch_(entries.weight, indices, late_base, entries.delta)
        values = ops.gather(entries.weight, indices)
    torch.cuda.synchronize()
    assert torch.equal(sums, expected_sums)
    assert torch.equal(entries.weight, expected_weight)
    assert torch.equal(values, ops.gather(expected_weight, indices))


def test_a_captured_step_replays_as_often_as_wanted():
    captured, eager = (make_adamw([ORDINARY, LARGE], torch.bfloat16, torch.int32, "cuda", steps=1) for _ in range(2))
    grad_output, input, indices = make_sddmm(LARGE, torch.bfloat16, torch.int32, "cuda")
    drawn = torch.empty_like(indices)

    def step(made, input, drawn) -> None:
        for count in made.steps:
            count += 1
        ops.stratified_indices_(drawn, LARGE.rows, LARGE.cols, 5)
        made.grads[0][1].copy_(ops.sddmm(grad_output, input, indices))
        ops.sparse_adamw_(*adamw_arguments(made, 0))
        ops.patch_(made.weights[0], made.indices[0], made.bases[0], None)
        ops.scatter_add_all_(made.weights, made.indices, made.deltas, [0.25, -0.5])
        ops.patch_all_(made.weights, made.indices, made.bases, made.deltas, made.scales)

    warm = make_adamw([ORDINARY, LARGE], torch.bfloat16, torch.int32, "cuda", steps=1)
    with torch.cuda.stream(torch.cuda.Stream()):
        step(warm, input, drawn)
    torch.cuda.synchronize()
    static_input = torch.zeros_like(input)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, static_input, drawn)
    drawn.zero_()
    for number in range(3):
        fresh = input * (number + 1)
        static_input.copy_(fresh)
        graph.replay()
        step(eager, fresh, torch.empty_like(drawn))
    torch.cuda.synchronize()
    for name in ("weights", "deltas", "exp_avgs", "exp_avg_sqs", "steps"):
        assert all(map(torch.equal, getattr(captured, name), getattr(eager, name))), name
    expected = torch.empty_like(drawn)
    ops.stratified_indices_(expected, LARGE.rows, LARGE.cols, 5)
    assert torch.equal(drawn, expected)


def test_no_operator_waits_for_the_device():
    made = make_adamw([ORDINARY], torch.bfloat16, torch.int32, "cuda", steps=1)
    arguments = adamw_arguments(made, 0)
    grad_output, input, indices = make_sddmm(ORDINARY, torch.bfloat16, torch.int32, "cuda")

    def run() -> None:
        ops.sddmm(grad_output, input, indices)
        ops.sparse_adamw_(*arguments)
        ops.gather(made.weights[0], made.indices[0])
        ops.patch_all_(made.weights, made.indices, made.bases, made.deltas, made.scales)
        ops.scatter_add_all_(made.weights, made.indices, made.deltas, made.scales)

    run()  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    run()
    assert not busy.query()
    torch.cuda.synchronize()


@dtypes
@pytest.mark.parametrize("op", ["patch_all_", "scatter_add_all_"])
def test_writes_to_many_weights_are_those_of_the_cpu_bit_for_bit_in_one_launch(op, dtype):
    written = {}
    for device in ("cpu", "cuda"):
        made = make_adamw([*PROBLEMS, *[ORDINARY] * 200], dtype, torch.int32, device, steps=1)
        entries = (made.bases, made.grads[0]) if op == "patch_all_" else (made.grads[0],)
        weights, memories = zip(*map(guarded, made.weights), strict=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            getattr(ops, op)(list(weights), made.indices, *entries, made.scales)
            torch.cuda.synchronize()
        assert sum("sprand::cuda" in event.name for event in profile.events()) == (device == "cuda")
        assert all(map(guards_hold, memories))
        written[device] = [bits(weight).cpu() for weight in weights]
    assert all(map(torch.equal, written["cpu"], written["cuda"]))


def test_a_step_of_all_targets_is_one_launch():
    made = make_adamw([*PROBLEMS, *[ORDINARY] * 200], torch.bfloat16, torch.int32, "cuda", steps=1)
    ops.sparse_adamw_(*adamw_arguments(made, 0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.sparse_adamw_(*adamw_arguments(made, 0))
        torch.cuda.synchronize()
    assert sum("sprand::cuda" in event.name for event in profile.events()) == 1


def test_the_device_of_the_tensors_is_used_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        first, second = (make_entries(ORDINARY, torch.bfloat16, torch.int32, f"cuda:{index}") for index in range(2))
        for entries in (first, second):
            ops.patch_(entries.weight, entries.indices, entries.base, entries.delta)
        assert torch.cuda.current_device() == 0
    assert torch.equal(first.weight.cpu(), second.weight.cpu())


def test_tensors_on_two_devices_are_refused():
    entries = make_entries(ORDINARY, torch.float32, torch.int32, "cuda")
    on_cpu = make_indices(ORDINARY, torch.int32)
    with pytest.raises(ValueError, match="expected indices on cuda"):
        sprand_ops.gather(entries.weight, on_cpu)
    for call in (
        lambda: ops.gather(entries.weight, on_cpu),
        lambda: ops.patch_(entries.weight, entries.indices, entries.base.cpu(), None),
        lambda: ops.scatter_add_all_([entries.weight.cpu()], [entries.indices], [entries.delta], [1.0]),
    ):
        with pytest.raises(RuntimeError, match="one device"):
            call()


def test_float64_is_refused():
    entries = make_entries(ORDINARY, torch.float64, torch.int32, "cuda")
    with pytest.raises(ValueError, match="float32"):
        sprand_ops.gather(entries.weight, entries.indices)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        ops.gather(entries.weight, entries.indices)
