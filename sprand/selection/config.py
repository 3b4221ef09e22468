"""`SparseConfig`: what to train, how much of it, and how it is chosen. Validated when made, to and from JSON."""

from __future__ import annotations

import dataclasses
import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from . import pattern, rules
from .pattern import GIVEN

AS_GIVEN = {  # the fields of a pattern that is known by its indices alone
    "strategy": GIVEN, "strategy_options": None, "density": None, "budget": None, "layout": "unstructured", "scope": "local",
    "min_density": 0.0, "max_density": 1.0, "preserve_zeros": False, "score_steps": None,
}  # fmt: skip
SPARTA_TARGETS = ("v_proj", "o_proj")
SPEFT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True, eq=False)
class SparseConfig:
    """Configuration of `sprand.apply`.

    Attributes:
        density: fraction of the entries of the targeted weights that train, in (0, 1].
        budget: instead of density: an int is the exact number of trained entries (see `layout` for whole columns), a float
            the fraction of all model parameters (those of `modules_to_save` not counted).
        target_modules: modules whose `weight` is targeted: names or suffixes of names, one regular expression (a str,
            matched in full), or `"all-linear"` (every linear layer but the output head). None with `target_parameters`.
        exclude_modules: modules left out again: names or suffixes, or one regular expression.
        modules_to_save: modules trained in full and saved with the adapter: names or suffixes; `"auto"` takes a
            classification head named `score` or `classifier` if there is one, and the layers that the checkpoint lacks
            from which transformers has loaded the model (a pooler), since they start from random values as well.
        target_parameters: further weights by parameter name or suffix: embeddings, biases, norms, 3-D experts.
        strategy: `"random"` (stratified), `"uniform"`; by the largest scores (w weight, g gradient of the loss over
            calibration data): `"magnitude"` |w|, `"gradient"` |g|, `"snip"` |wg|, `"force"` -wg, `"taylor_fo"` (wg)^2,
            `"fisher"` mean over examples of g^2, `"grasp"` -(Hg)w, `"synflow"`, `"lift"` and `"off_principal"` (no data); of
            columns alone, for linear layers, with no gradient of a weight: `"activation"` the sum over tokens of the squared
            input (a forward pass over the data), `"token_fisher"` the same times the token's squared gradient at the output; a
            callable
            `score(name, weight, stats)` (see `sprand.selection.strategies.Stats`); or
            `{parameter name: bool mask or flat indices}`.
        strategy_options: options of the strategy: `{"temperature": 200.0}` for `"grasp"`, `{"rank": 128}` for `"lift"` and
            `"off_principal"`.
        layout: what is chosen as a whole. `"unstructured"`: single entries. `"columns"`: of a linear weight `[out, in]` an input
            column, all `out` entries of it; of Hugging Face's `Conv1D` the row of an input; of a convolution an input channel
            (in a weight of groups as it is stored); of an embedding a feature; of any other tensor single entries. Every
            strategy chooses columns: by the sum of the scores of their entries, or of the squares where a score is the size of
            a signed number (`"magnitude"`, `"gradient"`, `"taylor_fo"`, `"lift"`; a callable with an attribute `squares` that is
            true). Each target's count is whole columns: together they are the asked number of entries, or less by less than one
            of them.
        scope: `"local"`: each target gets its share of the entries, at least one column; `"global"`: the largest scores of all
            targets, of columns by the mean over their entries, since they differ in size; some targets may get none.
        min_density: least fraction of the entries of each target, for `scope="global"`.
        max_density: largest fraction of the entries of each target, for `scope="global"`.
        preserve_zeros: choose among entries that are not zero, so that a pruned model keeps its zeros; densities are then
            fractions of those. Not with whole columns, which may have zeros in them.
        seed: of the random draw.
        score_steps: for `"token_fisher"` without data: how many steps of training, the first ones, sum the gradients that choose
            columns; nothing trains in these. None is 8.

    Raises:
        ValueError: A value is outside of what is allowed; the message names it and what was expected.
    """

    density: float | None = None
    budget: int | float | None = None
    target_modules: str | Sequence[str] | None = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    strategy: str | Mapping[str, Tensor] | Callable[..., Tensor] = "random"
    strategy_options: Mapping[str, Any] | None = None
    layout: str = "unstructured"
    scope: str = "local"
    min_density: float = 0.0
    max_density: float = 1.0
    preserve_zeros: bool = False
    seed: int = 0
    score_steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in rules.normalized(vars(self)).items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal; masks and indices are, where they choose the same entries."""
        if other.__class__ is not self.__class__:
            return NotImplemented
        if self._key() != other._key() or self.strategy_options != other.strategy_options:
            return False
        return not isinstance(self.strategy, Mapping) or pattern.same_entries(self.strategy, other.strategy)

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        """The fields, with names alone in place of masks and of options; a budget of 1 entry is not one of 1.0, all of them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("strategy", "strategy_options"):
            if isinstance(fields[name], Mapping):
                fields[name] = frozenset(fields[name])
        return type(self.budget), *fields.values()

    @classmethod
    def sparta(cls, sparsity: float = 0.99, **fields: Any) -> SparseConfig:
        """The recipe of SpaRTA (arXiv 2502.15975): random entries of the value and output projections.

        The budget is the fraction `1 - sparsity` of the whole model; a classification head trains in full.

        Args:
            sparsity: fraction of the model's parameters that stay frozen, in [0, 1).
            **fields: any field of `SparseConfig`, for example `target_modules` for a model with other names.

        Raises:
            ValueError: `sparsity` is outside of [0, 1), or another field is out of range.
        """
        if not isinstance(sparsity, numbers.Real) or not 0 <= sparsity < 1:
            raise ValueError(f"sparsity: expected a fraction in [0, 1), got {sparsity!r}")
        return cls(**{"budget": 1.0 - sparsity, "target_modules": SPARTA_TARGETS, "modules_to_save": "auto"} | fields)

    @classmethod
    def speft(cls, density: float = 0.01, **fields: Any) -> SparseConfig:
        """The recipe of SPEFT (arXiv 2412.13488): the entries of the attention projections with the largest mean gradient.

        They are chosen once, over all layers together; `apply` and `select` need data for it (the paper: 1,024 examples).

        Args:
            density: fraction of the entries of the targeted weights.
            **fields: any field of `SparseConfig`, for example `budget`, or `target_modules` for a model with other names.

        Raises:
            ValueError: A field is out of range.
        """
        amount = {} if "budget" in fields else {"density": density}
        return cls(**amount | {"strategy": "gradient", "scope": "global", "target_modules": SPEFT_TARGETS} | fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; masks and callables are named, not stored (the adapter holds their indices)."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {} if isinstance(self.strategy, str) else AS_GIVEN
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def to_json(self) -> str:
        """The configuration as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SparseConfig:
        """The configuration of which `to_dict` gave the fields.

        Args:
            fields: JSON types by field name.

        Raises:
            ValueError: A field is unknown, or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(
                f"config: unknown field {', '.join(unknown)}; expected some of {', '.join(sorted(known))} (a newer sprand?)"
            )
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> SparseConfig:
        """The configuration of which `to_json` gave the text.

        Args:
            text: a JSON object.

        Raises:
            ValueError: The text is no JSON object, a field is unknown, or a value is out of range.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"config: expected a JSON object, got {type(fields).__name__}")
        return cls.from_dict(fields)
