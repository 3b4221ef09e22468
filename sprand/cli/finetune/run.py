"""`sprand finetune`: one run from files to an adapter, with the methods it is compared to."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sprand

from ...files import described
from .. import CliError, Stopped, require
from . import data, methods, models, report, tasks, verify
from .checkpoints import Checkpoints, identity
from .progress import Log
from .settings import Settings
from .training import pick_device, total_steps, train


def run(settings: Settings, as_json: bool = False) -> list[report.Result]:
    """Fine-tune, compare, and write everything into `settings.out`.

    Args:
        settings: the options.
        as_json: print the content of results.json on standard output, and what is for the reader on standard error.

    Returns:
        The rows of the final table, sprand's first.

    Raises:
        CliError: wrong options or data.
        TrainingFailed: the training went wrong.
        Stopped: by a signal; the error says how to go on.
    """
    for package in ("rich", "matplotlib", "transformers", *(("peft",) if "lora" in settings.compare else ())):
        require(package)
    device = pick_device(settings.device)
    dataset = data.load(settings)
    refuse_to_overwrite(settings)
    prepare_folder(settings.out)

    def fresh_model() -> tuple[torch.nn.Module, Any]:
        model, tokenizer = models.load(
            settings.model, dataset.task, len(dataset.labels), settings.dtype, settings.pooling, settings.seed
        )
        return model.to(device), tokenizer

    model, tokenizer = fresh_model()
    task = tasks.make(dataset, tokenizer, settings)
    log = Log(settings.out / "metrics.jsonl", task.metric, to_stderr=as_json)
    kept = settings.out / "mask.safetensors"
    mask = methods.chosen(model, settings, task, kept if settings.resume and kept.exists() else None)
    if mask is not None and settings.mask is None:
        mask.save(kept)
    method = methods.sparse(model, settings, mask)
    targets, count = methods.target_names(model), method.count
    everything = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("sprand_delta"))
    steps = total_steps(settings, len(task.train))
    log.say(f"{settings.model}: {dataset.task}, {len(task.train)} training rows, {len(task.eval)} held out, on {device}")
    log.say(f"training {count:,} of {everything:,} weights ({count / everything:.2%}), {steps} steps, lr {method.lr:g}")

    checkpoints = Checkpoints(settings.out / "checkpoints", identity(method, settings, steps, task.train), settings.keep)
    torch.manual_seed(settings.seed)
    done, history = resume(settings, checkpoints, method, log)
    with going_on_from(checkpoints):
        outcome = train(method, task, settings, device, log, checkpoints=checkpoints, done=done, history=history)
        adapter = settings.out / "adapter"
        sprand.save(model, adapter)
        results = [report.Result.of(method, outcome, methods.adapter_bytes(method, adapter))]
        histories = [outcome.history]
        checks = verify.check(model, fresh_model()[0], adapter, task, device) if settings.verify else []
        described.write_json(settings.out / "task.json", _description(settings, dataset))
        del model, method

        for name in settings.compare:
            gc.collect()
            method = methods.peer(name, fresh_model()[0], settings, targets, count)
            torch.manual_seed(settings.seed)
            peer_outcome = train(method, task, settings, device, log, before=outcome.before)
            results.append(report.Result.of(method, peer_outcome, methods.adapter_bytes(method, adapter)))
            histories.append(peer_outcome.history)
            del method

    versions = {"sprand": sprand.__version__, "torch": torch.__version__, "transformers": require("transformers").__version__}
    report.plot(settings.out / "training_curve.png", histories, task)
    content = report.content(settings, task, results, versions, checks)
    described.write_json(settings.out / "results.json", content)
    report.print_table(log, task, results, device.type)
    for sentence in checks:
        log.say(f"checked: {sentence}")
    log.say(f"written to {settings.out}: adapter/ training_curve.png results.json metrics.jsonl")
    if as_json:
        print(json.dumps(content, indent=2))
    return results


@contextmanager
def going_on_from(checkpoints: Checkpoints) -> Iterator[None]:
    """Say, where a signal stops what is done inside, from which checkpoint the same command goes on.

    Raises:
        Stopped: in place of KeyboardInterrupt, and of the training's own.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        said, code = (str(error), error.exit_code) if isinstance(error, Stopped) else ("Stopped.", 130)
        raise Stopped(f"{said} {checkpoints.describe_last()}", code, ("--resume",) if checkpoints.newest() else None) from None


def resume(settings: Settings, checkpoints: Checkpoints, method: methods.Method, log: Log) -> tuple[int, list[dict[str, Any]]]:
    """Go on from the checkpoint that the options name, or begin anew.

    Returns:
        Steps done, and the metrics so far.

    Raises:
        CliError: there is no such checkpoint, or it is of another run.
    """
    newest = checkpoints.newest()
    if settings.resume is None:
        checkpoints.clear()
        (settings.out / "results.json").unlink(missing_ok=True)
        return 0, []
    path = newest if settings.resume == "newest" else Path(settings.resume)
    if path is None:
        raise CliError(f"--resume: {checkpoints.folder} holds no checkpoint; leave out --resume to begin.")
    done, history, threads = checkpoints.restore(path, method)
    log.say(f"resumed from {path}, {done} steps done")
    warn_of_threads(threads, method, log)
    return done, history


def warn_of_threads(before: int | None, method: methods.Method, log: Log) -> None:
    """Say that PyTorch's sums on a CPU may round otherwise than before, where the number of its threads is another one."""
    here = torch.get_num_threads()
    on_cpu = all(p.device.type == "cpu" for p in method.trained.values())
    if on_cpu and before not in (None, here):
        log.say(
            f"warning: the run used {before} thread(s) and goes on with {here}, so that PyTorch may round its sums otherwise; "
            f"OMP_NUM_THREADS={before} before this command makes it exact"
        )


def refuse_to_overwrite(settings: Settings) -> None:
    """A run that is in the output folder is not overwritten unasked.

    Raises:
        CliError: there is one and no word on what to do, or none to resume.
    """
    out, checkpoints = settings.out, Checkpoints(settings.out / "checkpoints", {})
    if settings.resume is None and not settings.overwrite:
        if (out / "results.json").exists():
            raise CliError(f"{out} holds a run that has ended. Give another --out, or drop that run with --overwrite.")
        if checkpoints.newest():
            raise CliError(
                f"{out} has checkpoints of a run that did not end. Go on with --resume, or begin anew with --overwrite."
            )
    if settings.resume == "newest" and not checkpoints.newest():
        raise CliError(f"--resume: {checkpoints.folder} holds no checkpoint; leave out --resume to begin.")


def prepare_folder(out: Path) -> None:
    """Make the output folder and prove that files can be written there.

    Raises:
        CliError: they cannot.
    """
    probe = out / ".sprand-probe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CliError(f"--out {out}: cannot be written: {error.strerror}.") from None


def _description(settings: Settings, dataset: data.Dataset) -> dict[str, Any]:
    """What `models.load` needs to build the model that the adapter fits."""
    return {
        "model": settings.model,
        "task": dataset.task,
        "labels": list(dataset.labels),
        "dtype": settings.dtype,
        "pooling": settings.pooling,
        "seed": settings.seed,
        "max_length": settings.max_length,
    }
