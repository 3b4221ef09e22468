"""`SprandConfig`: sparse scalar fine-tuning as a PEFT method, next to `LoraConfig` and the rest."""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from torch import Tensor

from ..adapters.file import CONFIG_FILE
from ..adapters.fingerprint import in_full
from ..adapters.layout import draw_of, in_short, portable
from ..files import described
from ..selection.config import GIVEN, SparseConfig
from ..selection.mask import Mask
from ..selection.old_runs import are_runs
from ..selection.pattern import RANDOM_STRATEGIES, same_entries
from ..selection.strategies import STRATEGIES
from ..selection.targets import HEADS
from .registration import NAME


@dataclass
class SprandConfig(PeftConfig):
    """Which scalar weights of a model train, as a PEFT config: `get_peft_model(model, SprandConfig(density=0.01))`.

    The same seed, density, layout and targets choose the same entries as `sprand.apply`.

    Attributes:
        density: fraction of the entries of the targeted weights that train, in (0, 1]; 0.01 if nothing else is given.
        budget: instead of density: an int is the exact number of trained entries, a float the fraction of all model parameters
            (those of `modules_to_save` not counted).
        target_modules: modules whose `weight` is targeted: a list of names or suffixes, one regular expression, or
            `"all-linear"` (every linear layer but the output head). None with `target_parameters` alone.
        exclude_modules: modules left out again: names or suffixes, or one regular expression.
        target_parameters: further weights by name or suffix: fused 3-D experts, embeddings, biases, norms.
        modules_to_save: modules trained in full and saved with the adapter; `"auto"` takes a classification head named `score` or
            `classifier` if there is one.
        layers_to_transform: of `target_modules` only those in layers with these numbers; an int or a list.
        layers_pattern: name of the list of layers, for `layers_to_transform`; by default any.
        strategy: `"random"` (stratified) or `"uniform"`; with layout `"columns"` also `"activation"`, which chooses them in the
            first forward in training mode, by what comes into the layers there, and `"token_fisher"`, by gradients of the first
            `score_steps` steps (see `sprand.choose`). Entries that were chosen by another score are given by `mask`.
        mask: the entries themselves: a `sprand.Mask`, a mapping `{parameter name: bool mask or flat indices}`, or the path
            of a mask file. They decide what is targeted, too; the adapter's file then stores the indices. Entries apart from
            those of other tasks are a mask as well, since a config sees no model: `sprand.select(base, disjoint=[...])`.
        layout: how random positions may fall: `"unstructured"`, or `"columns"`: whole input columns of linear weights, as in
            `SparseConfig`.
        seed: of the random draw. None takes a new one now, so that whoever copies this config draws the same entries.
        score_steps: as in `SparseConfig`.
        targets: written by `save_pretrained`: shape, count and a fingerprint of the base by parameter name.
        indices_saved: written by `save_pretrained`: whether the indices are in the file, or follow from the seed.
        selection: written by `save_pretrained`: how entries were chosen that do not follow from the seed.
        architecture: written by `save_pretrained`: the model's classes of transformers, and what its head means.
        sparse_config: written by `sprand.save`: what `SparseConfig` says otherwise, or alone.
        versions: written by both: of the format, of the draw, and of sprand.

    Raises:
        ValueError: a value outside of what is allowed, named with what was expected.
    """

    density: float | None = field(default=None, metadata={"help": "Fraction of the targeted entries that train."})
    budget: int | float | None = field(default=None, metadata={"help": "Number of trained entries, or fraction of all."})
    target_modules: list[str] | str | None = field(default="all-linear", metadata={"help": "Modules whose weight trains."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules left out."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Further weights by parameter name."})
    modules_to_save: list[str] | str | None = field(default=None, metadata={"help": "Modules trained in full."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of the layers to use."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    strategy: str = field(default="random", metadata={"help": "'random' or 'uniform'; a mask for everything else."})
    mask: str | None = field(default=None, metadata={"help": "A sprand.Mask, a mapping of indices, or a mask file."})
    layout: str = field(default="unstructured", metadata={"help": "How random positions may fall."})
    seed: int | None = field(default=0, metadata={"help": "Seed of the random draw; None takes a new one."})
    score_steps: int | None = field(default=None, metadata={"help": "First steps whose gradients choose columns; 8."})
    targets: dict | None = field(default=None, metadata={"help": "Written by save_pretrained."})
    indices_saved: bool = field(default=False, metadata={"help": "Written by save_pretrained."})
    selection: dict | None = field(default=None, metadata={"help": "Written by save_pretrained."})
    architecture: dict | None = field(default=None, metadata={"help": "Written by save_pretrained."})
    sparse_config: dict | None = field(default=None, metadata={"help": "Written by sprand.save."})
    untrained: list[str] | None = field(default=None, metadata={"help": "Written by sprand.save."})
    versions: dict | None = field(default=None, metadata={"help": "Written by save_pretrained."})

    def __post_init__(self) -> None:
        super().__post_init__()
        from peft import PeftType

        self.peft_type = PeftType[NAME]
        self.indices: dict[str, Tensor] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.saved: dict[str, Any] = {}  # what a saved adapter says otherwise
        if self.seed is None:
            self.seed = secrets.randbits(31)
        if isinstance(self.target_modules, tuple):
            self.target_modules = list(self.target_modules)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = "all-linear"
        if isinstance(self.target_parameters, str):
            self.target_parameters = [self.target_parameters]
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = list(HEADS) if self.modules_to_save == "auto" else [self.modules_to_save]
        if self.targets is not None:
            self.targets = in_full(self.targets)
            return
        self._check_targets()
        if self.mask is not None:
            self._take_mask()
        elif self.strategy not in RANDOM_STRATEGIES and not self._can_wait():
            self._refuse_strategy()
        else:
            names = ("density", "budget", "layout", "seed", "strategy", "score_steps")
            self.density = SparseConfig(**{name: getattr(self, name) for name in names}).density

    def _check_targets(self) -> None:
        layers = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform or []
        if any(not isinstance(number, int) or number < 0 for number in layers):
            raise ValueError(f"layers_to_transform: expected numbers of layers from 0 on, got {self.layers_to_transform!r}")
        if self.layers_pattern and not layers:
            raise ValueError(
                f"layers_pattern: {self.layers_pattern!r} says where layers are numbered; give their numbers, too, as "
                "layers_to_transform, or leave it out"
            )
        if layers and (self.target_modules is None or self.mask is not None):
            raise ValueError(
                "layers_to_transform: it chooses among target_modules, and there are none beside a mask or target_parameters "
                "alone; leave it out, or name target_modules"
            )

    def _take_mask(self) -> None:
        given = self.mask
        if isinstance(given, (str, os.PathLike)):
            self.mask, given = str(given), Mask.load(given)
        else:
            self.mask = None
        if not isinstance(given, Mapping) or not given:
            raise ValueError(f"mask: expected a sprand.Mask, a mapping of indices, or a file, got {type(given).__name__}")
        if self.density is not None or self.budget is not None or self.layout != "unstructured":
            raise ValueError("mask: it fixes which entries train; leave out density, budget and layout")
        self.indices, self.shapes = dict(given), dict(getattr(given, "shapes", {}))
        self.selection = getattr(given, "selection", None)
        if self.strategy in (*RANDOM_STRATEGIES, GIVEN):
            self.strategy = (self.selection or {}).get("strategy", GIVEN)

    def _can_wait(self) -> bool:
        """Whether training can choose by the strategy."""
        return self.strategy in STRATEGIES and STRATEGIES[self.strategy].columns

    def _refuse_strategy(self) -> None:
        if self.strategy in STRATEGIES or self.strategy == GIVEN:
            layout = "" if self.layout == "unstructured" else f", layout={self.layout!r}"
            raise ValueError(
                f"strategy: {self.strategy!r} chooses entries by looking at the model, which a config cannot; choose them first, "
                f"mask = sprand.select(model, strategy={self.strategy!r}{layout}, density=0.01, data=batches), and pass "
                "SprandConfig(mask=mask), or the path of a file written by mask.save(path)"
            )
        raise ValueError(
            f"strategy: expected one of {', '.join((*RANDOM_STRATEGIES, *STRATEGIES))}, got {self.strategy!r} "
            "(all but the first two need a mask)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, without the path of anything on this machine: a local base is named by its folder."""
        fields = super().to_dict() | self.saved
        fields["base_model_name_or_path"] = portable(self.base_model_name_or_path)
        return fields if fields["targets"] is None else fields | {"mask": None}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, as in PEFT, in one step and with a line for each target."""
        super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory) / CONFIG_FILE
        settings = described.read_json(file)
        described.write_json(file, settings if settings["targets"] is None else in_short(settings))

    @property
    def drawn(self) -> bool:
        """Whether the entries follow from the seed."""
        return self.indices is None and not self.indices_saved and not self._can_wait() and not are_runs(self.layout)

    @property
    def waits(self) -> bool:
        """Whether the entries of a new adapter are chosen while the model trains."""
        return self.targets is None and self.indices is None and self._can_wait()

    @property
    def draw(self) -> Tensor | None:
        """What the file says of how the entries were drawn; None where they were not."""
        in_runs = are_runs(self.layout) and not self.indices_saved
        return draw_of(self.strategy, self.layout, self.seed) if self.drawn or in_runs else None

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal, and the masks choose the same entries."""
        if other.__class__ is not self.__class__:
            return NotImplemented
        if any(getattr(self, entry.name) != getattr(other, entry.name) for entry in fields(self)):
            return False
        return same_entries(self.indices or {}, other.indices or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> SprandConfig:
        """A copy that shares the indices, which nobody changes."""
        result = copy.copy(self)
        result.__dict__.update(
            {key: value if key == "indices" else copy.deepcopy(value, memo) for key, value in vars(self).items()}
        )
        return result
