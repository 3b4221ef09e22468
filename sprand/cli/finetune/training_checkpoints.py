"""The checkpoints of a training run, as transformers' Trainer writes them: which are whole, and which run they are of."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...files import described
from ...layers.sites import sites_of
from ...training.divergence import rate_to_try
from .. import CliError, TrainingFailed, ranks
from .methods import Method
from .settings import Settings

NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "trainer_state.json"  # the last file of a checkpoint that is written
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Resumed:
    """How far the run has come that is gone on with.

    Attributes:
        path: the checkpoint; None where a run begins.
        done: how many steps.
        history: what the trainer has logged so far.
        planned: how many steps the run was to take.
        threads: how many threads of torch it used; None where nothing says so.
    """

    path: Path | None = None
    done: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    planned: int = 0
    threads: int | None = None


ANEW = Resumed()


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
        """The last checkpoint written whole, if any."""
        paths = self.all()
        return paths[-1] if paths else None

    def all(self) -> list[Path]:
        """The whole checkpoints that are there, the oldest first."""
        return sorted(filter(_is_whole, self._folders()), key=lambda path: int(NAME.fullmatch(path.name)[1]))

    def begin(self) -> None:
        """Remove all checkpoints, and say whose the next ones are."""
        self._start_with([], self.identity | {"threads": torch.get_num_threads()})

    def resume(self, path: Path) -> Resumed:
        """Go on from a checkpoint, which may lie anywhere.

        Raises:
            CliError: There is no checkpoint, or it is damaged, or of another run (the first difference is named).
        """
        if not path.is_dir():
            kind = "is a file" if path.exists() else "is not there"
            raise CliError(
                f"--resume: expected a folder checkpoints/checkpoint-N of a run of sprand finetune, and {path} {kind}."
            )
        if not _is_whole(path) or not (path.parent / RUN_FILE).is_file():
            others = [other for other in self.all() if other != path]
            advice = f" There is an older one: --resume {others[-1]}." if others else ""
            raise CliError(
                f"--resume: {path} is damaged or no checkpoint of sprand finetune: expected {STATE_FILE} in it, and "
                f"{RUN_FILE} beside it.{advice}"
            )
        there = json.loads((path.parent / RUN_FILE).read_text())
        for key, here in self.identity.items():
            if there.get(key) != here:
                raise CliError(f"--resume: {path} is of another run: its {key} is {there.get(key)}, here it is {here}.")
        state = json.loads((path / STATE_FILE).read_text())
        self._start_with(self.all(), there)
        return Resumed(path, state["global_step"], state["log_history"], state["max_steps"], there.get("threads"))

    @contextmanager
    def writing(self, method: Method, step: int) -> Iterator[None]:
        """Write a checkpoint inside of it; where that fails, what was written of it goes, and the older ones stay.

        Raises:
            TrainingFailed: A trained value is not finite, or the disk is full.
        """
        if not all(bool(torch.isfinite(p).all()) for p in method.trained.values()):
            raise diverged("a trained value is no finite number", step, method, self)
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if ranks.is_first():
                shutil.rmtree(self.folder / f"checkpoint-{step}", ignore_errors=True)
            raise TrainingFailed(f"The checkpoint of step {step} could not be written: {error}. {self.describe_last()}") from None

    def describe_last(self) -> str:
        """A sentence on the newest checkpoint."""
        path = self.newest()
        if path is None:
            return "No checkpoint had been written yet (see --checkpoint-every)."
        return f"The last good checkpoint is kept: {path}."

    def _start_with(self, kept: list[Path], run: dict[str, Any]) -> None:
        """Keep these checkpoints alone, and say whose they are."""
        if ranks.is_first():
            for path in set(self._folders()) - set(kept):
                shutil.rmtree(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            described.write_json(self.folder / RUN_FILE, run)
        ranks.wait()

    def _folders(self) -> list[Path]:
        return [path for path in self.folder.glob("checkpoint-*") if NAME.fullmatch(path.name)]


def identity(method: Method, settings: Settings, rows: Iterable[Any]) -> dict[str, Any]:
    """What decides a run's course, but for its length: base weights, positions, data and options; compared on `--resume`."""
    return {
        "model and positions": _fingerprint(method),
        "data": _digest(rows),
        "trained weights": method.count,
        "learning rate": method.lr,
        "schedule": settings.schedule,
        "warm-up": settings.warmup,
        "batch size": settings.batch_size,
        "gradient accumulation": settings.grad_accumulation,
        "weight decay": settings.weight_decay,
        "gradient clipping": settings.max_grad_norm,
        "dtype": settings.dtype,
        "bits": settings.bits,
        "class weights": settings.class_weights,
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


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        return isinstance(json.loads((path / STATE_FILE).read_text()), dict)
    except (OSError, ValueError):
        return False


def _digest(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(dict(row)).encode())
    return digest.hexdigest()[:16]


def _fingerprint(method: Method) -> str:
    digest = hashlib.sha256()
    for site in sites_of(method.model):
        entries = site.entries
        digest.update(site.name.encode())
        for tensor in (entries.indices, entries.base):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
