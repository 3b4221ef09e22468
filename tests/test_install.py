"""What setup.py decides to build on which machine, what it says when it cannot, and what lands in the archives."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

setuptools = pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def machine(monkeypatch):
    """A machine to plan for: compiler, no CUDA toolkit, no GPU, pybind11; returns the plan as {module: Extension} and options."""
    monkeypatch.chdir(ROOT)
    for name in ("SPRAND_CPU", "SPRAND_CUDA", "SPRAND_HOST", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", "")  # setup.py sets it: let it be undone
    programs = {"c++": "/usr/bin/c++"}
    exists = os.path.exists
    monkeypatch.setattr(shutil, "which", programs.get)
    monkeypatch.setattr(
        os.path, "exists", lambda path: str(path).endswith("Python.h") or ("nvcc" not in str(path) and exists(path))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "pybind11" or find_spec(name, *rest))
    pybind11 = type(sys)("pybind11")
    pybind11.get_include = lambda: "/include/pybind11"
    monkeypatch.setitem(sys.modules, "pybind11", pybind11)

    class Machine:
        def plan(self) -> tuple[dict[str, setuptools.Extension], dict]:
            calls = []
            monkeypatch.setattr(setuptools, "setup", lambda **keywords: calls.append(keywords))
            runpy.run_path(str(ROOT / "setup.py"))
            modules = {extension.name: extension for extension in calls[0].get("ext_modules", [])}
            return modules, calls[0].get("options", {})

        def remove_compiler(self) -> None:
            programs.clear()

        def add_toolkit(self, home: Path, gpu: tuple[int, int] | None = None) -> None:
            for name in ("bin/nvcc", "include/cuda_runtime_api.h", "lib64/libcudart_static.a"):
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                (home / name).touch()
            monkeypatch.setattr(os.path, "exists", exists)
            monkeypatch.setenv("CUDA_HOME", str(home))
            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)

        def remove_pybind11(self) -> None:
            monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)

    return Machine()


def targets(extension: setuptools.Extension) -> list[str]:
    return [flag.removeprefix("-gencode=") for flag in extension.extra_compile_args["nvcc"] if flag.startswith("-gencode")]


def test_a_compiler_gives_the_cpu_and_host_modules(machine):
    modules, options = machine.plan()
    assert list(modules) == ["sprand._C", "sprand._host"]
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in modules["sprand._C"].extra_compile_args["cxx"]
    assert "-ffp-contract=off" in modules["sprand._C"].extra_compile_args["cxx"]
    assert modules["sprand._C"].py_limited_api
    assert not any("torch" in path for path in modules["sprand._host"].include_dirs)
    assert options == {}, "a module of pybind11 is for one Python version: no abi3 tag on the wheel"


@pytest.mark.parametrize("how", ["SPRAND_HOST=0", "no pybind11"])
def test_without_the_host_module_one_wheel_serves_every_python(machine, monkeypatch, how):
    if how == "no pybind11":
        machine.remove_pybind11()
    else:
        monkeypatch.setenv("SPRAND_HOST", "0")
    modules, options = machine.plan()
    assert list(modules) == ["sprand._C"]
    assert options == {"bdist_wheel": {"py_limited_api": "cp311"}}


@pytest.mark.parametrize("how", ["SPRAND_CPU=0", "no compiler"])
def test_no_compiler_is_one_line_and_no_failure(machine, monkeypatch, capsys, how):
    if how == "no compiler":
        machine.remove_compiler()
    else:
        monkeypatch.setenv("SPRAND_CPU", "0")
        monkeypatch.setitem(sys.modules, "torch", None)  # plain Python needs no torch to build
    assert machine.plan() == ({}, {})
    said = capsys.readouterr().out.strip()
    assert len(said.splitlines()) == 1
    assert "pip install --no-build-isolation" in said


def test_no_torch_is_a_sentence(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="Install torch >= 2.10, then: pip install --no-build-isolation"):
        machine.plan()


def test_a_toolkit_is_enough_for_the_cuda_module(machine, tmp_path):
    if not list(ROOT.glob("csrc/cuda/*.cu")):
        pytest.skip("no CUDA sources")
    machine.add_toolkit(tmp_path / "cuda")
    cuda = machine.plan()[0]["sprand._C_cuda"]
    assert targets(cuda) == ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]
    assert "cudart_static" in cuda.libraries
    assert not any("torch_cuda" in library or "c10_cuda" in library for library in cuda.libraries)


def test_a_visible_gpu_is_the_only_target(machine, tmp_path):
    machine.add_toolkit(tmp_path / "cuda", gpu=(9, 0))
    assert targets(machine.plan()[0]["sprand._C_cuda"]) == ["arch=compute_90a,code=sm_90a"]


def test_torch_cuda_arch_list_is_left_to_torch(machine, tmp_path, monkeypatch):
    machine.add_toolkit(tmp_path / "cuda", gpu=(9, 0))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    flags = machine.plan()[0]["sprand._C_cuda"].extra_compile_args["nvcc"]
    assert [flag.removeprefix("-gencode=") for flag in cpp_extension._get_cuda_arch_flags(flags)] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=compute_90",
        "arch=compute_90,code=sm_90",
    ]


def test_sprand_cuda_0_leaves_cuda_out(machine, tmp_path, monkeypatch):
    machine.add_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("SPRAND_CUDA", "0")
    assert "sprand._C_cuda" not in machine.plan()[0]


def test_a_torch_for_rocm_leaves_cuda_out(machine, tmp_path, monkeypatch):
    machine.add_toolkit(tmp_path / "cuda")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert list(machine.plan()[0]) == ["sprand._C", "sprand._host"]
    monkeypatch.setenv("SPRAND_CUDA", "1")
    with pytest.raises(SystemExit, match="SPRAND_CUDA=1, but this torch is for ROCm"):
        machine.plan()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SPRAND_CUDA", "1", "SPRAND_CUDA=1, but no CUDA toolkit was found"),
        ("SPRAND_CUDA", "yes", "expected SPRAND_CUDA to be auto, 0 or 1, got 'yes'"),
        ("SPRAND_CPU", "1", "SPRAND_CPU=1, but no C\\+\\+ compiler was found"),
        ("SPRAND_HOST", "1", "SPRAND_HOST=1, but pybind11 was not found"),
    ],
)
def test_what_cannot_be_had_is_refused(machine, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    if name == "SPRAND_CPU":
        machine.remove_compiler()
    machine.remove_pybind11()
    with pytest.raises(SystemExit, match=message):
        machine.plan()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what is needed to build, without what was built."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").write_text("sprand\n")
    for name in ("sprand", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def setup(sources: Path, *arguments: str) -> None:
    environment = {**os.environ, "SPRAND_CPU": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments], cwd=sources, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_plain_wheel_is_for_any_machine(sources, tmp_path):
    setup(sources, "bdist_wheel", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sprand/kernels/ops.py" in names
    assert "sprand/py.typed" in names
    assert "sprand/cli/doctor.py" in names
    assert not any(name.endswith((".so", ".cu", ".cpp")) for name in names)


def test_the_source_archive_carries_the_native_sources(sources, tmp_path):
    setup(sources, "sdist", "-d", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in opened.getnames()}
    wanted = {path.relative_to(sources).as_posix() for path in (sources / "csrc").rglob("*.*")}
    assert wanted <= names
