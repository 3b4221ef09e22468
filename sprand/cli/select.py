"""`sprand select`: the entries that a strategy chooses, into a file that `sprand finetune --mask` trains."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import sprand

from ..selection.pattern import RANDOM_STRATEGIES
from ..selection.strategies import STRATEGIES
from . import CliError, require
from .finetune import data, methods, models, tasks
from .finetune.run import prepare_folder
from .finetune.settings import Settings
from .finetune.training import pick_device


def run(settings: Settings, out: Path, plot: Path | None, compare: Path | None, as_json: bool) -> sprand.Mask:
    """Choose, write the mask, and say what was chosen.

    Args:
        settings: model, data and what to choose; its `train` is the empty path where no data are given.
        out: the mask's file.
        plot: a PNG to draw, or None.
        compare: another mask's file, whose overlap the PNG shows, or None.
        as_json: print the counts as JSON.

    Raises:
        CliError: wrong options or data, or a file that cannot be written.
    """
    require("transformers")
    if compare is not None and plot is None:
        raise CliError("--compare draws the overlap of two masks: give --plot FILE.png as well.")
    if settings.strategy in STRATEGIES and STRATEGIES[settings.strategy].wants_data and settings.train == Path():
        free = (*RANDOM_STRATEGIES, *(name for name, strategy in STRATEGIES.items() if not strategy.wants_data))
        raise CliError(
            f"--strategy {settings.strategy} needs rows to compute scores on: give --data FILE ({', '.join(free)} do not)."
        )
    other = _read(compare) if compare is not None else None
    for folder in {path.parent for path in (out, plot) if path is not None}:
        prepare_folder(folder)
    device = pick_device(settings.device)
    dataset = data.load(settings) if settings.train != Path() else None
    kind = dataset.task if dataset else settings.task if settings.task != "auto" else models.task_of(settings.model)
    classes = len(dataset.labels) if dataset else 2
    model, tokenizer = models.load(settings.model, kind, classes, settings.dtype, settings.pooling, settings.seed)
    started = time.perf_counter()
    mask = _chosen(model.to(device), settings, tasks.make(dataset, tokenizer, settings) if dataset else None)
    seconds = time.perf_counter() - started
    mask.save(out)
    if plot is not None:
        sprand.plot_selection(mask, plot, other=other)
    _say(mask, out, plot, seconds, as_json)
    return mask


def _chosen(model: Any, settings: Settings, task: tasks.Task | None) -> sprand.Mask:
    try:
        config = methods.sparse_config(settings, models.head_names(model) or None)
        scored = settings.strategy in STRATEGIES
        fields = methods.calibration(settings, task) if scored and task else {}
        return sprand.select(model, config, disjoint=settings.disjoint or None, **fields)
    except (ValueError, FileNotFoundError) as error:
        raise CliError(f"{error}.") from None


def _read(path: Path) -> sprand.Mask:
    try:
        return sprand.Mask.load(path)
    except (OSError, ValueError) as error:
        raise CliError(f"--compare: {error}.") from None


def _say(mask: sprand.Mask, out: Path, plot: Path | None, seconds: float, as_json: bool) -> None:
    counts = {name: {"nnz": indices.numel(), "shape": list(mask.shapes[name])} for name, indices in mask.items()}
    if as_json:
        chosen = {"out": str(out), "selection": mask.selection, "nnz": mask.nnz, "seconds": round(seconds, 3), "targets": counts}
        print(json.dumps(chosen, indent=2))
        return
    sizes = {name: max(1, math.prod(shape)) for name, shape in mask.shapes.items()}
    densities = {name: indices.numel() / sizes[name] for name, indices in mask.items()}
    least, most = min(densities, key=densities.get), max(densities, key=densities.get)
    print(f"chose {mask.nnz:,} of {sum(sizes.values()):,} entries of {len(mask)} weights in {seconds:.1f} s")
    print(f"density {densities[least]:.4%} ({least}) to {densities[most]:.4%} ({most})")
    print(f"written: {out}" + (f", {plot}" if plot else ""))
