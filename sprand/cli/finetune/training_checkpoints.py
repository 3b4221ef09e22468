"""The checkpoints of a training run: one file each, from which training goes on exactly as if it had never stopped."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import states
from ...files.atomic import remove_stale
from ...layers.sites import sites_of
from ...training.divergence import rate_to_try
from .. import CliError, TrainingFailed
from .methods import Method
from .settings import Settings

NAME = re.compile(r"step-(\d+)\.safetensors")
KIND = "sprand finetune checkpoint 2"  # 1 was a file of torch.save
PARTS = {"identity": dict, "step": int, "history": list, "trained": dict, "optimizer": dict, "rng": Tensor, "cuda_rng": list}


@dataclass(frozen=True)
class Resumed:
    """How far the run has come that is gone on with.

    Attributes:
        done: how many steps.
        history: the metrics so far.
        threads: how many threads of torch it used; None where nothing says so.
    """

    done: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    threads: int | None = None


class TrainingCheckpoints:
    """The checkpoints in one folder, and what they are checkpoints of.

    Args:
        folder: made when the first one is written.
        identity: what a run must share with a checkpoint to go on from it.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int = 2) -> None:
        self.folder, self.identity, self.keep = folder, identity, keep

    def newest(self) -> Path | None:
        """The last checkpoint written, if any."""
        paths = self.all()
        return paths[-1] if paths else None

    def all(self) -> list[Path]:
        """The checkpoints that are there, the oldest first."""
        names = ((path, NAME.fullmatch(path.name)) for path in self.folder.glob("step-*"))
        return sorted((path for path, name in names if name), key=lambda path: int(NAME.fullmatch(path.name)[1]))

    def save(self, method: Method, step: int, history: list[dict[str, Any]]) -> Path:
        """Write the state after `step` steps; a crash meanwhile leaves the older ones as they are.

        Raises:
            TrainingFailed: A trained value is not finite, or the disk is full.
        """
        if not all(bool(torch.isfinite(p).all()) for p in method.trained.values()):
            raise diverged("a trained value is no finite number", step, method, self)
        state = {
            "identity": self.identity,
            "step": step,
            "history": history,
            "trained": {name: p.detach() for name, p in method.trained.items()},
            "optimizer": method.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "threads": torch.get_num_threads(),
        }
        path = self.folder / f"step-{step:08d}.safetensors"
        self._drop_oldest()  # a process that was killed may have left too many
        try:
            states.write(path, KIND, state)
        except OSError as error:
            raise TrainingFailed(f"The checkpoint of step {step} could not be written: {error}. {self.describe_last()}") from None
        self._drop_oldest()
        return path

    def _drop_oldest(self) -> None:
        for path in self.all()[: -self.keep]:
            path.unlink()

    def restore(self, path: Path, method: Method) -> Resumed:
        """Put a checkpoint's state into a method made from the same options.

        Raises:
            CliError: There is no checkpoint, or it is damaged, or of another run (the first difference is named).
        """
        state = self._read(path)
        for key, here in self.identity.items():
            there = state["identity"].get(key)
            if there != here:
                raise CliError(f"--resume: {path} is of another run: its {key} is {there}, here it is {here}.")
        for name, p in method.trained.items():
            value = state["trained"].get(name)
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != (p.shape, p.dtype):
                raise CliError(f"--resume: {path} is damaged: expected {list(p.shape)} of {p.dtype} for {name}.")
        try:
            method.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CliError(f"--resume: {path} is damaged: its optimizer or random state does not fit ({error}).") from None
        with torch.no_grad():
            for name, p in method.trained.items():
                p.copy_(state["trained"][name])
        return Resumed(state["step"], state["history"], state.get("threads"))

    def _read(self, path: Path) -> dict[str, Any]:
        """The state in a checkpoint, all parts of it there.

        Raises:
            CliError: There is no such checkpoint, or it is damaged.
        """
        try:
            state = states.read(path, KIND)
        except FileNotFoundError:
            raise CliError(f"--resume: no checkpoint {path}.") from None
        except ValueError as error:
            older = [other for other in self.all() if other != path]
            advice = f" There is an older one: --resume {older[-1]}" if older else ""
            raise CliError(
                "--resume: expected a checkpoint of sprand finetune, a file checkpoints/step-N.safetensors of a run: "
                f"{error}.{advice}"
            ) from None
        if not all(isinstance(state.get(name), kind) for name, kind in PARTS.items()):
            raise CliError(f"--resume: {path} is damaged: expected {', '.join(PARTS)} in it.")
        return state

    def describe_last(self) -> str:
        """A sentence on the newest checkpoint."""
        path = self.newest()
        if path is None:
            return "No checkpoint had been written yet (see --checkpoint-every)."
        return f"The last good checkpoint is kept: {path}."

    def clear(self) -> None:
        """Remove all checkpoints, and what unfinished ones left."""
        if self.folder.is_dir():
            remove_stale(self.folder)
        for path in self.folder.glob("step-*"):
            path.unlink()


def identity(method: Method, settings: Settings, steps: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What decides a run's course: base weights, positions, data and options; compared on `--resume`."""
    return {
        "model and positions": _fingerprint(method),
        "data": hashlib.sha256(repr([*rows]).encode()).hexdigest()[:16],
        "trained weights": method.count,
        "number of steps": steps,
        "learning rate": method.lr,
        "schedule": settings.schedule,
        "warm-up": settings.warmup,
        "batch size": settings.batch_size,
        "gradient accumulation": settings.grad_accumulation,
        "weight decay": settings.weight_decay,
        "gradient clipping": settings.max_grad_norm,
        "dtype": settings.dtype,
        "seed": settings.seed,
    }


def diverged(what: str, step: int, method: Method, checkpoints: TrainingCheckpoints | None) -> TrainingFailed:
    """The error for a run whose numbers are no longer finite."""
    kept = f" {checkpoints.describe_last()}" if checkpoints else ""
    return TrainingFailed(
        f"{method.name}: {what} at step {step}; training stopped. The learning rate ({method.lr:g}) may be too high: try "
        f"{rate_option(method)}{rate_to_try(method.lr):g}.{kept}"
    )


def rate_option(method: Method) -> str:
    """What a rate of this method is written behind."""
    return "--lr " if method.name == "sprand" else f"--compare-lr {method.name}="


def _fingerprint(method: Method) -> str:
    digest = hashlib.sha256()
    for site in sites_of(method.model):
        entries = site.entries
        digest.update(site.name.encode())
        for tensor in (entries.indices, entries.base):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
