"""Machines that are not here: what serves their devices, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sprand.kernels import native, ops
from sprand.layers.entries import is_sampled_on_gpu


@pytest.mark.parametrize("key", ["MPS", "XPU"])
@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_plain_pytorch_serves_devices_without_kernels(op, key):
    assert native.kernel_of(op, key.lower()) == "reference"
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"sprand::{op}", key)


@pytest.mark.parametrize("problem", ["not built", None])
def test_a_gpu_without_compiled_kernels_gets_no_plan(problem, monkeypatch):
    """ROCm calls its devices cuda, and does not tell what a plan is made of."""
    monkeypatch.setitem(native.problems, "_C_cuda", problem)
    weight = SimpleNamespace(is_cuda=True, dim=lambda: 2, data=torch.empty(2, 2))
    assert is_sampled_on_gpu(weight) == (problem is None)


def test_windows_is_refused_in_a_sentence():
    code = "import sys; sys.platform = 'win32'; import sprand"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: sprand needs Linux or macOS")
