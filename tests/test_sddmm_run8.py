"""sddmm for runs of 8 columns: the schedule, the tensor core kernel run on the CPU, and the reference, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from emulation import fenced_results
from problems import check_sddmm, guarded, guards_hold
from sprand.kernels import reference
from sprand.kernels.run8_units import RUN, SHAPES, UNIT_TILES
from sprand.kernels.schedule_run8 import run8_indices, run8_schedule

DTYPES = (torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@dataclass(frozen=True)
class Problem:
    """A weight `[rows, cols]`, its runs `[n, 2]` of row and column group, `tokens`, and why it is in the table."""

    reason: str
    tokens: int
    rows: int
    cols: int
    density: float
    where: str = "anywhere"

    def __str__(self) -> str:
        return self.reason.replace(" ", "_")

    def indices(self, seed: int = 0) -> Tensor:
        """`[nnz]`, int32, ascending."""
        groups = self.cols // RUN
        chosen = torch.rand(self.rows, groups, generator=torch.Generator().manual_seed(seed)) < self.density
        if self.where == "one group":
            chosen[:, : groups // 2] = chosen[:, groups // 2 + 1 :] = False
        elif self.where == "few rows":
            chosen[torch.arange(self.rows) % 37 != 5] = False
        elif self.where == "one residue":
            chosen[torch.arange(self.rows) % RUN != 3] = False
        elif self.where == "last run":
            chosen[:] = False
            chosen[-1, -1] = True
        runs = chosen.flatten().nonzero()
        return (runs * RUN + torch.arange(RUN)).flatten().int()


PROBLEMS = (
    Problem("an ordinary layer", 64, 96, 128, 0.05),
    Problem("empty", 16, 24, 32, 0.0),
    Problem("no tokens", 0, 24, 32, 0.3),
    Problem("one token", 1, 40, 64, 0.2),
    Problem("tokens not a multiple of 16", 37, 50, 72, 0.2),
    Problem("odd number of rows", 24, 61, 40, 0.3),
    Problem("one row", 19, 1, 96, 0.5),
    Problem("one column group", 19, 70, 8, 0.5),
    Problem("more tokens than one split", 1111, 24, 32, 0.1),
    Problem("all runs in one column group", 33, 600, 64, 0.9, "one group"),
    Problem("most rows empty", 32, 400, 64, 0.3, "few rows"),
    Problem("rows that share their banks", 20, 300, 32, 0.5, "one residue"),
    Problem("last run", 32, 31, 40, 1.0, "last run"),
    Problem("density 1", 24, 40, 48, 1.0),
    Problem("more tiles than one unit", 18, 520, 160, 0.5),
    Problem("more columns than one unit", 17, 20, 3000, 0.1),
    Problem("more rows than one unit", 17, 2100, 24, 0.05),
)
ORDINARY, SPLIT, MANY_UNITS = PROBLEMS[0], PROBLEMS[8], PROBLEMS[14]
problem_table = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def make(problem: Problem, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    left, right = (torch.randn(problem.tokens, n, generator=generator).to(dtype) for n in (problem.rows, problem.cols))
    return left, right, problem.indices(seed)


def conflict_degree(table: Tensor, launch: list[int]) -> float:
    """How often, on average, a bank of shared memory is asked for one of the 8 rows of half a tile; 1 is the least."""
    _, _, units, tiles, _ = launch
    first = 4 * (units + 1) + 16 * tiles
    banks = table[first : first + 8 * tiles].view(torch.int16).view(-1, 8).long() % 8
    return torch.nn.functional.one_hot(banks, 8).sum(1).amax(1).double().mean().item()


def stratified(rows: int, cols: int, density: float) -> Tensor:
    """One run per equal stratum of every row, each row turned by a number of its own."""
    generator, groups = torch.Generator().manual_seed(0), cols // RUN
    edges = torch.arange(round(density * groups) + 1) * groups // round(density * groups)
    drawn = edges[:-1] + (torch.rand(rows, len(edges) - 1, generator=generator) * edges.diff()).long()
    drawn = (drawn + torch.randint(groups, (rows, 1), generator=generator)) % groups
    runs = (torch.arange(rows)[:, None] * groups + drawn).flatten().sort().values
    return (runs[:, None] * RUN + torch.arange(RUN)).flatten()


@problem_table
@dtypes
def test_the_kernel_is_the_chosen_part_of_the_weight_gradient(problem, dtype, emulated):
    grad_output, input, indices = make(problem, dtype)
    table, launch = run8_schedule(indices, problem.rows, problem.cols)
    check_sddmm(emulated.sddmm_run8(grad_output, input, table, launch, len(indices)), grad_output, input, indices)


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("problem", [SPLIT, MANY_UNITS], ids=str)
def test_every_shape_of_block_is_right(problem, shape, emulated):
    grad_output, input, indices = make(problem, torch.bfloat16)
    table, launch = run8_schedule(indices, problem.rows, problem.cols, shape)
    assert launch[0] == shape
    check_sddmm(emulated.sddmm_run8(grad_output, input, table, launch, len(indices)), grad_output, input, indices)


@dtypes
def test_the_tokens_are_split_and_summed_in_order(dtype, emulated):
    grad_output, input, indices = make(SPLIT, dtype)
    table, launch = run8_schedule(indices, SPLIT.rows, SPLIT.cols)
    few, many = [*launch[:4], 1], [*launch[:4], 10_000]
    whole, parts = (emulated.sddmm_run8(grad_output, input, table, each, len(indices)) for each in (few, many))
    assert not torch.equal(whole, parts)
    check_sddmm(whole, grad_output, input, indices)
    check_sddmm(parts, grad_output, input, indices)


def test_results_do_not_depend_on_the_order_of_threads(simt, emulated):
    for problem in (PROBLEMS[4], PROBLEMS[9]):
        grad_output, input, indices = make(problem, torch.bfloat16)
        arguments = grad_output, input, *run8_schedule(indices, problem.rows, problem.cols), len(indices)
        simt.set_order(0)
        expected = emulated.sddmm_run8(*arguments)
        for order in simt.ORDERS[1:]:
            simt.set_order(order)
            assert torch.equal(emulated.sddmm_run8(*arguments), expected)


@dtypes
def test_nothing_is_read_that_was_not_chosen(dtype, emulated):
    for problem in (ORDINARY, PROBLEMS[4], PROBLEMS[5], PROBLEMS[10]):
        grad_output, input, indices = make(problem, dtype)
        arguments = *run8_schedule(indices, problem.rows, problem.cols), len(indices)
        expected = emulated.sddmm_run8(grad_output, input, *arguments)
        unused_rows = torch.ones(problem.rows, dtype=torch.bool).index_fill(0, indices.long() // problem.cols, False)
        unused_cols = torch.ones(problem.cols, dtype=torch.bool).index_fill(0, indices.long() % problem.cols, False)
        left, right = grad_output.masked_fill(unused_rows, math.nan), input.masked_fill(unused_cols, math.nan)
        assert torch.equal(emulated.sddmm_run8(guarded(left)[0], guarded(right)[0], *arguments), expected)


@dtypes
def test_any_strides_and_alignment(dtype, emulated):
    grad_output, input, indices = make(ORDINARY, dtype)
    arguments = *run8_schedule(indices, ORDINARY.rows, ORDINARY.cols), len(indices)
    expected = emulated.sddmm_run8(grad_output, input, *arguments)
    assert torch.equal(emulated.sddmm_run8(grad_output.T.contiguous().T, input.T.contiguous().T, *arguments), expected)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (grad_output, input)]
    assert all(t.data_ptr() % 4 for t in shifted)
    assert torch.equal(emulated.sddmm_run8(*shifted, *arguments), expected)


def test_a_table_of_another_weight_touches_nothing_outside(emulated):
    big, small = MANY_UNITS, ORDINARY
    table, launch = run8_schedule(big.indices(), big.rows, big.cols)
    grad_output, input, indices = make(small, torch.bfloat16)
    noise = torch.randint(-(2**31), 2**31 - 1, table.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for wrong in (table, noise):
        with fenced_results() as memories:
            emulated.sddmm_run8(grad_output, input, wrong, launch, len(indices))
        assert memories and all(map(guards_hold, memories))


@problem_table
@pytest.mark.parametrize("shape", [None, *range(len(SHAPES))])
def test_the_schedule_holds_every_run_once(problem, shape):
    indices = problem.indices()
    table, launch = run8_schedule(indices, problem.rows, problem.cols, shape)
    assert table.dtype == torch.int32
    assert torch.equal(run8_indices(table, launch, problem.cols, len(indices)), indices.long())
    number, rows, units, tiles, _ = launch
    header = table[: 4 * (units + 1)].view(-1, 4)
    runs = table[header.numel() :][: 16 * tiles]
    assert sorted(runs[runs >= 0].tolist()) == list(range(len(indices) // RUN))
    assert rows <= SHAPES[number][0]
    assert (header[:-1, 2] <= SHAPES[number][1]).all()
    assert (header[:, 3].diff() <= UNIT_TILES).all()
    assert header[-1, 3] == tiles


@problem_table
def test_the_reference_is_the_chosen_part_of_the_weight_gradient(problem):
    grad_output, input, indices = make(problem, torch.float32)
    table, launch = run8_schedule(indices, problem.rows, problem.cols)
    result = torch.ops.sprand.sddmm_run8(grad_output, input, table, launch, len(indices))
    assert torch.equal(result, reference.sddmm(grad_output, input, indices))


@pytest.mark.parametrize(("rows", "cols"), [(4096, 4096), (1024, 4096), (14336, 4096)])
def test_a_stratified_pattern_meets_few_bank_conflicts(rows, cols):
    table, launch = run8_schedule(stratified(rows, cols, 0.01), rows, cols)
    assert 1 <= conflict_degree(table, launch) <= 1.3


def test_the_conflict_degree_counts_rows_of_the_same_banks():
    indices = torch.arange(8) + torch.arange(0, 64, 8)[:, None] * RUN  # rows 0, 8, .., 56 of a weight with one column group
    table, launch = run8_schedule(indices.flatten(), 64, RUN)
    assert conflict_degree(table, launch) == 1  # turned apart
    places = table[4 * 2 + 16 : 4 * 2 + 16 + 8]
    places[:] = 8 << 16  # all 16 at places 0 and 8
    assert conflict_degree(table, launch) == 8


def test_int64_indices_give_the_same_table():
    indices = ORDINARY.indices()
    tables = [run8_schedule(each, ORDINARY.rows, ORDINARY.cols) for each in (indices, indices.long())]
    assert torch.equal(tables[0][0], tables[1][0])
    assert tables[0][1] == tables[1][1]


def test_operator_is_sound():
    grad_output, input, indices = make(ORDINARY, torch.float32)
    arguments = grad_output, input, *run8_schedule(indices, ORDINARY.rows, ORDINARY.cols), len(indices)
    torch.library.opcheck(torch.ops.sprand.sddmm_run8.default, arguments, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize(
    ("indices", "size"),
    [
        (torch.arange(12), (4, 16)),
        (torch.arange(1, 9), (4, 16)),
        (torch.arange(16).flip(0), (4, 16)),
        (torch.arange(8).repeat(2), (4, 16)),
        (torch.arange(8), (4, 12)),
        (torch.arange(64, 72), (4, 16)),
        (torch.arange(8).float(), (4, 16)),
    ],
    ids=["part of a run", "begins at 1", "descending", "twice", "12 columns", "outside", "float"],
)
def test_indices_that_are_no_runs_are_refused(indices, size):
    with pytest.raises(ValueError, match="run8_schedule: expected"):
        run8_schedule(indices, *size)


def test_wrong_arguments_are_refused(emulated):
    grad_output, input, indices = make(ORDINARY, torch.bfloat16)
    table, launch = run8_schedule(indices, ORDINARY.rows, ORDINARY.cols)
    nnz = len(indices)
    calls = {
        "one device|int32": lambda op: op(grad_output, input, table.long(), launch, nnz),
        "bfloat16 or float16": lambda op: op(grad_output.float(), input.float(), table, launch, nnz),
        "5": lambda op: op(grad_output, input, table, launch[1:], nnz),
        "multiple": lambda op: op(grad_output, input, table, launch, nnz - 1),
        "input \\[T, in\\]": lambda op: op(grad_output, input[1:], table, launch, nnz),
        "aligned to 16 bytes": lambda op: op(grad_output, input, torch.cat([table[:1], table])[1:], launch, nnz),
        "CUDA error 1": lambda op: op(grad_output, input, table[4:], launch, nnz),
        "CUDA error": lambda op: op(grad_output, input, table, [9, *launch[1:]], nnz),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call(emulated.sddmm_run8)
