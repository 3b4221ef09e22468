"""What a test must leave as it found it: the environment, the folder, handlers of signals, threads and torch's switches."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch

Accessors = tuple[Callable[[], Any], Callable[[Any], object]]
NOT_OF_TESTS = (
    "PYTEST",
    "TORCHINDUCTOR",
    "PYTORCH_NVML",
    "KMP_",
)  # set by pytest, torch's compiler, imports of DeepSpeed, sklearn


def attribute(owner: object, name: str) -> Accessors:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.lstrip("_").startswith(NOT_OF_TESTS)}


def set_environment(before: Mapping[str, str]) -> None:
    for name in environment().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def handler(number: signal.Signals) -> Accessors:
    return lambda: signal.getsignal(number), lambda before: signal.signal(number, before)


def autocast(device: str) -> Accessors:
    def put_back(before: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])

    return lambda: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)), put_back


def deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def set_deterministic(before: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


STATE: dict[str, Accessors] = {
    "os.environ": (environment, set_environment),
    "the working folder": (os.getcwd, os.chdir),
    "the handler of SIGINT": handler(signal.SIGINT),
    "the handler of SIGTERM": handler(signal.SIGTERM),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, lambda _: torch.set_default_device(None)),
    "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's anomaly mode": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch's autocast on a CPU": autocast("cpu"),
    "torch's autocast on a GPU": autocast("cuda"),
    "torch.use_deterministic_algorithms": (deterministic, set_deterministic),
    "torch's filling of fresh memory": attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
    "torch's precision of float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's fast path of attention": (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    **{
        f"torch.backends.{backend.__name__.rpartition('.')[2]}.{name}": attribute(backend, name)
        for backend, names in (
            (torch.backends.cudnn, ("enabled", "benchmark", "deterministic")),
            (torch.backends.mkldnn, ("enabled", "deterministic")),
        )
        for name in names
    },
}


def state() -> dict[str, Any]:
    """All of it, as it is."""
    return {name: read() for name, (read, _) in STATE.items()}


def changes(before: Mapping[str, Any]) -> list[str]:
    """One line for each difference between then and now."""
    return [f"{name}: {_shown(before[name], value)}" for name, value in state().items() if value != before[name]]


def put_back(before: Mapping[str, Any]) -> None:
    """Set what differs as it was."""
    for name, (read, write) in STATE.items():
        if read() != before[name]:
            write(before[name])


def _shown(before: Any, now: Any) -> str:
    if not isinstance(before, dict):
        return f"{before} before, {now} after"
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name} {before.get(name)} before, {now.get(name)} after" for name in names)
