"""`sprand doctor`: what is installed, which kernel serves which operator, and whether every one of them is right here."""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..kernels import host, native, ops, selftest
from ..version import __version__
from .parser import add_json
from .table import print_table

PACKAGES = ("safetensors", "transformers", "peft", "numpy")


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "doctor",
        help="what is installed, which kernel serves what, and a self test",
        description="Show versions, the machine, and which kernel serves which operator, and test each of them; to be pasted "
        "into a bug report.",
        examples="""
            sprand doctor
            sprand doctor --json
        """,
    )
    add_json(parser, "print it as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the report, and return 1 where a self test failed."""
    report = examine()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print_report(report)
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Everything that `sprand doctor` reports.

    Returns:
        `versions`, `machine` (name to text), `kernels` (op to device to kernel name), `self_test` (one dict per operator,
        device and dtype), `advice` (sentences), `ok` (no self test failed).
    """
    devices = ["cpu", "cuda"]
    results = selftest.run(["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    return {
        "ok": all(result["ok"] for result in results),
        "versions": _versions(),
        "machine": _machine(),
        "kernels": {op: {device: native.kernel_of(op, device) for device in devices} for op in ops.SCHEMAS},
        "self_test": results,
        "advice": _advice(),
    }


def _versions() -> dict[str, str]:
    versions = {"sprand": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch's CUDA"] = torch.version.cuda or "none (a CPU build)"
    versions["CUDA toolkit"] = _first(r"release ([\d.]+)", ["nvcc", "--version"])
    versions["NVIDIA driver"] = _first(r"([\d.]+)", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return versions


def _machine() -> dict[str, str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "system": platform.platform(),
        "CPU": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "instruction set": native.instruction_set(),
        "GPU": ", ".join(gpus) or "none",
        "compiled with": host.compiler() or "unknown",
        "native modules": ", ".join(f"{module}: {problem or 'loaded'}" for module, problem in _modules().items()),
    }


def _modules() -> dict[str, str | None]:
    return {**native.problems, "_host": None if host.has_extension() else "not built"}


def _cpu_name() -> str:
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return name[1].strip() if name else platform.processor() or platform.machine()


def _first(pattern: str, command: Sequence[str]) -> str:
    """The first match of `pattern` in what a command prints."""
    if not shutil.which(command[0]):
        return "not found"
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "no answer"
    match = re.search(pattern, printed)
    return match[1] if match else "no answer"


def _advice() -> list[str]:
    said = []
    if not native.has_extension():
        said.append(f"The CPU kernels are missing (sprand._C: {native.problems['_C']}). For speed, {native.HOW_TO}")
    if torch.cuda.is_available() and native.problems["_C_cuda"]:
        said.append(
            f"This torch sees a GPU, but the CUDA kernels are missing (sprand._C_cuda: {native.problems['_C_cuda']}). "
            "Install the CUDA toolkit (nvcc; set CUDA_HOME), then run in sprand's source folder: "
            f"SPRAND_CUDA=1 {native.REINSTALL}"
        )
    if native.has_extension() and not host.has_extension():
        said.append(
            "The host module is missing (sprand._host), so a mask of your own trains slower on a GPU, and files merge slower. "
            f"Run in sprand's source folder: pip install pybind11 && {native.REINSTALL}"
        )
    return said


def _print_report(report: dict[str, Any]) -> None:
    kernels, results = report["kernels"], report["self_test"]
    devices = next(iter(kernels.values()))
    rows = [("operator", *devices, "self test")]
    rows += [(op, *served.values(), _verdict(op, results)) for op, served in kernels.items()]
    print_table(rows, left=len(rows[0]), title="Which kernel serves which operator")
    print()
    for sentence in report["advice"]:
        print(sentence, end="\n\n")
    print("To report a bug, paste this:\n\n```")
    for name, text in {**report["versions"], **report["machine"]}.items():
        print(f"{name}: {text}")
    print("kernels:", "; ".join(f"{op} {'/'.join(served.values())}" for op, served in kernels.items()))
    failures = [result for result in results if not result["ok"]]
    seconds = sum(result["seconds"] for result in results)
    print(f"self test: {len(results) - len(failures)} of {len(results)} passed, {seconds:.1f} s")
    for result in failures:
        print(f"  {result['op']} {result['dtype']} on {result['device']} ({result['kernel']}): {result['problem']}")
    print("```")


def _verdict(op: str, results: Sequence[dict[str, Any]]) -> str:
    """What the self test says of an operator on each device."""
    passed: dict[str, bool] = {}
    for result in results:
        if result["op"] == op:
            passed[result["device"]] = passed.get(result["device"], True) and result["ok"]
    return ", ".join(f"{device} {'ok' if passed[device] else 'FAILED'}" for device in sorted(passed))
