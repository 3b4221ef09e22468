"""Every instruction set of the CPU kernels this machine has, not only its best: each run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sprand import native

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")

CHECK = """
import itertools, sys
sys.path[:0] = sys.argv[1:3]
import torch
from problems import DTYPES, INDEX_DTYPES, PROBLEMS, assert_within, make_sddmm, oracle_sddmm_dense, tolerance
from sprand import native
from sprand.kernels import ops

for problem, dtype, index_dtype in itertools.product(PROBLEMS, DTYPES, INDEX_DTYPES):
    grad_output, input, indices = make_sddmm(problem, dtype, index_dtype, "cpu")
    oracle = oracle_sddmm_dense(grad_output, input)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.sddmm(grad_output, input, indices))
    assert all(torch.equal(result, results[0]) for result in results), (problem, dtype)
    limit = tolerance(grad_output.float().T @ input.float(), oracle, results[0].dtype)
    assert_within(results[0], oracle.flatten()[indices.long()], limit)
print(native.instruction_set())
"""


@pytest.mark.parametrize("level", LEVELS)
def test_sddmm_on_the_problem_table(level):
    if not native.has_extension():
        pytest.skip("the compiled CPU kernels are not built")
    if LEVELS.index(level) > LEVELS.index(native.instruction_set()):
        pytest.skip(f"this CPU has no {level}, only {native.instruction_set()}")
    here = Path(__file__).parent
    environment = os.environ | {"SPRAND_INSTRUCTION_SET": level}
    command = [sys.executable, "-c", CHECK, str(here), str(here.parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == level
