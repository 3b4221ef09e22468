"""A question and its answer through a model's chat template: the loss is that of the answer, the end of its turn included."""

from __future__ import annotations

import importlib
import itertools
import json
import random
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sprand.cli.finetune.data import Dataset, limited
from sprand.cli.finetune.measures import logits_of
from sprand.cli.finetune.settings import Settings
from sprand.cli.finetune.tasks import IGNORED, Batch, CausalLM

REASONING_ROWS = {"dev": 256, "test": 256, "train": 3200}


class Chat(CausalLM):
    """Rows of at most `max_length` tokens, the first `limit_eval` of them held out.

    Args:
        data: text is what the user says, text2 what the assistant answers.
        tokenizer: with a chat template.
        settings: `max_length`, `limit_train`, `limit_eval` and `seed` are used.
    """

    def __init__(self, data: Dataset, tokenizer: Any, settings: Settings) -> None:
        super().__init__(data, tokenizer, settings.max_length, chat=True, drop_long=True)
        self.train = limited(self.train, settings.limit_train, random.Random(settings.seed))
        self.eval = self.eval[: settings.limit_eval]

    def _predicted(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """As of every language model, but without the logits before the first answer, which cost as much as many layers."""
        labels = batch["labels"][:, 1:]
        kept = (labels != IGNORED).any(0).nonzero()[:, 0]
        return logits_of(model, batch | {"logits_to_keep": kept}).flatten(0, 1), labels[:, kept].flatten()


def write_reasoning(name: str, folder: Path) -> None:
    """Rows of a task of `reasoning-gym`, no question twice: `train.jsonl`, `dev.jsonl` and `test.jsonl`.

    Raises:
        ModuleNotFoundError: `reasoning-gym` is not installed.
    """
    rows = importlib.import_module("reasoning_gym").create_dataset(name, size=2 * sum(REASONING_ROWS.values()), seed=0)
    asked = iter({row["question"]: str(row["answer"]) for row in rows}.items())
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in REASONING_ROWS.items():
        lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in itertools.islice(asked, count)]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
