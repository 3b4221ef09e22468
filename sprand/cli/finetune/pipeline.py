"""A run of `sprand finetune` from files to an adapter, beside the methods that it is compared to."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import sprand

from ...adapters.file import FOLDER_OF_RUN
from ...files import described
from ...layers.sites import sites_of
from .. import CliError, Stopped, WorkFailed, ranks, require
from ..files import prepare_folder, reason_of
from . import data, gguf, measures, methods, models, report, tasks, verify
from .progress import Log
from .recorder import measured_line
from .rows import temporary_folder
from .settings import Resume, Settings
from .training import Outcome, Training
from .training_checkpoints import ANEW, Resumed, TrainingCheckpoints, identity


def finetune(settings: Settings, as_json: bool = False) -> list[report.Result]:
    """Fine-tune, compare, and write everything into `settings.out`.

    Args:
        settings: the options.
        as_json: print the content of results.json on standard output, and what is for the reader on standard error.

    Returns:
        The rows of the final table, sprand's first.

    Raises:
        CliError: Options or data are wrong.
        TrainingFailed: The training went wrong.
        Stopped: A signal stopped the run; the error says how to go on.
    """
    run = Run(settings, to_stderr=as_json)
    with going_on_from(run.checkpoints):
        run.train_entries()
        for name in settings.compare:
            run.train_peer(name)
    content = run.write_results()
    if as_json:
        print(json.dumps(content, indent=2))
    return run.results


class Run:
    """One run: its data and log, the model while its entries train, and the results so far.

    Args:
        settings: the options.
        to_stderr: what is for the reader goes to standard error.

    Raises:
        CliError: Options or data are wrong, or the output folder cannot be used.
    """

    def __init__(self, settings: Settings, to_stderr: bool) -> None:
        self.out = settings.out if ranks.is_first() else temporary_folder() / "out"
        self.device = models.pick_device(settings.device)
        self.dataset = data.load(settings)
        measures.check(settings, self.dataset.task)
        refuse_to_overwrite(settings)
        prepare_folder(self.out)
        self.settings = settings = dataclasses.replace(settings, model=gguf.as_folder(settings.model, self.out / "model"))
        model, tokenizer = self.load_model()
        self.settings = settings = dataclasses.replace(settings, dtype=models.dtype_of(model))
        self.task = tasks.make(self.dataset, tokenizer, settings)
        self.log = Log(self.out / "metrics.jsonl", self.task.metric, to_stderr)
        experts = models.fused_experts(model)
        self.method: methods.Method | None = methods.sparse(model, settings, self._mask(model))
        self.targets, self.count = methods.target_names(model), self.method.count
        course = identity(self.method, settings, self.task.train)
        self.checkpoints = TrainingCheckpoints(settings.out / "checkpoints", course, settings.keep)
        self.training = Training(self.method, self.task, settings, self.device, self.checkpoints)
        self._announce(experts)
        self.results: list[report.Result] = []
        self.histories: list[list[dict[str, Any]]] = []
        self.checks: list[str] = []

    def load_model(self, name: str | None = None, is_plain: bool = False) -> tuple[nn.Module, Any]:
        """The model that every method starts from, or another of its kind, as it is stored where asked, and its tokenizer."""
        settings, dataset = self.settings, self.dataset
        model, tokenizer = models.load(
            name or settings.model, dataset.task, len(dataset.labels), settings.dtype, settings.pooling, settings.seed,
            None if is_plain else settings.bits, self.device,
        )  # fmt: skip
        models.say_labels(model, dataset.labels, dataset.task)
        return model, tokenizer

    def train_entries(self) -> None:
        """Train the model's chosen entries, from a checkpoint if one is asked for, and save and prove the adapter."""
        settings, method, adapter = self.settings, self.method, self.out / FOLDER_OF_RUN
        self.before = self._measured(method)
        torch.manual_seed(settings.seed)
        resumed = self._resumed()
        outcome = self.training.run(self.log, self.before.numbers, resumed)
        self.training.save(adapter)
        self._keep(method, outcome)
        if settings.verify:
            self.checks = verify.check(method.model, adapter, settings.model, self.load_model, self.task, self.device)
        described.write_json(self.out / "task.json", self._description())
        self.method = self.training = None

    def train_peer(self, name: str) -> None:
        """Train a method to compare with, on a fresh copy of the model."""
        gc.collect()
        method = methods.peer(name, self.load_model()[0], self.settings, self.targets, self.count)
        torch.manual_seed(self.settings.seed)
        outcome = Training(method, self.task, self.settings, self.device).run(self.log, self.before.numbers)
        self._keep(method, outcome)

    def _publish(self) -> None:
        """Put the adapter on the Hub, where that is asked for.

        Raises:
            WorkFailed: The Hub does not take it; the run's folder is complete.
        """
        if self.settings.push_to_hub is None or not ranks.is_first():
            return
        try:
            hub = require("huggingface_hub").HfApi()
            place = hub.create_repo(self.settings.push_to_hub, exist_ok=True)
            hub.upload_folder(repo_id=place.repo_id, folder_path=self.out / FOLDER_OF_RUN)
        except Exception as error:  # not logged in, offline, no rights: the Hub's client has a class for each
            raise WorkFailed(
                f"--push-to-hub {self.settings.push_to_hub}: {reason_of(error)}. The run is complete in {self.out}; "
                f"hf upload {self.settings.push_to_hub} {self.out / FOLDER_OF_RUN} puts its adapter there later."
            ) from None
        self.log.say(f"on the Hub: {place}")

    def write_results(self) -> dict[str, Any]:
        """Write the curve and results.json, show the table, and return the content of results.json."""
        versions = {
            "sprand": sprand.__version__,
            "torch": torch.__version__,
            "transformers": require("transformers").__version__,
        }
        report.plot(self.out / "training_curve.png", self.histories, self.task)
        content = report.content(self.settings, self.task, self.results, versions, self.checks)
        described.write_json(self.out / "results.json", content)
        report.print_table(self.log, self.task, self.results, self.device.type)
        report.print_measures(self.log, self.results[0])
        for sentence in self.checks:
            self.log.say(f"checked: {sentence}")
        self.log.say(f"written to {self.out}: adapter/ training_curve.png results.json metrics.jsonl")
        self._publish()
        return content

    def _mask(self, model: nn.Module) -> sprand.Mask | None:
        """The entries to train where they are not drawn anew; what this run chooses is kept beside its checkpoints."""
        kept = self.settings.out / "mask.safetensors"
        mask = methods.chosen(model, self.settings, self.task, kept if self.settings.resume and kept.exists() else None)
        if mask is not None and self.settings.mask is None:
            mask.save(self.out / kept.name)
        return mask

    def _announce(self, experts: list[str]) -> None:
        settings, task, method = self.settings, self.task, self.method
        parameters = method.model.named_parameters()
        weights = sum(p.numel() for name, p in parameters if "sprand_delta" not in name)
        rows = f"{len(task.train)} training rows, {len(task.eval)} held out"
        self.log.say(f"{settings.model}: {self.dataset.task}, {rows}, on {self.device}")
        for sentence in task.said:
            self.log.say(sentence)
        trained = f"{self.count:,} of {weights:,} weights ({self.count / weights:.2%})"
        trains = {".".join(site.name.split(".")[-2:]) for site in sites_of(method.model)}
        left = [name for name in experts if name not in trains]
        if left:
            self.log.say(f"not trained: its experts; --target-parameters {','.join(left)} adds them")
        self.log.say(f"training {trained}, {self.training.steps} steps, lr {method.lr:g}")

    def _resumed(self) -> Resumed:
        """Go on from the checkpoint that the options name, or begin anew.

        Raises:
            CliError: There is no such checkpoint, or it is of another run.
        """
        ranks.wait()
        if self.settings.resume is None:
            self.checkpoints.begin()
            (self.out / "results.json").unlink(missing_ok=True)
            return ANEW
        newest = self.settings.resume is Resume.NEWEST
        path = self.checkpoints.newest() if newest else self.settings.resume
        resumed = self.checkpoints.resume(path)
        self.log.say(f"resumed from {path}, {resumed.done} steps done")
        if resumed.planned != self.training.steps:
            self.log.say(
                f"it was to take {resumed.planned} steps, and takes {self.training.steps}: the schedule goes on as of these"
            )
        self._warn_of_threads(resumed.threads)
        return resumed

    def _warn_of_threads(self, before: int | None) -> None:
        """Say that PyTorch's sums on a CPU may round otherwise than before, where the number of its threads is another one."""
        here = torch.get_num_threads()
        if self.device.type == "cpu" and before not in (None, here):
            self.log.say(
                f"warning: the run used {before} thread(s) and goes on with {here}, so that PyTorch may round its sums "
                f"otherwise; OMP_NUM_THREADS={before} before this command makes it exact"
            )

    def _measured(self, method: methods.Method) -> measures.Measures:
        return measures.measure(method.model, self.task, self.settings, self.device)

    def _keep(self, method: methods.Method, outcome: Outcome) -> None:
        size, after = methods.adapter_bytes(method, self.out / FOLDER_OF_RUN), self._measured(method)
        if not any(line["step"] == outcome.steps and f"eval_{self.task.metric}" in line for line in outcome.history):
            self.log.write(outcome.history, **measured_line(method.name, outcome.steps, after.numbers))
        self.results.append(report.Result.of(method, outcome, size, self.before, after))
        self.histories.append(outcome.history)

    def _description(self) -> dict[str, Any]:
        """What `models.load` needs to build the model that the adapter fits, and `sprand predict` to use it."""
        settings = self.settings
        return {
            "model": settings.model,
            "task": self.dataset.task,
            "kind": self.task.kind,
            "labels": list(self.dataset.labels),
            "dtype": settings.dtype,
            "pooling": settings.pooling,
            "seed": settings.seed,
            "max_length": self.task.max_length,
            "settings": settings.to_json(),
        }


