"""What is measured of a model on held-out rows: numbers by name, and what a reader is shown beside them."""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import CliError, require
from ..files import failing_in_words
from .generation import IGNORED, Sample, generate, prompt_of, proven_score, scorer
from .settings import Settings

LANGUAGE, ONE_CLASS, MANY_CLASSES, NUMBER = (
    "causal-lm", "single_label_classification", "multi_label_classification", "regression",
)  # fmt: skip
SHOWN_SAMPLES, SHOWN_CLASSES, BLOCK = 3, 10, 1024
MOST_TOKENS = 4096  # at a time: with 128 thousand words their logits are 2 GB
CONFUSION = "rows by their class (lines), and the class they are given (columns)"
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Measures:
    """What was measured.

    Attributes:
        numbers: by name.
        classes: names of the classes that `confusion` counts.
        confusion: how many rows of each class (a line) were given each class (a column).
        samples: what was generated for rows of a language model.
    """

    numbers: dict[str, float]
    classes: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    samples: tuple[Sample, ...] = ()

    def shown(self) -> dict[str, Any]:
        """What results.json holds beside the numbers."""
        matrix = {"classes": self.classes, "confusion": self.confusion} if self.confusion else {}
        return matrix | ({"samples": [dataclasses.asdict(sample) for sample in self.samples]} if self.samples else {})


def measure(model: nn.Module, task: Any, settings: Settings, device: torch.device) -> Measures:
    """Measure a model on the held-out rows of a task.

    Language models: `loss`, `perplexity`, `token_accuracy`, and where the options ask for them `exact_match` or `score`, and
    `forgetting_perplexity`. One class a row: `loss`, `accuracy`, `macro_f1`, `mcc`, and `majority_accuracy`, what the class that
    is most frequent in the training rows would get. Several: `loss`, `accuracy` (all classes of a row right), `macro_f1`,
    `micro_f1`. Numbers: `loss`, `rmse`, `pearson`, `spearman`, and `mean_rmse`, what the mean of the training rows would get.

    Args:
        model: in any mode, which it keeps; it returns logits, or an output that has them.
        task: its `eval`, `train` and `tokenizer` are used. A row has `input_ids` and `labels`: a list of tokens of a language
            model, a whole number for a class, a list of floats for several, a float.
        settings: the options.
        device: where the model is.

    Raises:
        CliError: The options ask for a score that the rows do not allow.
    """
    with evaluating(model):
        if problem_of(task.eval[0]) == LANGUAGE:
            return _of_language_model(model, task, settings, device)
        return _of_classifier(model, task, settings, device)


def check(settings: Settings, task: str) -> None:
    """Prove the options on measures, before anything is done.

    Raises:
        CliError: One is wrong, or for another task.
    """
    others = ("class_weights",) * (task != "classification") + ("score", "forgetting") * (task != LANGUAGE)
    for name in others:
        if getattr(settings, name):
            raise CliError(f"--{name.replace('_', '-')} is not for {task}; leave it out.")
    scorer(settings.score, settings.answer_pattern)
    if settings.forgetting and not settings.forgetting.is_file():
        raise CliError(f"--forgetting: no file {settings.forgetting}; expected a text.")


def problem_of(row: Row) -> str:
    """What is to be said of a row, by its labels."""
    labels = row["labels"]
    if isinstance(labels, Sequence):
        return MANY_CLASSES if isinstance(labels[0], float) else LANGUAGE
    return NUMBER if isinstance(labels, float) else ONE_CLASS


