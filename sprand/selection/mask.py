"""Masks: chosen entries by parameter name, how they were chosen, and their file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import described
from ..files.forms import NUMBER, SHAPE, TEXT, WHOLE, list_of, optional, record, simple, table_of
from ..layers.units import whole_units
from . import pattern
from .config import GIVEN, SparseConfig

FORMAT_VERSION, WITHOUT_COLUMNS = 2, 1  # of whole columns or rows, and of indices alone
KEY = "sprand_mask"
CHOOSING = (
    "density", "budget", "strategy", "strategy_options", "scope", "min_density", "max_density", "preserve_zeros",
)  # fmt: skip
_NAMED = {"name": TEXT, "checksum": TEXT}
_SELECTION = record(
    {"strategy": TEXT},
    {
        "density": optional(NUMBER),
        "budget": optional(NUMBER),
        "scope": TEXT,
        "seed": simple("an int", lambda value: type(value) is int),
        "layout": TEXT,
        "disjoint": list_of(record(_NAMED)),
    },
)
_COMBINED = record({"method": TEXT, "sources": list_of(record({"weight": NUMBER, "shared": WHOLE, **_NAMED}))})


def check_selection(place: str, value: Any) -> None:
    """The form of a record of how entries were chosen."""
    _SELECTION(place, value)
    if value["strategy"] == "combine":
        _COMBINED(place, value)


_AXIS = simple("0 or 1", lambda value: value in (0, 1) and type(value) is int)
FORM = record(
    {"format_version": WHOLE, "shapes": table_of(SHAPE)}, {"selection": optional(check_selection), "axes": table_of(_AXIS)}
)


class Mask(dict[str, Tensor]):
    """`{parameter name: indices [nnz]}`, flat, sorted, distinct: what `sprand.select` gives and `apply` takes as `strategy`.

    Attributes:
        shapes: shape of each parameter.
        selection: the fields of `SparseConfig` that chose the entries, as JSON types; None where they are not known.
    """

    def __init__(
        self, indices: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], selection: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(indices)
        self.shapes = {name: tuple(shapes[name]) for name in indices}
        self.selection = None if selection is None else dict(selection)

    def __eq__(self, other: object) -> bool:
        """Whether the other chooses the same entries of the same parameters, as a mask or as a dict."""
        return pattern.same_entries(self, other) if isinstance(other, Mapping) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    @property
    def nnz(self) -> int:
        """The number of chosen entries, of all parameters together."""
        return sum(indices.numel() for indices in self.values())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the mask to one safetensors file, in one atomic step: 4 bytes per entry, or per column of whole ones.

        Args:
            path: the file; one that is there is replaced.

        Returns:
            The file.

        Raises:
            OSError: The file cannot be written; one that was there is untouched.
        """
        tensors = {name: indices.cpu().contiguous() for name, indices in self.items()}
        units = {name: whole_units(self.shapes[name], indices) for name, indices in tensors.items()}
        whole = {name: found for name, found in units.items() if found is not None}
        tensors |= {name: chosen for name, (_, chosen) in whole.items()}
        description = {
            "format_version": FORMAT_VERSION if whole else WITHOUT_COLUMNS,
            **({"axes": {name: axis for name, (axis, _) in whole.items()}} if whole else {}),
            "selection": self.selection,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }
        described.write(Path(path), KEY, description, tensors)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read a file written by `save`, and prove that it is whole and its indices are distinct and in range.

        Args:
            path: the file.

        Returns:
            The mask.

        Raises:
            FileNotFoundError: No such file exists.
            ValueError: The file is damaged, no mask, or of a newer format.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no mask at {path}; expected a file written by sprand select or Mask.save")
        description, tensors = described.read(file, KEY, "mask", FORM)
        version, shapes, axes = description["format_version"], description["shapes"], description.get("axes", {})
        if not 1 <= version <= FORMAT_VERSION:
            raise ValueError(f"{file} has mask format {version}, this sprand reads {FORMAT_VERSION}; install a newer sprand")
        if shapes.keys() != tensors.keys():
            raise ValueError(f"{file} is damaged: its description names other parameters; take another copy of the mask")
        if not axes.keys() <= shapes.keys():
            raise ValueError(f"{file} is damaged: its description has axes of other parameters; take another copy of the mask")
        indices = {}
        for name, shape in shapes.items():
            called = f"{file}: {name}"
            if name in axes:
                indices[name] = pattern.from_columns(called, tensors[name], shape, axes[name])
            else:
                indices[name] = pattern.from_user(called, tensors[name], shape)
        return cls(indices, shapes, description.get("selection"))


def is_mask(path: str | os.PathLike[str]) -> bool:
    """Whether this is a file that `Mask.save` wrote, by its header; a damaged one is none."""
    try:
        return KEY in described.parse(described.header_of(Path(path))).get("__metadata__", {})
    except (OSError, ValueError):
        return False


def selection_of(config: SparseConfig) -> dict[str, Any] | None:
    """How the entries of a configuration are chosen, as JSON types; None for a random draw and for unnamed indices."""
    if isinstance(config.strategy, Mapping):
        return getattr(config.strategy, "selection", None)
    if config.strategy in (*pattern.RANDOM_STRATEGIES, GIVEN):
        return None
    fields = {field: getattr(config, field) for field in CHOOSING}
    if config.layout != "unstructured":
        fields["layout"] = config.layout
    if not isinstance(config.strategy, str):
        fields["strategy"] = getattr(config.strategy, "__name__", "callable")
    return fields


def chosen_by(selection: Mapping[str, Any]) -> str:
    """How entries were chosen, or came together, in words."""
    strategy, density = selection.get("strategy"), selection.get("density")
    seed = f"seed {selection['seed']}" if "seed" in selection else ""
    if strategy == "combine":
        sources = ", ".join(f"{source['weight']:g} x {source['name']}" for source in selection["sources"])
        words = [f"{selection['method']} of {sources}", f"density {density:g}" if density else "", seed]
    elif strategy == "diff":
        words = ["difference of two checkpoints", f"the largest {density:g}" if density else ""]
    elif strategy == GIVEN:
        words = ["given indices"]
    else:
        layout = selection.get("layout", "unstructured")
        words = [strategy, seed or selection.get("scope", "local"), _amount(selection), layout.replace("unstructured", "")]
    if selection.get("disjoint"):
        words.append("disjoint from " + ", ".join(other["name"] for other in selection["disjoint"]))
    return ", ".join(filter(None, words))


def _amount(selection: Mapping[str, Any]) -> str:
    if selection.get("density"):
        return f"density {selection['density']:g}"
    return f"budget {selection['budget']}" if selection.get("budget") else ""