@contextmanager
def going_on_from(checkpoints: TrainingCheckpoints) -> Iterator[None]:
    """Say, where a signal stops what is done inside, from which checkpoint the same command goes on.

    Raises:
        Stopped: A signal stopped the run: in place of KeyboardInterrupt, and of the training's own error.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        said, code = (str(error), error.exit_code) if isinstance(error, Stopped) else ("Stopped.", 130)
        raise Stopped(f"{said} {checkpoints.describe_last()}", code, ("--resume",) if checkpoints.newest() else None) from None


def refuse_to_overwrite(settings: Settings) -> None:
    """A run that is in the output folder is not overwritten unasked.

    Raises:
        CliError: There is a run and no word on what to do with it, or none to resume.
    """
    out, checkpoints = settings.out, TrainingCheckpoints(settings.out / "checkpoints", {})
    if settings.resume is None and not settings.overwrite:
        if (out / "results.json").exists():
            raise CliError(f"{out} holds a run that has ended. Give another --out, or drop that run with --overwrite.")
        if checkpoints.newest():
            raise CliError(
                f"{out} has checkpoints of a run that did not end. Go on with --resume, or begin anew with --overwrite."
            )
    if settings.resume is Resume.NEWEST and not checkpoints.newest():
        raise CliError(f"--resume: {checkpoints.folder} holds no checkpoint; leave out --resume to begin.")
