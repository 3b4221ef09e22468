"""What one `sprand finetune` run is asked to do, checked, and the learning rates of what it is compared to."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...training.rates import of_narrow, two_digits
from .. import CliError
from ..parser import option_of

CLASSIFIERS = ("classification", "multi-label", "regression")
TASKS = ("auto", *CLASSIFIERS, "causal-lm")
POOLINGS = ("auto", "mean", "model")
COMPARABLE = ("lora", "full", "head")
SCHEDULES = ("linear", "cosine", "constant")
LONG_ROWS = ("cut", "drop")
DEFAULT_LENGTH = 1024  # as TRL has it
DTYPES = ("auto", "float32", "bfloat16")
CLASS_WEIGHTS = ("balanced",)
OF_TRAINING = ("mask", "start", "push_to_hub", "resume", "compare", "compare_lr", "budget", "sparta")

FIXED_BY_MASK = (
    "density", "budget", "target_modules", "target_parameters", "strategy", "strategy_option", "scope", "preserve_zeros",
    "layout", "sparta",
)  # fmt: skip
POSITIVE = (
    "lr", "epochs", "max_steps", "batch_size", "grad_accumulation", "max_length", "max_grad_norm", "eval_every",
    "checkpoint_every", "keep", "patience", "limit_train", "limit_eval", "calibration_examples", "score_rows", "max_new_tokens",
)  # fmt: skip
PEER_RATES = {"lora": 3e-3, "full": 2e-4, "head": 1e-2}  # of models 384 to WIDE wide
WIDE = 576  # beyond that nothing was measured


class Resume(enum.Enum):
    """Which checkpoint a run goes on from, where no file is named."""

    NEWEST = "newest"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of `sprand finetune`, which `sprand finetune --help-all` explains; for `sprand select` the data may be None."""

    model: str
    train: Path | tuple[str, ...] | None
    out: Path
    eval: Path | tuple[str, ...] | None = None
    task: str = "auto"
    text_column: str | None = None
    text2_column: str | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    chat: bool = False
    long_rows: str = "cut"
    eval_share: float = 0.1
    limit_train: int | None = None
    limit_eval: int | None = None
    density: float | None = None
    budget: str | None = None
    target_modules: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    strategy: str = "random"
    strategy_option: tuple[tuple[str, float], ...] = ()
    scope: str = "local"
    preserve_zeros: bool = False
    disjoint: tuple[str, ...] = ()
    mask: Path | None = None
    start: Path | None = None
    calibration_examples: int = 1024
    calibration_memory: str = "auto"
    layout: str = "unstructured"
    sparta: bool = False
    pooling: str = "auto"
    lr: float | None = None
    schedule: str = "linear"
    warmup: float = 0.06
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 32
    grad_accumulation: int = 1
    max_length: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    device: str = "auto"
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    best: bool = False
    patience: int | None = None
    packing: bool = False
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = ()
    trainer: tuple[tuple[str, str], ...] = ()
    push_to_hub: str | None = None
    overwrite: bool = False
    resume: Path | Resume | None = None
    compare: tuple[str, ...] = ()
    compare_lr: tuple[tuple[str, float], ...] = ()
    verify: bool = False
    class_weights: str | None = None
    score: str | None = None
    answer_pattern: str | None = None
    score_rows: int = 100
    max_new_tokens: int = 64
    forgetting: Path | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.sparta and self.budget is not None:
            raise CliError("--sparta: its count is --density of the whole model; leave out --budget.")
        for name in ("mask", "start"):
            if getattr(self, name) is not None:
                self._check_chosen(name)
        asked = (*self.compare, *dict(self.compare_lr))
        unknown = [name for name in asked if name not in COMPARABLE]
        if unknown:
            raise CliError(f"--compare: expected some of {', '.join(COMPARABLE)}, got {unknown[0]!r}.")
        if self.load_in_4bit and self.load_in_8bit:
            raise CliError("--load-in-4bit and --load-in-8bit: expected one of them, got both.")
        if self.bits and "full" in self.compare:
            raise CliError(f"--compare full: weights of {self.bits} bits cannot all train; compare with lora or head.")

    @property
    def bits(self) -> int | None:
        """How many bits the base's weights are packed to; None where they stay as they are."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def _check_numbers(self) -> None:
        given = {option_of(name): getattr(self, name) for name in POSITIVE if getattr(self, name) is not None}
        given |= {f"--compare-lr {name}": rate for name, rate in self.compare_lr}
        for option, value in given.items():
            if not math.isfinite(value) or value <= 0:
                raise CliError(f"{option}: expected a positive number, got {value}.")
        for option, value in {"--warmup": self.warmup, "--weight-decay": self.weight_decay}.items():
            if not math.isfinite(value) or value < 0:
                raise CliError(f"{option}: expected a number of at least 0, got {value}.")
        if not 0 < self.eval_share < 1:
            raise CliError(f"--eval-share: expected a fraction between 0 and 1, got {self.eval_share}.")
        if self.max_length is not None and self.max_length < 2:
            raise CliError(f"--max-length: expected at least 2 tokens, got {self.max_length}.")
        if not 0 <= self.seed < 2**63:
            raise CliError(f"--seed: expected a whole number from 0 up, got {self.seed}.")
        if self.calibration_memory != "auto" and not self.calibration_memory.isdecimal():
            raise CliError(f"--calibration-memory: expected auto or a number of bytes, got {self.calibration_memory!r}.")

    def _check_chosen(self, option: str) -> None:
        """Prove that nothing else says which entries train than the file, or the adapter, of this option."""
        fixed = (*FIXED_BY_MASK, "mask", "disjoint") if option == "start" else FIXED_BY_MASK
        own = {field.name: field.default for field in dataclasses.fields(self) if field.name in fixed}
        given = [name for name, default in own.items() if getattr(self, name) != default]
        if given:
            raise CliError(f"--{option}: it fixes which entries train; leave out {option_of(given[0])}.")
        if not getattr(self, option).exists():
            hint = "sprand select writes one" if option == "mask" else "expected the folder of an adapter, or of a run"
            raise CliError(f"--{option}: {getattr(self, option)} is not there; {hint}.")

    def sparse_fields(self) -> dict[str, Any]:
        """The fields of `SparseConfig` that the options ask for."""
        fields: dict[str, Any] = {
            "strategy": self.strategy,
            "strategy_options": dict(self.strategy_option) or None,
            "scope": self.scope,
            "preserve_zeros": self.preserve_zeros,
            "layout": self.layout,
            "seed": self.seed,
        }
        if self.target_modules:
            names = self.target_modules
            fields["target_modules"] = names[0] if names == ("all-linear",) else names
        if self.target_parameters:
            fields["target_parameters"] = self.target_parameters
        if self.budget is not None:
            fields["budget"] = _budget(self.budget)
        elif self.density is not None:
            fields["density"] = self.density
        return fields

    def to_json(self) -> dict[str, Any]:
        """The options as JSON types."""
        return {name: _json_value(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Settings:
        """The options that `to_json` gave, without those that only training asks; what another version has beside is left out."""
        fields = {field.name: field.type for field in dataclasses.fields(cls) if field.name not in OF_TRAINING}
        values = {name: value for name, value in said.items() if name in fields and value is not None}
        values = {
            name: Path(value) if "Path" in fields[name] and isinstance(value, str) else _from_json(value)
            for name, value in values.items()
        }
        return cls(**{"train": None} | values)


def _from_json(value: Any) -> Any:
    return tuple(map(_from_json, value)) if isinstance(value, list) else value


def _json_value(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _budget(text: str) -> int | float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise CliError(f"--budget: expected a count (5000) or a fraction of the model (0.01), got {text!r}.") from None


def peer_rate(method: str, width: int) -> float:
    """The learning rate of a compared method where none is given: `PEER_RATES`, more where narrow, less where wide."""
    return two_digits(PEER_RATES[method] * of_narrow(width) * WIDE / max(width, WIDE))
