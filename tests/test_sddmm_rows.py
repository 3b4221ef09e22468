"""The row kernels of sddmm and their schedules, run on the CPU by the emulation: every variant, every kind of pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emulation import fenced_results
from order_oracle import order_rows_slowly
from problems import PROBLEMS, check_sddmm, guarded, guards_hold, make_sddmm
from sprand.kernels import host, ops, schedule
from sprand.kernels.schedule import VARIANTS, Limits, Rows, Schedule, Variant, make_schedule
from sprand.selection import pattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
needs_host = pytest.mark.skipif(not host.has_extension(), reason="sprand._host is not built")


def sides(tokens: int, out: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(tokens, size, generator=generator).to(dtype) for size in (out, cols))


def stratified(out: int, cols: int, nnz: int) -> Tensor:
    return pattern.draw("random", "weight", (out, cols), nnz, seed=3)


def uniform(out: int, cols: int, nnz: int) -> Tensor:
    return pattern.draw("uniform", "weight", (out, cols), nnz, seed=3)


def shared_rows(out: int, cols: int, nnz: int, unit: int) -> Tensor:
    """Groups of `unit` rows with the same columns."""
    units = stratified(out // unit, cols, nnz // unit).long()
    row, column = units // cols * unit, units % cols
    return torch.cat([(row + k) * cols + column for k in range(unit)]).sort().values.int()


def lopsided(out: int, cols: int, nnz: int) -> Tensor:
    """One full row, one full column, and nothing else."""
    mask = torch.zeros(out, cols, dtype=torch.bool)
    mask[out // 2] = True
    mask[:, cols // 3] = True
    return mask.flatten().nonzero().flatten().int()


def aligned_to(variant: Variant, indices: Tensor, out: int, cols: int) -> Schedule:
    return schedule._aligned(Rows.of(indices, out, cols), variant, conflicts=1.0, multiprocessors=3)


def check(emulated, grad_output: Tensor, input: Tensor, indices: Tensor, made: Schedule) -> None:
    check_sddmm(emulated.sddmm(grad_output, input, indices, made.table, made.launch), grad_output, input, indices)


@pytest.mark.parametrize("dtype, variant", [(dtype, v) for dtype in DTYPES for v in VARIANTS[dtype]], ids=str)
def test_every_variant_has_a_kernel_that_is_right(dtype, variant, emulated):
    out, cols, tokens = variant.block_rows + 36, 256, 43
    nnz = out * min(2 * variant.slots - 1, cols // 8)  # two windows, the last one not full
    indices = uniform(out, cols, nnz // 3) if variant.ordered else shared_rows(out, cols, nnz, variant.unit)
    grad_output, input = sides(tokens, out, cols, dtype)
    rows = Rows.of(indices, out, cols)
    made = schedule._ordered(rows, variant, 3) if variant.ordered else aligned_to(variant, indices, out, cols)
    check(emulated, grad_output, input, indices, made)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@dtypes
def test_the_problem_table(problem, dtype, emulated):
    """With a schedule where there is one; none is made for odd widths and empty patterns, which other kernels serve."""
    grad_output, input, indices = make_sddmm(problem, dtype, torch.int32)
    made = make_schedule(indices, problem.rows, problem.cols, dtype, Limits(processors=4))
    assert (made is None) == (problem.nnz == 0 or problem.cols % 2 == 1)
    if made is not None:
        check(emulated, grad_output, input, indices, made)


@dtypes
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 16, 24, 129, 300])
def test_any_number_of_tokens(tokens, dtype, emulated):
    out, cols = 64, 72
    indices = stratified(out, cols, 300)
    made = make_schedule(indices, out, cols, dtype, Limits(processors=4))
    check(emulated, *sides(tokens, out, cols, dtype), indices, made)


@dtypes
@pytest.mark.parametrize("make", [stratified, uniform, lopsided])
@pytest.mark.parametrize("out, cols", [(1, 64), (2, 2), (34, 10), (600, 30), (7, 130), (66, 2500)])
def test_any_pattern_and_shape(make, out, cols, dtype, emulated):
    indices = make(out, cols, max(1, out * cols // 20))
    made = make_schedule(indices, out, cols, dtype)
    assert made is not None
    for type in (torch.int32, torch.int64):
        check(emulated, *sides(21, out, cols, dtype), indices.to(type), made)


@dtypes
def test_thread_order_and_schedule_do_not_change_a_bit(dtype, emulated, simt):
    """Each entry is one chain of sums over the tokens of a split, whoever computes it."""
    out, cols = 96, 128
    indices, (grad_output, input) = uniform(out, cols, 700), sides(64, out, cols, dtype)
    rows = Rows.of(indices, out, cols)
    results = []
    for variant in VARIANTS[dtype]:
        if variant.unit > 1 or (not variant.ordered and schedule._aligned(rows, variant, 1.0, 1) is None):
            continue
        made = schedule._ordered(rows, variant, 1) if variant.ordered else aligned_to(variant, indices, out, cols)
        for order in simt.ORDERS:
            simt.set_order(order)
            results.append(emulated.sddmm(grad_output, input, indices, made.table, [*made.launch[:-1], 1]))
    assert len(results) > len(simt.ORDERS)
    assert all(torch.equal(result, results[0]) for result in results)


@dtypes
def test_reads_nothing_outside_its_inputs(dtype, emulated):
    for out, cols, tokens in ((50, 36, 40), (600, 2600, 9)):
        grad_output, input = sides(tokens, out, cols, dtype)
        for indices in (stratified(out, cols, 500), uniform(out, cols, 500)):
            made = make_schedule(indices, out, cols, dtype)
            expected = emulated.sddmm(grad_output, input, indices, made.table, made.launch)
            fenced = guarded(grad_output)[0], guarded(input)[0]
            assert torch.equal(emulated.sddmm(*fenced, indices, made.table, made.launch), expected)


@dtypes
@pytest.mark.parametrize("ordered", [False, True])
def test_a_table_and_indices_of_nonsense_touch_nothing_outside(dtype, ordered, emulated):
    out, cols, generator = 300, 72, torch.Generator().manual_seed(5)
    indices, (grad_output, input) = stratified(out, cols, 900), sides(24, out, cols, dtype)
    rows = Rows.of(indices, out, cols)
    variant = next(v for v in VARIANTS[dtype] if v.ordered == ordered and v.unit == 1 and v.slots >= rows.most)
    made = schedule._ordered(rows, variant, 1) if ordered else aligned_to(variant, indices, out, cols)
    for low, high in ((-(2**31), 2**31), (-5, 905), (890, 910), (2**31 - 9, 2**31)):
        table = torch.randint(low, high, made.table.shape, generator=generator).int()
        wrong = torch.randint(low, high, indices.shape, generator=generator)
        for nonsense in (wrong.int(), wrong.long() << 20):
            with fenced_results() as memories:
                emulated.sddmm(grad_output, input, nonsense, table, made.launch)
            assert memories and all(map(guards_hold, memories))


def test_odd_shapes_and_views_go_through_the_kernel_for_any_shape(emulated):
    indices = stratified(33, 64, 200)
    made = make_schedule(indices, 33, 64, torch.bfloat16)
    assert made.variant.ordered
    check(emulated, *sides(16, 33, 64, torch.bfloat16), indices, made)

    indices = stratified(32, 64, 200)
    made = make_schedule(indices, 32, 64, torch.bfloat16)
    grad_output, input = sides(16, 32, 64, torch.bfloat16)
    shifted = torch.zeros(16 * 64 + 1, dtype=torch.bfloat16)[1:].view(16, 64).copy_(input)  # not aligned to 8 bytes
    check(emulated, grad_output, shifted, indices, made)


def test_schedule_of_another_weight_is_refused(emulated):
    grad_output, input = sides(16, 64, 72, torch.bfloat16)
    indices = stratified(64, 72, 300)
    made = make_schedule(indices, 64, 72, torch.bfloat16)
    other = make_schedule(stratified(128, 72, 300), 128, 72, torch.bfloat16)
    with pytest.raises(RuntimeError, match="expected a schedule table of 66 int32 for this weight, got one of 130"):
        emulated.sddmm(grad_output, input, indices, other.table, other.launch)
    with pytest.raises(RuntimeError, match="expected a schedule of 11 numbers, got 0"):
        emulated.sddmm(grad_output, input, indices, made.table, [])
    with pytest.raises(RuntimeError, match="no kernel for this schedule"):
        emulated.sddmm(grad_output, input, indices, made.table, [*made.launch[:2], 3, *made.launch[3:]])


@pytest.mark.parametrize(
    "out, cols, density", [(4096, 4096, 0.01), (1024, 4096, 0.005), (4096, 14336, 0.01), (4096, 4096, 0.001)]
)
def test_random_patterns_are_aligned_without_bank_conflicts_or_much_padding(out, cols, density):
    indices = stratified(out, cols, round(out * cols * density))
    made = make_schedule(indices, out, cols, torch.bfloat16)
    rows = Rows.of(indices, out, cols)
    assert not made.variant.ordered
    assert rows.conflicts(1) == 1.0
    slots = made.windows * made.variant.slots * made.tiles * made.variant.block_rows
    assert slots < 1.35 * indices.numel() or rows.most <= 5


@needs_host
def test_ordering_lowers_the_bank_conflicts_of_a_uniform_mask():
    out, cols = 2048, 2048
    indices = uniform(out, cols, round(out * cols * 0.01))
    rows = Rows.of(indices, out, cols)
    _, _, ordered = host.order_rows(indices, out, cols, 256, 8, 8, 2048)
    assert rows.conflicts(1) > 2 > 1.6 > ordered
    assert make_schedule(indices, out, cols, torch.bfloat16).variant.ordered


@pytest.mark.parametrize("unit", [2, 4])
def test_rows_that_share_columns_are_found(unit):
    out, cols = 512, 512
    indices = shared_rows(out, cols, 4096, unit)
    assert Rows.of(indices, out, cols).shared == unit
    assert make_schedule(indices, out, cols, torch.bfloat16).variant.unit == unit
    assert Rows.of(stratified(out, cols, 4096), out, cols).shared == 1


@needs_host
@pytest.mark.parametrize("make", [stratified, uniform, lopsided])
def test_ordering_deals_every_entry_to_one_lane_of_its_row(make):
    out, cols, slots, threads, rows_per_lane, columns = 300, 700, 8, 64, 2, 128
    indices = make(out, cols, 4000)
    table, tiles, _ = host.order_rows(indices, out, cols, threads, rows_per_lane, slots, columns)
    begin, rest = table[:tiles], table[tiles:]
    rows = rest[: tiles * rows_per_lane * threads].view(tiles, rows_per_lane, 1, threads)
    entries = rest[rows.numel() :].view(tiles, rows_per_lane, slots, threads)
    taken = entries >= 0
    assert torch.equal(entries[taken].sort().values, torch.arange(indices.numel(), dtype=torch.int32))
    position = indices.long()[entries[taken].long()]
    assert torch.equal(position // cols, rows.expand_as(entries)[taken].long())
    local = position % cols - begin.view(-1, 1, 1, 1).expand_as(entries)[taken]
    assert local.min() >= 0 and local.max() < columns


@needs_host
@pytest.mark.parametrize("make", [stratified, uniform, lopsided])
def test_ordering_is_that_of_the_oracle(make):
    sizes = 90, 260, 32, 2, 4, 128
    indices = make(90, 260, 1500)
    table, tiles, conflicts = host.order_rows(indices, *sizes)
    expected, expected_tiles, expected_conflicts = order_rows_slowly(indices, *sizes)
    assert torch.equal(table, expected)
    assert (tiles, conflicts) == (expected_tiles, expected_conflicts)


def test_without_the_host_module_nothing_is_ordered(monkeypatch):
    """A mask that an aligned schedule cannot serve goes to the kernel for any pattern."""
    monkeypatch.setattr(host, "_host", None)
    assert make_schedule(lopsided(34, 64, 0), 34, 64, torch.bfloat16) is None
    assert not make_schedule(uniform(512, 512, 5000), 512, 512, torch.bfloat16).variant.ordered


@dtypes
def test_dense_chunks_give_the_same_sums(dtype, monkeypatch):
    monkeypatch.setattr(schedule, "CHUNK_ROWS", 2)
    monkeypatch.setattr(schedule, "CHUNK_BYTES", 4 * 72 * 11)  # ten rows
    indices = stratified(64, 72, 300)
    made = make_schedule(indices, 64, 72, dtype)
    assert len(made.chunks) == 7
    grad_output, input = sides(33, 64, 72, dtype)
    check_sddmm(ops.sddmm_dense(grad_output, input, indices, made), grad_output, input, indices)


@pytest.mark.parametrize("out, cols", [(4096, 14336), (14336, 4096), (300, 8), (130, 1 << 17), (1, 2)])
def test_chunks_start_where_cublas_reads_fast_and_stay_in_the_cache(out, cols):
    """A column slice of grad_output that starts at a multiple of 128 is aligned as the whole is; 585 rows a chunk were not."""
    rows = torch.arange(out, dtype=torch.int64)
    chunks = Rows.of(rows * cols, out, cols).chunks
    assert [first for first, *_ in chunks] == [0, *(last for _, last, *_ in chunks[:-1])]
    assert chunks[-1][1] == out
    assert all(first % 128 == 0 for first, *_ in chunks)
    assert all(4 * cols * (last - first) <= 32 << 20 or last - first <= 128 for first, last, *_ in chunks)
    assert len(chunks) <= 1 + out * cols * 4 // (16 << 20) or cols > 1 << 16  # and no smaller than half of what fits
    assert all(end - begin == last - first for first, last, begin, end in chunks)
