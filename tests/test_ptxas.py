"""The check of registers and spills in CI: what it reads from ptxas, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest

LOG = """\
[8/30] Building CUDA object CMakeFiles/sprand_kernels.dir/csrc/cuda/gather.cu.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6sprand4cuda21_GLOBAL__N__a9_gather13gather_kernelItlEEvPKT_l' for 'sm_80'
ptxas info    : Function properties for _ZN6sprand4cuda21_GLOBAL__N__a9_gather13gather_kernelItlEEvPKT_l
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 384 bytes cmem[0]
ptxas info    : Compile time = 3.674 ms
ptxas info    : Compiling entry function '_ZN6sprand4cuda11wide_kernelILi512ELi4EEEvPf' for 'sm_90a'
ptxas info    : Function properties for _ZN6sprand4cuda11wide_kernelILi512ELi4EEEvPf
    104 bytes stack frame, 96 bytes spill stores, 92 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 104 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compile time = 310.1 ms
"""


@pytest.fixture
def ptxas(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if shutil.which("c++filt") is None:
        pytest.skip("names of kernels are made readable by c++filt")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / ".ci")
    import ptxas

    return ptxas


def test_kernels_are_read_by_name_and_architecture(ptxas):
    gather, wide = ptxas.read(LOG)
    assert (gather.name, gather.architecture, gather.registers) == ("gather_kernel<unsigned short, long>", "sm_80", 12)
    assert (gather.spill_stores, gather.spill_loads, gather.shared) == (0, 0, 0)
    assert (wide.name, wide.architecture, wide.registers) == ("wide_kernel<512, 4>", "sm_90a", 128)
    assert (wide.stack, wide.spill_stores, wide.spill_loads, wide.shared) == (104, 96, 92, 4096)
    assert "wide_kernel<512, 4>" in ptxas.table([gather, wide])


def test_a_spill_that_nothing_allows_is_a_fault(ptxas):
    assert ptxas.faults(ptxas.read(LOG), {}) == ["wide_kernel<512, 4> on sm_90a spills 96 bytes, allowed 0"]


def test_a_spill_is_allowed_up_to_its_limit_and_with_a_reason(ptxas):
    usages = ptxas.read(LOG)
    assert ptxas.faults(usages, {"wide_kernel<512": ptxas.Limit(spill=96, threads=512, why="3 % faster than without")}) == []
    (less,) = ptxas.faults(usages, {"wide_kernel<512": ptxas.Limit(spill=92, threads=512, why="as above")})
    assert "spills 96 bytes, allowed 92" in less
    (without,) = ptxas.faults(usages, {"wide_kernel<512": ptxas.Limit(spill=96)})
    assert "without a reason" in without


def test_registers_are_held_to_the_launch_bounds(ptxas):
    assert [ptxas.Limit(threads=threads).registers for threads in (0, 256, 384, 512, 1024)] == [255, 255, 168, 128, 64]
    (fault,) = ptxas.faults(ptxas.read(LOG), {"wide_kernel<": ptxas.Limit(spill=96, threads=1024, why="measured")})
    assert fault == "wide_kernel<512, 4> on sm_90a takes 128 registers, allowed 64 (1024 threads)"


def test_an_entry_for_a_kernel_that_is_gone_is_a_fault(ptxas):
    gather = ptxas.read(LOG)[:1]
    (fault,) = ptxas.faults(gather, {"old_kernel<": ptxas.Limit()})
    assert fault.startswith("old_kernel<: no such kernel")


def test_a_log_without_kernels_is_no_success(ptxas, tmp_path, capsys):
    (tmp_path / "build.log").write_text("ninja: no work to do.\n")
    assert ptxas.main([str(tmp_path / "build.log")]) == 2
    assert "got no kernel" in capsys.readouterr().err
    (tmp_path / "build.log").write_text(LOG)
    assert ptxas.main([str(tmp_path / "build.log")]) == 1
    assert "wide_kernel<512, 4> on sm_90a spills 96 bytes" in capsys.readouterr().err
