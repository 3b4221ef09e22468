"""The random positions: exact count, distinct, uniform marginals, stratified, free of bank conflicts, independent by key.

All keys are fixed, so every test is deterministic. Chi-square tests reject at 1e-4 and take one entry of each draw, so
that the counted cells are independent; z tests count every entry and bound the largest of all cells (Bonferroni).
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sprand.kernels import ops
from sprand.selection import old_runs, pattern
from sprand.selection.old_runs import RUNS

SIGNIFICANCE = 1e-4
SHAPES = [(6, 24, 10), (6, 24, 30), (5, 12, 7), (1, 40, 3), (40, 1, 9), (3, 16, 47), (16, 8, 16)]
shapes = pytest.mark.parametrize("rows, cols, nnz", SHAPES, ids=lambda n: str(n))


def stratified(rows: int, cols: int, nnz: int, key: int, run: tuple[int, int] = (1, 1)) -> Tensor:
    indices = torch.full((nnz,), -1, dtype=torch.int64)
    ops.stratified_indices_(indices, rows, cols, key, *run)
    return indices


def whole_runs(indices: Tensor, rows: int, cols: int, run: tuple[int, int]) -> Tensor:
    """The runs `[nnz / run]` as positions in the matrix of runs; each is proven to be there in full."""
    chosen = torch.zeros(rows * cols, dtype=torch.bool).index_fill(0, indices, True)
    blocks = chosen.view(rows // run[0], run[0], cols // run[1], run[1]).transpose(1, 2).flatten(0, 1).flatten(1)
    assert torch.equal(blocks.any(1), blocks.all(1))
    assert blocks.sum() == indices.numel()
    return blocks.any(1).nonzero().flatten()


def uniform(numel: int, nnz: int, key: int) -> Tensor:
    indices = torch.full((nnz,), -1, dtype=torch.int64)
    ops.uniform_indices_(indices, numel, key)
    return indices


def keys(count: int) -> list[int]:
    """Half of them consecutive, the hardest case for a hash, half spread over 64 bits."""
    spread = [(number * 0x9E3779B97F4A7C15) % 2**64 - 2**63 for number in range(count - count // 2)]
    return [*range(count // 2), *spread]


def assert_uniform(cells: Tensor, count: int) -> None:
    """Chi-square test that independent `cells` fall evenly on `count` values."""
    observed = torch.bincount(cells, minlength=count).double()
    expected = cells.numel() / count
    assert observed.numel() == count and expected >= 5
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    freedom = count - 1
    z = NormalDist().inv_cdf(1 - SIGNIFICANCE)
    critical = freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson-Hilferty
    assert statistic < critical, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, critical {critical:.1f}"


def assert_even(draws: Tensor, count: int) -> None:
    """Each of `count` cells is in a draw `[keys, nnz]` with probability `nnz / count`: the largest z of all cells."""
    number, nnz = draws.shape
    p = nnz / count
    z = (torch.bincount(draws.flatten(), minlength=count) - number * p).abs() / max(math.sqrt(number * p * (1 - p)), 1e-9)
    assert z.max() < NormalDist().inv_cdf(1 - SIGNIFICANCE / (2 * count))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_stratified_draws_the_exact_count_sorted_and_distinct(data):
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.one_of(st.integers(1, 70), st.sampled_from([64, 128, 256])))
    nnz = data.draw(st.one_of(st.integers(0, rows * cols), st.sampled_from([0, 1, rows, rows * cols])))
    nnz = min(nnz, rows * cols)
    indices = stratified(rows, cols, nnz, data.draw(st.integers(-(2**63), 2**63 - 1)))
    assert (indices.diff() > 0).all()
    assert nnz == 0 or (indices[0] >= 0 and indices[-1] < rows * cols)
    per_row = torch.bincount(indices // cols, minlength=rows)
    assert per_row.max() - per_row.min() <= 1


@settings(derandomize=True, deadline=None, max_examples=100)
@given(numel=st.integers(1, 3000), share=st.floats(0, 1), key=st.integers(-(2**63), 2**63 - 1))
def test_uniform_draws_distinct_positions_in_range(numel, share, key):
    indices = uniform(numel, round(share * numel), key)
    assert indices.unique().numel() == indices.numel()
    assert ((indices >= 0) & (indices < numel)).all()


@pytest.mark.parametrize("rows, cols", [(1, 1), (1, 8), (9, 7), (4, 64)])
def test_density_one_is_every_position(rows, cols):
    everything = torch.arange(rows * cols)
    assert torch.equal(stratified(rows, cols, rows * cols, 5), everything)
    assert torch.equal(uniform(rows * cols, rows * cols, 5).sort().values, everything)


@shapes
def test_stratified_marginals_are_uniform(rows, cols, nnz):
    draws = torch.stack([stratified(rows, cols, nnz, key) for key in keys(3000)])
    assert_even(draws, rows * cols)
    picked = torch.randint(nnz, (len(draws), 1), generator=torch.Generator().manual_seed(0))
    one = draws.gather(1, picked).squeeze(1)
    assert_uniform(one, rows * cols)
    for cells, count in ((one // cols, rows), (one % cols, cols), (one % cols // 8, -(-cols // 8)), (one % cols % 8, 8)):
        if count > 1 and (cols % 8 == 0 or count in (rows, cols)):
            assert_uniform(cells, count)


@pytest.mark.parametrize("rows, cols, nnz", [(7, 64, 30), (5, 65, 77), (3, 1024, 100), (4, 30, 90)])
def test_stratified_has_one_entry_in_each_stratum_of_a_turned_row(rows, cols, nnz):
    for key in keys(10):
        indices = stratified(rows, cols, nnz, key)
        for row in range(rows):
            columns = indices[indices // cols == row] % cols
            dense = -(-nnz // rows) * 8 > cols or cols % 8
            granules, size = (columns, cols) if dense else (columns // 8, cols // 8)
            edges = torch.arange(1, len(columns)) * size // len(columns)
            unturned = (granules - torch.arange(size)[:, None]) % size
            strata = torch.bucketize(unturned, edges, right=True).sort(1).values
            assert (strata == torch.arange(len(columns))).all(1).any()


@pytest.mark.parametrize("rows, cols, nnz", [(64, 512, 640), (32, 4096, 1311), (48, 64, 100)])
def test_eight_rows_of_a_quarter_warp_meet_eight_banks(rows, cols, nnz):
    for key in keys(6):
        indices = stratified(rows, cols, nnz, key)
        by_row = [indices[indices // cols == row] % 8 for row in range(rows)]
        for first in (16 * group + odd for group in range(rows // 16) for odd in (0, 1)):
            lanes = by_row[first : first + 16 : 2]
            for rank in range(min(map(len, lanes))):
                assert {int(lane[rank]) for lane in lanes} == set(range(8))


@pytest.mark.parametrize("numel", [5, 16, 17, 40, 64, 100])
def test_uniform_marginals_and_pairs_are_uniform(numel):
    draws = torch.stack([uniform(numel, 3, key) for key in keys(6000)])
    assert_even(draws, numel)
    for entry in range(3):
        assert_uniform(draws[:, entry], numel)
    for left, right in ((0, 1), (1, 2), (0, 2)):
        distance = (draws[:, right] - draws[:, left]) % numel - 1
        assert_uniform(distance, numel - 1)


def test_uniform_pairs_are_uniform_jointly():
    draws = torch.stack([uniform(16, 2, key) for key in keys(8000)])
    first, second = draws[:, 0], draws[:, 1]
    assert_uniform(first * 15 + second - (second > first).long(), 16 * 15)


def test_one_large_uniform_draw_has_no_structure():
    numel = 1_000_003
    drawn = uniform(numel, 20_000, 12345)
    bins = drawn * 16 // numel
    assert_uniform(drawn * 256 // numel, 256)
    assert_uniform(drawn % 64, 64)
    assert_uniform(bins[:-1:2] * 16 + bins[1::2], 256)


@pytest.mark.parametrize(
    "draw", [lambda key: stratified(256, 256, 655, key), lambda key: uniform(2**16, 655, key)], ids=["stratified", "uniform"]
)
def test_draws_of_different_keys_are_independent(draw):
    chosen = torch.zeros(60, 2**16)
    for row, key in zip(chosen, keys(60), strict=True):
        row[draw(key)] = 1
    overlaps = (chosen @ chosen.T)[tuple(torch.triu_indices(60, 60, 1))]
    expected = 655**2 / 2**16
    sigma = overlaps.std() / math.sqrt(overlaps.numel())
    assert (overlaps.mean() - expected).abs() < 5 * sigma


def test_rows_of_a_draw_are_independent():
    chosen = torch.zeros(2**16)
    chosen[stratified(256, 256, 256 * 32, 77)] = 1
    chosen = chosen.view(256, 256)
    pairs = torch.triu_indices(256, 256, 1)
    apart = pairs[:, pairs[0] // 16 != pairs[1] // 16]  # rows of one group of 16 share their residues on purpose
    overlaps = (chosen @ chosen.T)[tuple(apart)]
    sigma = overlaps.std() / math.sqrt(overlaps.numel())
    assert (overlaps.mean() - 32 * 32 / 256).abs() < 5 * sigma


def test_every_bit_of_the_key_matters():
    draws = {tuple(stratified(8, 64, 8, 1 << bit).tolist()) for bit in range(63)}
    draws |= {tuple(uniform(512, 8, 1 << bit).tolist()) for bit in range(63)}
    assert len(draws) == 126


@pytest.mark.parametrize("strategy", ["random", "uniform"])
def test_draws_of_different_names_are_independent_and_sorted(strategy):
    chosen = torch.zeros(60, 2**16)
    for layer, row in enumerate(chosen):
        indices = pattern.draw(strategy, f"layers.{layer}.q_proj.weight", (256, 256), 655, seed=0)
        assert (indices.diff() > 0).all()
        row[indices.long()] = 1
    overlaps = (chosen @ chosen.T)[tuple(torch.triu_indices(60, 60, 1))]
    sigma = overlaps.std() / math.sqrt(overlaps.numel())
    assert (overlaps.mean() - 655**2 / 2**16).abs() < 5 * sigma


def test_the_place_inside_a_stratum_is_drawn():
    granules = torch.stack([stratified(1, 64, 2, key) // 8 for key in keys(2000)])
    distance = granules[:, 1] - granules[:, 0]
    observed = torch.bincount(torch.minimum(distance, 8 - distance), minlength=5) / len(distance)  # around the row
    expected = torch.tensor([0, 2, 4, 6, 4]) / 16  # two strata of four granules
    assert ((observed - expected).abs() < 5 * (expected * (1 - expected) / len(distance)).sqrt() + 1e-9).all()


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_stratified_runs_are_whole_sorted_and_distinct(data):
    run = data.draw(st.sampled_from([*RUNS.values(), (3, 5)]))
    rows, cols = run[0] * data.draw(st.integers(1, 20)), run[1] * data.draw(st.sampled_from([1, 3, 7, 8, 16, 64]))
    size = run[0] * run[1]
    nnz = size * data.draw(st.integers(0, rows * cols // size))
    indices = stratified(rows, cols, nnz, data.draw(st.integers(-(2**63), 2**63 - 1)), run)
    assert (indices.diff() > 0).all()
    per_row = torch.bincount(whole_runs(indices, rows, cols, run) // (cols // run[1]), minlength=rows // run[0])
    assert per_row.max() - per_row.min() <= 1


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("strategy", ["random", "uniform"])
def test_marginals_of_runs_are_uniform(strategy, run):
    rows, cols, runs = 8 * run[0], 24 * run[1], 30
    layout = next(name for name in RUNS if RUNS[name] == run)
    size = run[0] * run[1]
    draws = [old_runs.draw_runs(strategy, "w", (rows, cols), runs * size, seed, layout).long() for seed in range(3000)]
    draws = torch.stack([whole_runs(indices, rows, cols, run) for indices in draws])
    assert_even(draws, 8 * 24)
    one = draws.gather(1, torch.randint(runs, (len(draws), 1), generator=torch.Generator().manual_seed(0))).squeeze(1)
    for cells, count in ((one, 8 * 24), (one // 24, 8), (one % 24, 24)):
        assert_uniform(cells, count)


@pytest.mark.parametrize("run_rows", [2, 4])
@pytest.mark.parametrize("runs, cols", [(640, 512), (1311, 4096), (100, 64)])
def test_eight_runs_of_a_quarter_warp_meet_eight_banks(run_rows, runs, cols):
    rows = 32 * run_rows
    for key in keys(6):
        at = whole_runs(stratified(rows, cols, runs * run_rows, key, (run_rows, 1)), rows, cols, (run_rows, 1))
        by_row = [at[at // cols == row] % 8 for row in range(32)]
        for first in range(0, 32, 8):
            lanes = by_row[first : first + 8]
            for rank in range(min(map(len, lanes))):
                assert {int(lane[rank]) for lane in lanes} == set(range(8))


@pytest.mark.parametrize("layout", RUNS)
@pytest.mark.parametrize("strategy", ["random", "uniform"])
def test_run_layouts_draw_sorted_positions_and_other_names_others(strategy, layout):
    one, two = (old_runs.draw_runs(strategy, name, (64, 96), 640, 0, layout) for name in ("a", "b"))
    assert one.dtype == torch.int32
    assert (one.diff() > 0).all()
    whole_runs(one.long(), 64, 96, RUNS[layout])
    assert torch.isin(one, two).sum() < 320


@pytest.mark.parametrize("layout, shape", [("run2", (15, 8)), ("run4", (30, 8)), ("run8", (16, 12)), ("run2", (120,))])
@pytest.mark.parametrize("strategy", ["random", "uniform"])
def test_weights_that_hold_no_whole_runs_are_drawn_unstructured(strategy, layout, shape):
    drawn = old_runs.draw_runs(strategy, "w", shape, 13, 3, layout)
    assert torch.equal(drawn, pattern.draw(strategy, "w", shape, 13, 3))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data())
def test_shares_of_columns_are_whole_and_miss_the_total_by_less_than_a_column(data):
    runs = data.draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=8))
    sizes = [run * data.draw(st.integers(0, 60)) for run in runs]
    total = data.draw(st.integers(0, sum(sizes)))
    counts = pattern.shares(sizes, total, runs)
    for count, run, size in zip(counts, runs, sizes, strict=True):
        assert count % run == 0
        assert 0 <= count <= size
        assert abs(count - total * size / max(sum(sizes), 1)) < run
    assert total - max(runs) < sum(counts) <= total


@pytest.mark.parametrize("numel", [8, 13, 49, 400])
def test_a_vector_longer_than_a_row_is_drawn_exactly(numel, monkeypatch):
    monkeypatch.setattr(pattern, "LONGEST_ROW", 7)
    for nnz in {0, 1, numel // 3, numel // 7 * 7, numel - 1, numel}:
        indices = pattern.draw("random", "w", (numel,), nnz, 0)
        assert indices.shape == (nnz,)
        pattern.check_indices("w", indices, numel)
        assert pattern.draw("random", "w", (numel,), nnz, 0, device="meta").shape == (nnz,)
    with pytest.raises(ValueError, match=f"expected at most {numel} entries, got {numel + 1}"):
        pattern.draw("random", "w", (numel,), numel + 1, 0)


@pytest.mark.parametrize("numel, nnz", [(61, 10), (64, 31), (61, 60)])
def test_every_position_of_a_vector_longer_than_a_row_is_drawn_as_often(numel, nnz, monkeypatch):
    monkeypatch.setattr(pattern, "LONGEST_ROW", 16)
    draws = torch.stack([pattern.draw("random", "w", (numel,), nnz, seed).long() for seed in range(4000)])
    assert_even(draws, numel)
    assert_uniform(draws.gather(1, torch.randint(nnz, (len(draws), 1))).squeeze(1), numel)


@pytest.mark.parametrize("layout", ["unstructured", *RUNS])
@pytest.mark.parametrize("shape", [(2**32,), (2**33 + 5,), (8, 2**33), (2**33, 8), (3, 5, 2**32)], ids=str)
def test_weights_beyond_32_bits_are_drawn_evenly(shape, layout):
    numel, nnz = math.prod(shape), 4096
    drawn_in_runs = layout in RUNS
    draw = functools.partial(old_runs.draw_runs, layout=layout) if drawn_in_runs else pattern.draw
    indices = draw("random", "w", shape, nnz, 0)
    assert indices.dtype == torch.int64 and indices.shape == (nnz,)
    pattern.check_indices("w", indices, numel)
    cols = numel // shape[0] if len(shape) > 1 else numel
    fits = drawn_in_runs and len(shape) > 1 and shape[0] % RUNS[layout][0] == 0 and cols % RUNS[layout][1] == 0
    run_rows, run_cols = RUNS[layout] if fits else (1, 1)
    row, column = indices // cols, indices % cols
    _, members = torch.stack([row // run_rows, column // run_cols]).unique(dim=1, return_counts=True)
    assert (members == run_rows * run_cols).all()
    per_part = torch.bincount(indices * 16 // numel, minlength=16)
    assert (per_part - nnz / 16).abs().max() <= 4 * run_rows * run_cols


def test_free_positions_beyond_32_bits_are_drawn():
    shape, nnz = (2**17, 2**16), 5000
    avoided = pattern.draw("random", "other", shape, nnz, 0)
    indices = pattern.draw_free("random", "w", shape, nnz, 0, avoided)
    pattern.check_indices("w", indices, 2**33)
    assert indices.shape == (nnz,) and not torch.isin(indices, avoided).any()
    per_part = torch.bincount(indices * 8 // 2**33, minlength=8)
    assert (per_part - nnz / 8).abs().max() <= 32
