"""Peak memory of a training step above the loaded model, each method in a fresh process so that its RSS is its own."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 2**20
CATEGORIES = ("entries", "gradients", "moments", "indices", "base", "other")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


@dataclass(frozen=True)
class Case:
    """One measurement: `method` is a key of `methods.expand`, `steps` how many training steps the peak is taken over."""

    method: str
    width: int
    layers: int
    dtype: str
    tokens: int
    checkpointing: bool
    steps: int


def measure(case: Case, repeats: int) -> dict[str, object]:
    """Run `case` in `repeats` fresh processes.

    Returns:
        Medians of `peak` (high-water RSS while training minus RSS with the model loaded), `saved` (bytes that autograd
        keeps for backward beside the weights; None with checkpointing) and `state` (what the method adds to the model and
        its optimizer), which is the sum of `CATEGORIES`, all in bytes; `trained`; or `reason` where it cannot run.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, **ALLOCATOR, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    results = []
    for _ in range(repeats):
        command = [sys.executable, str(Path(__file__)), json.dumps(asdict(case))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return {"reason": f"failed: {last}"}
        results.append(json.loads(done.stdout.splitlines()[-1]))
        if "reason" in results[-1]:
            return results[-1]
    middle = {key: int(statistics.median(r[key] for r in results)) for key in ("peak", "state", "trained", *CATEGORIES)}
    middle["saved"] = None if case.checkpointing else statistics.median(r["saved"] for r in results)
    return middle


def run(case: Case) -> dict[str, object]:
    """Measure `case` in this process."""
    from methods import METHODS, ON_PEFT, Trainer, Unavailable, build, expand, random_tokens

    name, _, density = case.method.partition("@")
    (method,) = expand([name], [float(density)] if density else [], case.dtype)
    for package in ("peft", "peft_sparta", "sprand"):
        with contextlib.suppress(ImportError):
            __import__(package)
    try:
        if name not in (*METHODS, *ON_PEFT):
            raise Unavailable(f"no such method: {name}")
        model = build(case.width, case.layers, case.dtype, case.checkpointing)
        tokens = random_tokens(case.tokens)
        own = storages(model, None)
        gc.collect()
        loaded = resident()
        trainer = Trainer.of(method, model, tokens)
    except Unavailable as error:
        return {"reason": str(error)}
    gc.collect()
    with high_water() as peak:
        for _ in range(case.steps):
            trainer.step()
    saved = saved_bytes(trainer)
    parts = categories(trainer, own)
    state = sum(parts.values())
    return {"peak": peak[0] - loaded, "saved": saved, "state": state, "trained": trainer.trained, **parts}


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory (`VmRSS`), or the most there were (`VmHWM`)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024


@contextlib.contextmanager
def high_water() -> Iterator[list[int]]:
    """The most memory held inside the block, as the only element of the list once it has ended.

    The kernel's own mark where it can be reset, otherwise a thread that looks every 2 ms.
    """
    peak = [0]
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        stop = threading.Event()

        def sample() -> None:
            while not stop.is_set():
                peak[0] = max(peak[0], resident())
                time.sleep(0.002)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield peak
        finally:
            stop.set()
            thread.join()
        return
    yield peak
    peak[0] = resident("VmHWM")


def storages(model, optimizer) -> dict[int, int]:
    """Bytes by address of all storages that parameters, buffers, gradients and optimizer state live in."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in tensors(model, optimizer)}


def tensors(model, optimizer):
    """All tensors of a model and its optimizer, each with its category."""
    import torch

    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                yield ("entries" if tensor.requires_grad else "other"), tensor
                if tensor.is_leaf and tensor.grad is not None:
                    yield "gradients", tensor.grad
        for name, tensor in (*module._buffers.items(), *held(module)):
            if tensor is not None:
                integers = not (tensor.is_floating_point() or tensor.is_complex())
                yield ("indices" if integers else "base" if "base" in name else "other"), tensor
    if optimizer is not None:
        for state in optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, torch.Tensor):
                    yield "moments", tensor


def held(module):
    """Tensors in attributes of a module, or in dictionaries there, as SHiRA keeps its indices."""
    import torch

    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        for item in value.values() if isinstance(value, dict) else (value,):
            if isinstance(item, torch.Tensor) and not item.is_sparse:
                yield name, item


def categories(trainer, own: dict[int, int]) -> dict[str, int]:
    """Bytes that the method adds to the model, by `CATEGORIES`; `own` are the storages of the model before."""
    found, seen = dict.fromkeys(CATEGORIES, 0), set(own)
    for category, tensor in tensors(trainer.model, trainer.optimizer):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[category] += storage.nbytes()
    return found


def saved_bytes(trainer) -> int:
    """Bytes that autograd keeps between forward and backward, the model's own weights apart; leaves the gradients in place."""
    import torch

    weights, kept = storages(trainer.model, None), {}

    def pack(tensor):
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.loss()
    loss.backward()
    return sum(kept.values())


if __name__ == "__main__":
    print(json.dumps(run(Case(**json.loads(sys.argv[1])))))
