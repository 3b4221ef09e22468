"""What the tests of serving share: adapters with random changes, what they must give, and threads that are watched."""

from __future__ import annotations

import contextvars
import threading
import time
from pathlib import Path

import torch
from torch import nn

import sprand
from models import EVERY_TARGET, MLP, EveryLayer, bits, built, points_and_labels


def trained(model: nn.Module, path: Path, seed: int = 0, draw: int = 0, **fields) -> Path:
    """An adapter with random changes, saved."""
    sprand.apply(model, seed=draw, **({"density": 0.1} | fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sprand.parameters(model):
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return sprand.save(model, path)


def merged(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The weights of an untouched model with an adapter, by loading and merging."""
    return bits(sprand.merge(sprand.load(model, path)))


def outputs_of(paths: dict[str, Path]) -> dict[str | None, torch.Tensor]:
    """What each adapter of an `MLP`, and the base, makes of one batch."""
    x, _ = points_and_labels()
    models = {name: sprand.merge(sprand.load(built(MLP), path)) for name, path in paths.items()} | {None: built(MLP)}
    with torch.no_grad():
        return {name: model(x) for name, model in models.items()}


def four_adapters(folder: Path) -> dict[str, Path]:
    """Adapters of `EveryLayer`: two with the same positions, one with others, one that trains other weights, and no head."""
    return {
        "a": trained(built(EveryLayer), folder / "a", 1, **EVERY_TARGET),
        "b": trained(built(EveryLayer), folder / "b", 2, **EVERY_TARGET),
        "c": trained(built(EveryLayer), folder / "c", 3, draw=7, **EVERY_TARGET),
        "d": trained(built(EveryLayer), folder / "d", 4, target_modules=["linear", "head"]),
    }


def in_threads(*jobs) -> None:
    """Run jobs at the same time; the first error of one is raised. One that takes half a minute is stuck."""
    errors = []

    def run(job) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a thread waits for ever"
    for error in errors:
        raise error


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.001)


def later(job) -> threading.Thread:
    """A thread that belongs to no request, started now."""
    thread = threading.Thread(target=contextvars.Context().run, args=(job,), daemon=True)
    contextvars.Context().run(thread.start)
    return thread
