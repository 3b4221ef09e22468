"""A fine-tuned model ready to use: what a run of `sprand finetune` left, or a model folder, such as `sprand merge` writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sprand

from ..adapters.file import FOLDER_OF_RUN
from . import CliError
from .files import failing_in_words
from .finetune import asking, data, generation, measures, models, tasks
from .finetune.settings import DEFAULT_LENGTH, Settings

TASK_FILE = "task.json"


@dataclasses.dataclass
class Tuned:
    """A model, with the adapter of a run in it where there is one.

    Attributes:
        model: in eval mode; `sprand.merge(model)` makes it a plain one.
        tokenizer: its tokenizer.
        task: "classification", "multi-label", "regression" or "causal-lm".
        kind: what a training row was, as `tasks.Task` has it.
        labels: names of the classes in the order of their numbers; empty for a language model, and where numbers are said.
        max_length: tokens of a text; what is longer is cut off, as in training.
        settings: the options of the run; of a model folder the defaults.
        has_base: whether the model without the adapter can be had as well.
    """

    model: nn.Module
    tokenizer: Any
    task: str
    kind: str
    labels: tuple[str, ...]
    max_length: int
    settings: Settings
    has_base: bool

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def base(self) -> AbstractContextManager[Any]:
        """The model without the adapter, inside of a `with` block."""
        if not self.has_base:
            return nullcontext()
        return self.model.disable_adapter() if models.is_packed(self.model) else sprand.disabled(self.model)

    def probabilities(self, texts: Sequence[str | data.Example], batch_size: int = 32) -> Tensor:
        """Of each text, or `Example` of a pair, the probability of each class, float32 `[texts, classes]`, on the CPU.

        Of a model that learned numbers it is the number, `[texts, 1]`.
        """
        examples = (data.Example(text) if isinstance(text, str) else text for text in texts)
        is_number = self.task == "regression"
        rows = [dataclasses.replace(example, label="0" if is_number else self.labels[0]) for example in examples]
        kind = tasks.Regression if is_number else tasks.Classification
        encoded = kind(data.Dataset(self.task, [], rows, self.labels), self.tokenizer, self.max_length).eval
        with measures.evaluating(self.model):
            logits = measures.predicted(self.model, self.tokenizer, encoded, batch_size, self.device)
        if is_number:
            return logits
        return logits.sigmoid() if self.model.config.problem_type == measures.MANY_CLASSES else logits.softmax(-1)

    def completions(self, questions: Sequence[data.Example], most: int, batch_size: int = 32) -> list[str]:
        """What the model says to questions of `asking.examples`, by the likeliest token each time, of `most` tokens at most."""
        prompts = asking.prompts(questions, self.tokenizer, self.settings.chat)
        with measures.evaluating(self.model):
            return generation.generate(self.model, self.tokenizer, prompts, most, batch_size)

    def continuation(self, text: str, tokens: int = 64) -> str:
        """What the model says to a text, put as the rows that it was trained on."""
        return self.completions([asking.as_row(text, self.kind)], tokens)[0]


def load_run(folder: Path | str, device: str = "auto") -> Tuned:
    """The base model of a run with the adapter that it wrote, or the model of a folder as it is.

    Args:
        folder: `--out` of `sprand finetune`, or the folder `adapter` in it; or a classifier or language model in the Hugging
            Face layout, or its name on the Hub.
        device: "auto", or as torch has it.

    Raises:
        CliError: There is neither, the run has not ended, or its base is not there or another one.
    """
    place = Path(folder)
    if place.resolve().name == FOLDER_OF_RUN and not (place / TASK_FILE).is_file():
        place = place.resolve().parent
    with failing_in_words():
        where = models.pick_device(device)
        tuned = _of_run(place, where) if (place / TASK_FILE).is_file() else _of_model(str(folder), where)
    tuned.model.eval()
    return tuned


def _of_run(folder: Path, device: torch.device) -> Tuned:
    made = json.loads((folder / TASK_FILE).read_text())
    labels = tuple(made["labels"])
    said = {name: made[name] for name in ("model", "dtype", "pooling", "seed", "max_length")}
    settings = Settings.from_json(said | made.get("settings", {}) | {"out": str(folder)})
    model, tokenizer = models.load(
        made["model"], made["task"], len(labels), made["dtype"], made["pooling"], made["seed"], settings.bits, device
    )
    models.say_labels(model, labels, made["task"])
    model = models.attached(model, folder / FOLDER_OF_RUN)
    kind = made.get("kind", "texts" if labels else "prompts")
    return Tuned(model, tokenizer, made["task"], kind, labels, made["max_length"], settings, has_base=True)


def _of_model(name: str, device: torch.device) -> Tuned:
    is_on_hub = name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()
    if not is_on_hub and not (Path(name) / "config.json").is_file():
        raise CliError(
            f"{name}: no task.json and no config.json; expected the folder --out of a run of sprand finetune that has ended, or "
            "a model in the Hugging Face layout."
        )
    settings = Settings(model=name, train=None, out=Path(name))
    task, labels = models.use_of(name)
    model, tokenizer = models.load(name, task, len(labels), settings.dtype, settings.pooling, settings.seed, device=device)
    length = min(tokenizer.model_max_length, DEFAULT_LENGTH)
    kind = "prompts" if task == "causal-lm" else "texts"
    return Tuned(model, tokenizer, task, kind, labels, length, settings, has_base=False)
