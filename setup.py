"""Builds the native modules: sprand._C (CPU), sprand._C_cuda (CUDA, where a toolkit is found), sprand._host (pybind11).

Environment: SPRAND_CPU, SPRAND_CUDA, SPRAND_HOST = auto (default: what this machine can build) | 1 (or fail) | 0 (leave out; with
SPRAND_CPU=0 nothing is compiled); TORCH_CUDA_ARCH_LIST as in PyTorch; MAX_JOBS = parallel compiler jobs; CXX; CUDA_HOME.
"""

import glob
import importlib.util
import os
import shutil
import sys
import sysconfig

from setuptools import Extension, setup

ROOT = os.path.dirname(os.path.abspath(__file__))
CSRC = os.path.join(ROOT, "csrc")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch 2.10: one binary serves torch >= 2.10
CXX = f"-std=c++20 -O3 -g0 -Wall -ffp-contract=off -fvisibility=hidden -fopenmp-simd -fmacro-prefix-map={ROOT}/=".split()
NVCC = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden,-ffp-contract=off"]
NVCC += [f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")]
LINK = ["-s"] if sys.platform == "linux" else []
HOW_TO = "pip install --no-build-isolation --force-reinstall --no-deps ."


def wanted(module: str, missing: str) -> bool:
    """Whether to build a module; `missing` is what this machine lacks for it, empty where it has everything."""
    choice = os.environ.get(f"SPRAND_{module}", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"sprand: expected SPRAND_{module} to be auto, 0 or 1, got {choice!r}")
    if choice == "1" and missing:
        sys.exit(f"sprand: SPRAND_{module}=1, but {missing}")
    return choice != "0" and not missing


def no_compiler() -> str:
    """What is missing for compiling an extension module; empty where nothing is. Settles CXX for torch and setuptools alike."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = [name for name in names if shutil.which(name.split()[0])]
    if not found:
        return f"no C++ compiler was found ({', '.join(names)})"
    os.environ["CXX"] = found[0]
    return "" if os.path.exists(f"{sysconfig.get_path('include')}/Python.h") else "Python's headers (python3-dev) were not found"


def cuda_toolkit() -> str:
    """The toolkit's folder, told by its header (an nvcc on PATH may be a wrapper in another place), or an empty string."""
    beside_nvcc = os.path.dirname(os.path.dirname(os.path.realpath(shutil.which("nvcc") or "")))
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", beside_nvcc):
        if home and os.path.exists(f"{home}/bin/nvcc") and os.path.exists(f"{home}/include/cuda_runtime_api.h"):
            return os.path.realpath(home)
    return ""


def gencode(torch) -> list[str]:
    """nvcc's targets: TORCH_CUDA_ARCH_LIST (PyTorch reads it itself), else the visible GPU, else sm_80, sm_90a and PTX."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST", "native") != "native":
        return []
    pairs = [("80", "sm"), ("90a", "sm"), ("90", "compute")]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        pairs = [("90a" if major == 9 else f"{major}{minor}", "sm")]
    return [f"-gencode=arch=compute_{arch},code={code}_{arch}" for arch, code in pairs]


def extension(kind, folder: str, flags, include: list[str], **options) -> Extension:
    """One module, `sprand._<...>`, from all sources of one folder of csrc."""
    name = {"cpu": "_C", "cuda": "_C_cuda", "host": "_host"}[folder]
    sources = sorted(path for path in glob.glob(f"csrc/{folder}/*") if path.endswith((".cpp", ".cu")))
    headers = [path for end in ("h", "cuh", "inl") for path in glob.glob(f"csrc/**/*.{end}", recursive=True)]
    options |= {"extra_compile_args": flags, "extra_link_args": LINK, "depends": headers}
    return kind(f"sprand.{name}", sources, include_dirs=[CSRC, *include], **options)


def native() -> dict:
    """The keywords of `setup` that say what is compiled."""
    missing = no_compiler()
    if not wanted("CPU", missing):
        why = missing or "SPRAND_CPU=0"
        print(
            f"sprand: {why}: no compiled kernels, plain PyTorch serves (slow). For fast ones get a C++ compiler, then: {HOW_TO}"
        )
        return {}
    try:
        import torch
        from torch.utils import cpp_extension as ce
    except ImportError as error:
        sys.exit(f"sprand: the build needs torch ({error}). Install torch >= 2.10, then: pip install --no-build-isolation .")

    flags = {"cxx": [*CXX, STABLE_ABI]}
    modules = [extension(ce.CppExtension, "cpu", flags, [], py_limited_api=True)]
    home = cuda_toolkit()
    missing = "this torch is for ROCm" if torch.version.hip else "" if home else "no CUDA toolkit was found (set CUDA_HOME)"
    if wanted("CUDA", missing):
        ce.CUDA_HOME = home  # torch leaves it unset where torch itself is a CPU build
        cudart = {"library_dirs": [path for path in glob.glob(f"{home}/lib*") if os.path.isdir(path)]}
        static = any(os.path.exists(f"{path}/libcudart_static.a") for path in cudart["library_dirs"])
        cudart["libraries"] = ["cudart_static", "dl", "rt", "pthread"] if static else ["cudart"]
        flags = {**flags, "nvcc": [*NVCC, *gencode(torch)]}
        modules.append(extension(ce.CppExtension, "cuda", flags, [f"{home}/include"], py_limited_api=True, **cudart))
    options = {"bdist_wheel": {"py_limited_api": "cp311"}}
    if wanted("HOST", "" if importlib.util.find_spec("pybind11") else "pybind11 was not found (pip install pybind11)"):
        import pybind11

        modules.append(extension(Extension, "host", CXX, [pybind11.get_include()], language="c++"))
        options = {}  # pybind11 knows no limited API: a wheel with _host is for this Python version alone
    names = ", ".join(module.name for module in modules)
    print(f"sprand: building {names} (torch {torch.__version__}, CUDA toolkit {home or 'none'})")
    return {
        "ext_modules": [module for module in modules if module.sources],
        "cmdclass": {"build_ext": ce.BuildExtension},
        "options": options,
    }


setup(**native())
