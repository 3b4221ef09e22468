"""The sampled gradient on a GPU by every way: each variant of the row kernel, tensor cores, dense chunks, and the choice."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from problems import check_sddmm
from sprand.kernels import ops, schedule, tuning
from sprand.kernels.schedule import VARIANTS, Rows, make_schedule
from test_sddmm_rows import aligned_to, lopsided, shared_rows, sides, stratified, uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and a CUDA build of torch"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


PATTERNS = {"stratified": stratified, "uniform": uniform, "lopsided": lopsided}


@pytest.mark.parametrize("dtype, variant", [(dtype, v) for dtype in DTYPES for v in VARIANTS[dtype]], ids=str)
def test_every_variant(dtype, variant):
    out, cols, tokens = 2 * variant.block_rows + 36, 256, 1003
    nnz = out * min(2 * variant.slots - 1, cols // 8)
    indices = uniform(out, cols, nnz // 3) if variant.ordered else shared_rows(out, cols, nnz, variant.unit)
    grad_output, input = (side.cuda() for side in sides(tokens, out, cols, dtype))
    rows = Rows.of(indices.cuda(), out, cols)
    made = schedule._ordered(rows, variant, 132) if variant.ordered else aligned_to(variant, indices.cuda(), out, cols)
    result = ops.sddmm(grad_output, input, indices.cuda(), made)
    check_sddmm(result, grad_output, input, indices.cuda())
    assert torch.equal(ops.sddmm(grad_output, input, indices.cuda(), made), result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drawn", PATTERNS)
@pytest.mark.parametrize("out, cols, tokens", [(64, 72, 33), (1000, 2504, 515), (3072, 768, 2048)])
def test_every_way_gives_the_same_sums(out, cols, tokens, drawn, dtype):
    indices = PATTERNS[drawn](out, cols, out * cols // 50).cuda()
    grad_output, input = (side.cuda() for side in sides(tokens, out, cols, dtype))
    made = make_schedule(indices, out, cols, dtype)
    chosen = tuning.schedule_for(indices, out, cols, dtype)
    for way in (None, made):
        check_sddmm(ops.sddmm(grad_output, input, indices, way), grad_output, input, indices)
    for result in (ops.sddmm(grad_output, input, indices, chosen), ops.sddmm_dense(grad_output, input, indices, made)):
        check_sddmm(result, grad_output, input, indices, tensor_cores=True)


def test_costs_are_measured_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SPRAND_CACHE", str(tmp_path))
    tuning._costs.cache_clear()
    found = tuning.costs(torch.device("cuda"), torch.bfloat16)
    assert min(dataclasses.astuple(found)) >= 0 and max(dataclasses.astuple(found)) > 0
    assert len(list(tmp_path.iterdir())) == 1
    tuning._costs.cache_clear()
    assert tuning.costs(torch.device("cuda"), torch.bfloat16) == found