def class_weights(labels: Sequence[int], classes: int) -> Tensor:
    """The weight of each class in the loss so that all count alike, `[classes]`: its mean over the rows is 1."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes)
    return counts.sum() / (classes * counts.clamp(min=1))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode and without gradients; its mode comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def predicted(model: nn.Module, tokenizer: Any, rows: Sequence[Row], batch_size: int, device: torch.device) -> Tensor:
    """The logits of each row, in order, float32 `[rows, classes]`, on the CPU, of a classifier in eval mode."""
    places, parts = [], []
    for batch_places, batch in _batches(rows, tokenizer, batch_size, device):
        places += batch_places
        parts.append(logits_of(model, batch).float().cpu())
    return torch.cat(parts)[torch.tensor(places).argsort()]


def class_numbers(logits: Tensor, labels: Tensor, baseline: Tensor) -> tuple[dict[str, float], Tensor]:
    """What is measured where each row has one class: numbers, and the confusion matrix `[classes, classes]`.

    Args:
        logits: `[rows, classes]`.
        labels: the class of each row.
        baseline: those of the training rows.
    """
    metrics = require("sklearn.metrics")
    classes, said = logits.shape[1], logits.argmax(-1)
    majority = int(torch.bincount(baseline, minlength=classes).argmax())
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of rows that are all of one class
        numbers = {
            "loss": float(nn.functional.cross_entropy(logits, labels)),
            "accuracy": metrics.accuracy_score(labels, said),
            "macro_f1": metrics.f1_score(labels, said, average="macro", zero_division=0),
            "mcc": metrics.matthews_corrcoef(labels, said),
            "majority_accuracy": float((labels == majority).double().mean()),
        }
    return _plain(numbers), torch.from_numpy(metrics.confusion_matrix(labels, said, labels=range(classes)))


def many_class_numbers(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """What is measured where a row may have several classes, which are those of positive logits."""
    metrics = require("sklearn.metrics")
    truth, said = labels.int().numpy(), (logits > 0).int().numpy()
    return _plain(
        {
            "loss": float(nn.functional.binary_cross_entropy_with_logits(logits, labels)),
            "accuracy": metrics.accuracy_score(truth, said),
            "macro_f1": metrics.f1_score(truth, said, average="macro", zero_division=0),
            "micro_f1": metrics.f1_score(truth, said, average="micro", zero_division=0),
        }
    )


def number_numbers(values: Tensor, labels: Tensor, baseline: Tensor) -> dict[str, float]:
    """What is measured where each row has a number; a correlation with what never changes is given as 0."""
    stats = require("scipy.stats")
    loss, varies = float((values - labels).square().mean()), bool(values.std() > 0) and bool(labels.std() > 0)
    return _plain(
        {
            "loss": loss,
            "rmse": math.sqrt(loss),
            "pearson": stats.pearsonr(values, labels).statistic if varies else 0.0,
            "spearman": stats.spearmanr(values, labels).statistic if varies else 0.0,
            "mean_rmse": float((labels - baseline.mean()).square().mean().sqrt()),
        }
    )


def confusion_rows(classes: Sequence[str], confusion: Sequence[Sequence[int]]) -> list[tuple[str, ...]]:
    """A confusion matrix as the rows of a table."""
    rows = [(name, *map(str, line)) for name, line in zip(classes, confusion, strict=True)]
    return [("class", *classes), *rows]


def sample_lines(parts: dict[str, str]) -> list[str]:
    """What belongs to a sample, each part on one line behind its name."""
    return [f"  {name:9}  {shortened(text) or '(nothing)'}" for name, text in parts.items()]


def shortened(text: str, most: int = 240) -> str:
    """A text on one line, of a long one the begin and the end."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def _of_classifier(model: nn.Module, task: Any, settings: Settings, device: torch.device) -> Measures:
    logits = predicted(model, task.tokenizer, task.eval, settings.batch_size, device)
    labels, baseline = (torch.tensor([row["labels"] for row in rows]) for rows in (task.eval, task.train or task.eval))
    problem = problem_of(task.eval[0])
    if problem == MANY_CLASSES:
        return Measures(many_class_numbers(logits, labels))
    if problem == NUMBER:
        return Measures(number_numbers(logits.view(-1).double(), labels.double(), baseline.double()))
    numbers, confusion = class_numbers(logits, labels, baseline)
    names = tuple(str(model.config.id2label[i]) for i in range(logits.shape[1]))
    return Measures(numbers, names, tuple(map(tuple, confusion.tolist())))


