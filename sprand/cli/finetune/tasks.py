"""The two tasks: how rows become tokens and batches, what the loss is, and what is measured."""

from __future__ import annotations

import abc
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import CliError
from .data import Dataset
from .encoding import Encoder, about, about_lengths
from .generation import IGNORED
from .labels import counted, counts_in_words
from .measures import class_weights, logits_of, perplexity
from .rows import Example, Rows, batched, limited, stored
from .settings import CLASSIFIERS, DEFAULT_LENGTH, Settings
from .tables import listed

Batch = dict[str, Tensor]


def padded(rows: Sequence[list[int]], width: int, filler: int) -> Tensor:
    """Rows filled up to a width, int64 `[rows, width]`."""
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


class Task(abc.ABC):
    """What both tasks share.

    Attributes:
        train, eval: tokenised rows, dicts with `input_ids` and `labels`.
        max_length: the most tokens of a row.
        kind: what a training row is: "texts" or "pairs" of them, or as `Encoder.kind` says.
        said: what there is to say of the data before training, a line each.
        metric: name of what `evaluate` measures beside the loss.
        higher_is_better: its direction.
    """

    metric = ""
    higher_is_better = True
    kind = "texts"

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.class_weights: Tensor | None = None
        self.train: Sequence[dict[str, Any]] = []
        self.eval: Sequence[dict[str, Any]] = []
        self.said: list[str] = []

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Pad rows to the longest: `input_ids`, `attention_mask` [rows, tokens], `labels`."""
        tokens = [row["input_ids"] for row in rows]
        width = max(map(len, tokens))
        batch = {
            "input_ids": padded(tokens, width, self.tokenizer.pad_token_id or 0),
            "attention_mask": padded([[1] * len(row) for row in tokens], width, 0),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = padded([row["token_type_ids"] for row in rows], width, 0)
        return batch | {"labels": self._labels(rows, width)}

    def terms(self, batch: Batch) -> int:
        """How many predictions the loss of a batch is taken of."""
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int, int]:
        """Of a batch: the summed loss, how many terms it sums, and how many predictions were right."""
        logits, labels = self._predicted(model, batch)
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        total = self._losses(logits.float(), labels, weights).sum()
        return total, self.terms(batch), int(self._right(logits, labels).sum())

    def evaluate(self, model: nn.Module, batch_size: int, device: torch.device) -> dict[str, float]:
        """The mean loss and the metric over the evaluation rows, of the model in eval mode."""
        return self.measured(*self.outcomes(model, batch_size, device))

    def measured(self, losses: Tensor, terms: Tensor, right: Tensor) -> dict[str, float]:
        """The mean loss and the metric of what `outcomes` returns."""
        count = max(1.0, float(terms.sum()))
        mean = float(losses.sum()) / count
        return {"loss": mean, self.metric: self._metric(mean, float(right.sum()) / max(1, len(right)))}

    @torch.no_grad()
    def outcomes(self, model: nn.Module, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of each evaluation row, in order: the summed loss, how many terms it sums, how many predictions were right.

        Returns:
            Three tensors [rows], float64, on the CPU; the model is in eval mode meanwhile.
        """
        training = model.training
        model.eval()
        order = sorted(range(len(self.eval)), key=lambda i: len(self.eval[i]["input_ids"]))
        parts = torch.zeros(3, len(order), dtype=torch.float64)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = self.collate([self.eval[i] for i in places])
            parts[:, places] = self.sums(model, {name: value.to(device) for name, value in batch.items()}).cpu().double().T
        model.train(training)
        return parts[0], parts[1], parts[2]

    def sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of each row of a batch: the summed loss, how many terms it sums, how many predictions were right; float32 [rows, 3]."""
        logits, labels = self._predicted(model, batch)
        rows = len(batch["labels"])
        parts = (self._losses(logits.float(), labels), labels != IGNORED, self._right(logits, labels))
        return torch.stack([part.view(rows, -1).float().sum(1) for part in parts], 1)

    def _predicted(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._aligned(logits_of(model, batch), batch["labels"])

    def _losses(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of each term, those of classes weighted."""
        return nn.functional.cross_entropy(logits, labels, weights, ignore_index=IGNORED, reduction="none")

    def _right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Whether each prediction is right."""
        return logits.argmax(-1) == labels

    @abc.abstractmethod
    def _labels(self, rows: Sequence[dict[str, Any]], width: int) -> Tensor:
        """The labels of a batch padded to a width."""

    @abc.abstractmethod
    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [terms, classes] and the labels [terms] they predict."""

    @abc.abstractmethod
    def _metric(self, loss: float, right: float) -> float:
        """The metric, of the mean loss and the share of right predictions."""


