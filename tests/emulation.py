"""Builds the CUDA operators for the CPU (csrc/emulator), as torch.ops.sprand_simt, once per state of their sources."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sprand.kernels import ops

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-DSPRAND_SIMT", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FENCES = 128  # NaN around a result, see `fenced_results`

_library = torch.library.Library("sprand_simt", "DEF")
for _name, _schema in ops.SCHEMAS.items():
    _library.define(_name + _schema)


def cuda_headers() -> Path | None:
    """A folder with the CUDA runtime's headers: of a toolkit, or of the pip packages that torch's CUDA builds bring along."""
    beside_nvcc = Path(os.path.realpath(shutil.which("nvcc") or "/none")).parent.parent
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", beside_nvcc]
    folders = [Path(home) / "include" for home in homes if home]
    folders += Path(torch.__file__).parent.parent.glob("nvidia/*/include")
    needed = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h")
    return next((folder for folder in folders if all((folder / name).exists() for name in needed)), None)


def build(headers: Path) -> Path:
    """Compile with g++ into build/simt; a library of the same sources, torch and compiler is used again."""
    sources = [*sorted(CSRC.glob("cuda/*.cu")), *sorted(CSRC.glob("cuda/*ops.cpp"))]
    files = [*sources, *CSRC.glob("*.h"), *CSRC.glob("emulator/*.h"), *CSRC.glob("cuda/*.h"), *CSRC.glob("cuda/*.cuh")]
    compiler = os.environ.get("CXX", "g++").split()
    torch_home = Path(torch.__file__).parent
    flags = [*FLAGS, f"-I{CSRC}", "-isystem", str(torch_home / "include"), "-isystem", str(headers)]
    state = hashlib.sha256(repr([compiler, flags, torch.__version__]).encode())
    for file in sorted(files):
        state.update(file.name.encode() + file.read_bytes())
    library = ROOT / "build" / "simt" / f"sprand_simt_{state.hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side build it once
        if not library.exists():
            _compile(sources, compiler, flags, library)
    return library


def _compile(sources: list[Path], compiler: list[str], flags: list[str], library: Path) -> None:
    torch_home = Path(torch.__file__).parent
    folder = library.with_suffix(f".{os.getpid()}")
    folder.mkdir()

    def compile(source: Path) -> str:
        target = str(folder / f"{source.name}.o")
        subprocess.run([*compiler, *flags, "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    linked = folder / "sprand_simt.so"
    link = ["-shared", *objects, "-o", str(linked), f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*compiler, *link], check=True)
    linked.replace(library)
    shutil.rmtree(folder)


class Emulation:
    """The operators of `torch.ops.sprand_simt` and the order in which their threads run."""

    ORDERS = (0, 1, 2, 5)  # ascending, descending, two stride walks

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(str(path))
        self.ops = torch.ops.sprand_simt
        library = ctypes.CDLL(str(path))
        self._set_order, self._launches = library.sprand_simt_set_order, library.sprand_simt_launches
        self._launches.restype = ctypes.c_int64

    def set_order(self, order: int) -> None:
        self._set_order(order)

    def launches(self) -> int:
        """How many kernels this process has launched."""
        return self._launches()


@contextmanager
def fenced_results() -> Iterator[list[Tensor]]:
    """Gives what operators allocate within this block fences of NaN, which no kernel may touch.

    Yields:
        The memories, one for each result and each workspace, for `problems.guards_hold`.
    """
    memories: list[Tensor] = []

    def new_empty(like: Tensor, size: list[int], *, dtype: torch.dtype | None = None, **_: object) -> Tensor:
        memory = torch.full((math.prod(size) + FENCES,), math.nan, dtype=dtype or like.dtype)
        memories.append(memory)
        return memory[FENCES // 2 : -FENCES // 2].view(size)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("new_empty", new_empty, "CPU")
        yield memories


def load() -> Emulation:
    """The emulation, built if need be; skips the calling test where that is not possible."""
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("the emulation of the CUDA kernels needs g++")
    headers = cuda_headers()
    if headers is None:
        pytest.skip("the emulation of the CUDA kernels needs the CUDA headers (set CUDA_HOME)")
    return Emulation(build(headers))