def _of_language_model(model: nn.Module, task: Any, settings: Settings, device: torch.device) -> Measures:
    loss, right = _of_tokens(model, task.tokenizer, task.eval, settings.batch_size, device)
    numbers = {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": right}
    samples = _samples(model, task, settings)
    if settings.score:
        name = "exact_match" if settings.score == "exact" else "score"
        numbers[name] = sum(sample.score for sample in samples) / len(samples)
    if settings.forgetting:
        length = min(getattr(task, "max_length", None) or BLOCK, BLOCK)
        with failing_in_words():
            tokens = task.tokenizer(settings.forgetting.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        blocks = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        rows = [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]
        if not rows:
            raise CliError(f"--forgetting {settings.forgetting}: expected a text, got no two tokens.")
        loss, _ = _of_tokens(model, task.tokenizer, rows, settings.batch_size, device)
        numbers["forgetting_perplexity"] = perplexity(loss)
    return Measures(numbers, samples=samples)


def _of_tokens(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], batch_size: int, device: torch.device
) -> tuple[float, float]:
    """The mean loss over all tokens with labels, and the share of them that the model gives the highest probability."""
    loss, right, count = 0.0, 0, 0
    for places, batch in _batches(rows, tokenizer, batch_size, device):
        width = batch["input_ids"].shape[1]
        labels = torch.tensor([[*rows[i]["labels"], *[IGNORED] * (width - len(rows[i]["labels"]))] for i in places])[:, 1:]
        kept = labels != IGNORED
        logits, labels = logits_of(model, batch)[:, :-1][kept.to(device)].float(), labels[kept].to(device)
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        count += labels.numel()
    return loss / max(1, count), right / max(1, count)


def _samples(model: nn.Module, task: Any, settings: Settings) -> tuple[Sample, ...]:
    """What the model generates for held-out rows: as many as are scored, or as are shown; the same ones at each call."""
    score, most = scorer(settings.score, settings.answer_pattern), settings.score_rows if settings.score else SHOWN_SAMPLES
    prompts = [prompt for prompt in map(prompt_of, task.eval) if prompt is not None]
    if score is not None and not prompts:
        raise CliError("--score: the rows have no prompts to generate from; expected prompts with completions, or conversations.")
    prompts = random.Random(settings.seed).sample(prompts, min(most, len(prompts)))
    at_once = 4 * settings.batch_size  # nothing is kept for gradients
    texts = generate(model, task.tokenizer, [tokens for tokens, _ in prompts], settings.max_new_tokens, at_once)
    samples = []
    for (tokens, reference), text in zip(prompts, texts, strict=True):
        said = (task.tokenizer.decode(part, skip_special_tokens=True) for part in (tokens, reference))
        sample = Sample(*said, text)
        scored = {} if score is None else {"score": proven_score(score, settings.score, sample)}
        samples.append(dataclasses.replace(sample, **scored))
    return tuple(samples)


def _batches(
    rows: Sequence[Row], tokenizer: Any, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Where the rows of each batch stand among all, and the batch without labels; rows of similar length share one."""
    names = [name for name in ("input_ids", "token_type_ids") if name in rows[0]]
    for places in _groups([len(row["input_ids"]) for row in rows], batch_size):
        batch = tokenizer.pad(
            {name: [list(rows[i][name]) for i in places] for name in names}, padding_side="right", return_tensors="pt"
        )
        yield places, {name: value.to(device) for name, value in batch.items()}


def _groups(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Places of rows of similar length, at most a batch, and no more tokens than whose logits fit into memory."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) == batch_size or (len(group) + 1) * lengths[place] > MOST_TOKENS):
            yield group
            group = []
        group.append(place)
    yield group


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a model, Hugging Face's or a plain one, makes of a batch, whose labels it does not see."""
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    return output if isinstance(output, Tensor) else output.logits


def perplexity(loss: float) -> float:
    """The perplexity of a mean loss, finite for any."""
    return math.exp(min(loss, 700.0))


def _plain(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in numbers.items()}