class Classification(Task):
    """One class per text or pair of texts; the metric is accuracy."""

    metric = "accuracy"

    def __init__(self, data: Dataset, tokenizer: Any, max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        self._number = {name: i for i, name in enumerate(data.labels)}
        self._long = 0
        self.train, self.eval = (_encoded(part, self._rows) for part in (data.train, data.eval))
        self.kind = "pairs" if data.train and data.train[0].text2 is not None else "texts"
        self.said = self._about(data)
        if self._long:
            total = len(self.train) + len(self.eval)
            self.said.append(f"{self._long:,} of {total:,} texts are longer than {max_length:,} tokens, and lose their end")

    def _rows(self, examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
        texts = [[example.text for example in examples]]
        is_pair = examples[0].text2 is not None
        if is_pair:
            texts.append([example.text2 for example in examples])
        lengths = map(len, self.tokenizer(*texts, verbose=False)["input_ids"])
        self._long += sum(length > self.max_length for length in lengths)
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        names = ["input_ids"] + ["token_type_ids"] * (is_pair and "token_type_ids" in encoded)
        for i, example in enumerate(examples):
            yield {name: encoded[name][i] for name in names} | {"labels": self._label(example)}

    def _about(self, data: Dataset) -> list[str]:
        """What there is to say of the labels of the training rows."""
        counts = counted(data.train)
        return [counts_in_words({name: counts[name] for name in data.labels})]

    def _label(self, example: Example) -> Any:
        """What a row is to be given."""
        return self._number[str(example.label)]

    def _labels(self, rows: Sequence[dict[str, Any]], width: int) -> Tensor:
        return torch.tensor([row["labels"] for row in rows])

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits, labels

    def _metric(self, loss: float, right: float) -> float:
        return right


class MultiLabel(Classification):
    """Any number of classes per text or pair of texts; a row is right where all of them are."""

    def _label(self, example: Example) -> list[float]:
        return [float(name in example.labels) for name in self._number]

    def _losses(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")

    def _right(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ((logits > 0) == labels.bool()).all(-1)


class Regression(Classification):
    """A number per text or pair of texts; the metric is the root of the mean squared error."""

    metric = "rmse"
    higher_is_better = False

    def _about(self, data: Dataset) -> list[str]:
        numbers = torch.tensor([float(example.label) for example in data.train or data.eval], dtype=torch.float64)
        return [f"numbers of the training rows: {numbers.min():g} to {numbers.max():g}, mean {numbers.mean():g}"]

    def _label(self, example: Example) -> float:
        return float(example.label)

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits[:, 0], labels

    def _losses(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        return nn.functional.mse_loss(logits, labels, reduction="none")

    def _right(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits == labels

    def _metric(self, loss: float, right: float) -> float:
        return math.sqrt(loss)


class CausalLM(Task):
    """The next token: of whole texts cut in blocks, or of completions after their prompts; the metric is perplexity."""

    metric = "perplexity"
    higher_is_better = False

    def __init__(self, data: Dataset, tokenizer: Any, max_length: int, chat: bool = False, drop_long: bool = False) -> None:
        super().__init__(tokenizer, max_length)
        encoders = [Encoder(tokenizer, max_length, chat, drop_long) for _ in range(2)]
        parts = zip((data.train, data.eval), encoders, strict=True)
        self.train, self.eval = (_encoded(part, encode) for part, encode in parts)
        for rows, encode in zip((self.train, self.eval), encoders, strict=True):
            if not rows and encode.counts["texts"]:
                raise CliError("The data hold no two tokens in a row to learn from; is this the right file and column?")
            if not rows:
                raise CliError(f"No row holds an answer to learn within {max_length:,} tokens (--max-length).")
        self.kind = encoders[0].kind(data.train[0])
        self.said = [about(encoders[0].counts, bool(tokenizer.chat_template))]
        for part, encode in zip(("training", "held-out"), encoders, strict=True):
            self.said += about_lengths(encode.counts, max_length, part)

    def _labels(self, rows: Sequence[dict[str, Any]], width: int) -> Tensor:
        return padded([row["labels"] for row in rows], width, IGNORED)

    def terms(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()

    def _metric(self, loss: float, right: float) -> float:
        return perplexity(loss)


def make(data: Dataset, tokenizer: Any, settings: Settings) -> Task:
    """The task that a data set is for, with its rows tokenised, and no more of them than asked for.

    Raises:
        CliError: The rows cannot be used with this model.
    """
    max_length = _max_length(tokenizer, settings)
    if data.task in CLASSIFIERS:
        kinds = zip(CLASSIFIERS, (Classification, MultiLabel, Regression), strict=True)
        task: Task = dict(kinds)[data.task](data, tokenizer, max_length)
    else:
        task = CausalLM(data, tokenizer, max_length, settings.chat, settings.long_rows == "drop")
    if data.unused:
        task.said.append(f"not read: the columns {listed(data.unused)}")
    if settings.class_weights:
        task.class_weights = class_weights([row["labels"] for row in task.train], len(data.labels))
    source = random.Random(settings.seed)
    task.train = limited(task.train, settings.limit_train, source)
    task.eval = limited(task.eval, settings.limit_eval, source)
    return task


def _max_length(tokenizer: Any, settings: Settings) -> int:
    """The most tokens of a row: as asked for, or what the model and habit allow.

    Raises:
        CliError: The model has fewer positions than asked for.
    """
    positions = tokenizer.model_max_length  # as `models.load` found them
    if settings.max_length is not None and settings.max_length > positions:
        raise CliError(f"--max-length: this model has {positions:,} positions, got {settings.max_length:,}.")
    return settings.max_length or min(positions, DEFAULT_LENGTH)


def _encoded(
    examples: Sequence[Example], encode: Callable[[Sequence[Example]], Iterator[dict[str, Any]]]
) -> Sequence[dict[str, Any]]:
    """The rows of examples: in a list as they are, or in a file where they come from one."""
    rows = itertools.chain.from_iterable(encode(batch) for batch in batched(examples))
    return stored(rows) if isinstance(examples, Rows) else list(rows)
