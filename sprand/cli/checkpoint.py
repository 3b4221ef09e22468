"""Checkpoints of a run: one file each, written atomically, from which training goes on exactly as if it had never stopped."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch

from . import CliError, TrainingFailed
from .methods import Method, target_names
from .settings import Settings

KEPT = 2
FORMAT = "sprand finetune checkpoint 1"


class Checkpoints:
    """The checkpoints in one folder, and what they are checkpoints of.

    Args:
        folder: made when the first one is written; the two newest are kept.
        identity: what a run must share with a checkpoint to go on from it.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity

    def newest(self) -> Path | None:
        """The last checkpoint written, if any."""
        found = sorted(path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", path.name))
        return found[-1] if found else None

    def save(self, method: Method, step: int, history: list[dict[str, Any]]) -> Path:
        """Write the state after `step` steps; a crash meanwhile leaves the older ones as they are.

        Raises:
            TrainingFailed: a trained value is not finite, or the disk is full.
        """
        if not all(bool(torch.isfinite(p).all()) for p in method.trained.values()):
            raise diverged("a trained value is no finite number", step, method, self)
        state = {
            "format": FORMAT,
            "identity": self.identity,
            "step": step,
            "history": history,
            "trained": {name: p.detach() for name, p in method.trained.items()},
            "optimizer": method.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        path = self.folder / f"step-{step:08d}.pt"
        unfinished = path.with_suffix(".unfinished")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except (OSError, RuntimeError) as error:
            unfinished.unlink(missing_ok=True)
            raise TrainingFailed(f"The checkpoint of step {step} could not be written: {error}. {self.describe_last()}") from None
        for old in sorted(self.folder.glob("step-*.pt"))[:-KEPT]:
            old.unlink()
        return path

    def restore(self, path: Path, method: Method) -> tuple[int, list[dict[str, Any]]]:
        """Put a checkpoint's state into a method made from the same options.

        Returns:
            How many steps are done, and the metrics so far.

        Raises:
            CliError: no checkpoint, a damaged one, or one of another run (the first difference is named).
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CliError(f"--resume: no checkpoint {path}.") from None
        except Exception as error:  # torch.load raises whatever the bytes lead it to
            reason = (" ".join(str(error).split()).split(". ")[0] or type(error).__name__)[:200]
            raise CliError(f"--resume: {path} is not a checkpoint of sprand finetune, or it is damaged ({reason}).") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CliError(
                f"--resume: {path} is not a checkpoint of sprand finetune; expected a file checkpoints/step-N.pt of a run."
            )
        for key, here in self.identity.items():
            there = state["identity"].get(key)
            if there != here:
                raise CliError(f"--resume: {path} is of another run: its {key} is {there}, here it is {here}.")
        with torch.no_grad():
            for name, p in method.trained.items():
                p.copy_(state["trained"][name])
        method.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return state["step"], state["history"]

    def describe_last(self) -> str:
        """A sentence on the newest checkpoint."""
        path = self.newest()
        return (
            f"The last good checkpoint is kept: {path}."
            if path
            else "No checkpoint had been written yet (see --checkpoint-every)."
        )

    def clear(self) -> None:
        """Remove all."""
        for path in self.folder.glob("step-*"):
            path.unlink()


def identity(method: Method, settings: Settings, steps: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What decides a run's course: base weights, positions, data and options; compared on `--resume`."""
    return {
        "model and positions": _fingerprint(method),
        "data": hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
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


def diverged(what: str, step: int, method: Method, checkpoints: Checkpoints | None) -> TrainingFailed:
    """The error for a run whose numbers are no longer finite."""
    kept = f" {checkpoints.describe_last()}" if checkpoints else ""
    option = "--lr" if method.name == "sprand" else f"--compare-lr {method.name}="
    return TrainingFailed(
        f"{method.name}: {what} at step {step}; training stopped. Try a lower {option} (now {method.lr:g}).{kept}"
    )


def _fingerprint(method: Method) -> str:
    digest = hashlib.sha256()
    for name in target_names(method.model):
        module = method.model.get_submodule(name)
        for parameter in module._sprand_targets:
            entries = module.sparse_entries(parameter)
            digest.update(f"{name}.{parameter}".encode())
            for tensor in (entries.indices, entries.base):
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
