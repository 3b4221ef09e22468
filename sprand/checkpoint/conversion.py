"""How transformers loads a checkpoint into a class of models: which entries of which tensors each parameter is made of."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .shards import Checkpoint, Stored

PROBED = 4  # columns that stand for all of a tensor, where a conversion moves whole rows
INSTEAD = "load the model with transformers, then sprand.load, sprand.merge and save_pretrained"
Classes = Mapping[str, str]  # of transformers, by what stands before the names of their parameters


@dataclass(frozen=True, eq=False)
class Place:
    """Where the entries of a parameter are in a checkpoint.

    Attributes:
        tensors: the tensors whose entries, one after another, hold those of the parameter.
        rows: `[n]`, int64, which of their rows each row of the parameter is; None where their entries are its own, in order.
        width: entries of a row.
    """

    tensors: tuple[str, ...]
    rows: Tensor | None = None
    width: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is one tensor as it is."""
        return self.rows is None and len(self.tensors) == 1

    def positions(self, indices: Tensor) -> Tensor:
        """Where entries of the parameter, flat `[n]`, are among those of the tensors."""
        if self.rows is None:
            return indices
        flat, rows = indices.long(), self.rows.to(indices.device)
        return rows[flat // self.width] * self.width + flat % self.width


class Loading:
    """What a class of transformers makes of the tensors of a checkpoint.

    transformers renames the tensors, and runs its own operations, on numbers in place of values: each entry of the checkpoint is
    its own position, so that each entry of a parameter tells where it comes from.

    Args:
        checkpoint: what would be loaded.
        model: of that class, on the meta device.
        prefix: what stands before the names of its parameters in the model that was trained, such as `"encoder."`.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, prefix: str = "") -> None:
        self.prefix = prefix
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict(keep_vars=True).items()}
        self._aliases = _aliases(model)
        self._renamed = _renaming(model, self.shapes)
        groups: dict[str, _Group] = {}
        for name in sorted(checkpoint.tensors, key=_core().dot_natural_key):
            target, pattern, converter = self._renamed(name)
            if target in self.shapes:
                group = groups.setdefault(target, _Group(target, converter, model, self.shapes))
                group.sources.append((checkpoint.tensors[name], pattern))
        self._groups = groups
        self._parts: dict[str, Place] | None = None
        self._computed: ValueError | None = None

    def place(self, name: str) -> Place | None:
        """Where a parameter is in the checkpoint; None for one that the checkpoint lacks.

        Raises:
            ValueError: Its entries are no entries of the checkpoint, but computed.
        """
        own = name.removeprefix(self.prefix)
        for alias in self._aliases.get(own, (own,)):
            place = self._groups[alias].places().get(alias) if alias in self._groups else self._of_parts().get(alias)
            if place is not None:
                return place
        if self._computed is not None:
            raise self._computed
        return None

    def added(self, name: str) -> str:
        """The name in the checkpoint of a parameter that it lacks, under which transformers finds it there.

        Raises:
            ValueError: There is none.
        """
        own = name.removeprefix(self.prefix)
        if not name.startswith(self.prefix) or own not in self.shapes:
            return name
        if self._renamed(own)[:2] != (own, None):
            raise ValueError(f"transformers would not find {name} in the checkpoint if it were added to it; {INSTEAD}")
        return own

    def _of_parts(self) -> dict[str, Place]:
        """The places of parameters that are made of a part of a tensor."""
        if self._parts is None:
            self._parts = {}
            for group in self._groups.values():
                try:
                    self._parts |= group.places() if group.makes_several else {}
                except ValueError as error:
                    self._computed = error
        return self._parts


@dataclass(eq=False)
class _Group:
    """Tensors of a checkpoint that become one parameter, or several.

    Attributes:
        target: the parameter, or the first one.
        converter: what transformers makes it with; None where it is the first tensor under another name.
        model: on the meta device.
        shapes: of the model's tensors, by name.
        sources: the tensors, each with the converter's pattern that it matches.
    """

    target: str
    converter: Any
    model: Any
    shapes: Mapping[str, tuple[int, ...]]
    sources: list[tuple[Stored, str | None]] = field(default_factory=list)
    _places: dict[str, Place] | None = None

    @property
    def makes_several(self) -> bool:
        """Whether it may be made into other parameters beside its target."""
        return self.converter is not None and (
            len(self.converter.target_patterns) > 1 or "*" in self.converter.target_patterns[0]
        )

    def places(self) -> dict[str, Place]:
        """Where each parameter is that is made of these tensors.

        Raises:
            ValueError: A parameter is computed of them.
        """
        if self._places is None:
            self._places = self._read() if self.converter is not None else {self.target: Place((self.sources[0][0].name,))}
        return self._places

    def _read(self) -> dict[str, Place]:
        for columns in (PROBED, None):
            try:
                made = self._converted(columns)
            except Exception:  # operations have errors of their own, for columns that are too few or values that are numbers
                continue
            places = {name: self._place(name, numbers, columns) for name, numbers in made.items() if name in self.shapes}
            if places and all(places.values()):
                return places
        names = ", ".join(stored.name for stored, _ in self.sources[:3])
        raise ValueError(
            f"transformers computes {self.target} of {names} of the checkpoint, and not by moving entries; {INSTEAD}"
        )

    def _converted(self, columns: int | None) -> dict[str, Tensor]:
        """The parameters, of numbers: positions among the entries of all tensors, of which some columns may stand for all."""
        converter, begin = copy.deepcopy(self.converter), 0
        for stored, pattern in self.sources:
            shape = stored.shape if columns is None else (*stored.shape[:-1], columns)
            numbers = torch.arange(begin, begin + torch.Size(shape).numel()).view(shape)
            converter.add_tensor(self.target, stored.name, pattern, numbers)
            begin += numbers.numel()
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _place(self, name: str, numbers: Tensor, columns: int | None) -> Place | None:
        """Where a parameter is, by what became of the numbers; None where they are no positions of its entries."""
        shape, parts = self.shapes[name], [stored for stored, _ in self.sources]
        width = 1 if columns is None else shape[-1]
        probed = shape if columns is None else (*shape[:-1], columns)
        if numbers.dtype != torch.int64 or tuple(numbers.shape) != tuple(probed):
            return None
        if columns is not None and any(len(stored.shape) < 2 or stored.shape[-1] != width for stored in parts):
            return None
        table = numbers.reshape(-1, columns or 1)
        rows = table[:, 0] // table.shape[1]
        whole = torch.equal(table, rows[:, None] * table.shape[1] + torch.arange(table.shape[1]))
        total = sum(stored.numel for stored in parts) // width
        distinct = torch.zeros(total, dtype=torch.bool)
        if not whole or not rows.numel() or rows.min() < 0 or rows.max() >= total:
            return None
        distinct[rows] = True
        return _simplest(parts, rows, width) if int(distinct.sum()) == rows.numel() else None


def loading_of(checkpoint: Checkpoint, names: Iterable[str], classes: Iterable[Classes]) -> Loading | None:
    """How transformers loads a checkpoint into a model that has parameters of these names.

    Args:
        checkpoint: of transformers, with a `config.json`.
        names: of parameters.
        classes: of the models that adapters were trained on, as far as they say so; then those are asked that the checkpoint's
            configuration names, and all others of its kind.

    Returns:
        None where transformers is not installed, or has no such class.
    """
    if not is_installed() or not isinstance(checkpoint.config.get("model_type"), str):
        return None
    names = tuple(names)
    on_meta = functools.cache(functools.partial(_on_meta, checkpoint.folder))
    for prefix, kind in dict.fromkeys(_kinds(checkpoint.config, names, classes)):
        model = on_meta(kind)
        own = set() if model is None else set(model.state_dict(keep_vars=True))
        if own and all(name.startswith(prefix) and name.removeprefix(prefix) in own for name in names):
            return Loading(checkpoint, model, prefix)
    return None


def is_installed() -> bool:
    """Whether there is a transformers that tells how it loads."""
    return importlib.util.find_spec("transformers") is not None


def _kinds(config: Mapping[str, Any], names: tuple[str, ...], classes: Iterable[Classes]) -> Iterator[tuple[str, str]]:
    """Classes that the model may be of, and what stands before their parameters' names, the likeliest first."""
    for known in classes:
        yield from ((f"{place}." if place else "", kind) for place, kind in known.items())
    mappings = vars(importlib.import_module("transformers.models.auto.modeling_auto"))
    of_type = [mapping.get(config["model_type"], ()) for name, mapping in mappings.items() if name.endswith("_MAPPING_NAMES")]
    listed = [kind for kinds in of_type for kind in ((kinds,) if isinstance(kinds, str) else kinds)]
    first = names[0].split(".") if names else []
    prefixes = ["".join(f"{part}." for part in first[:count]) for count in range(min(3, len(first)))]
    for prefix in prefixes or [""]:
        yield from ((prefix, kind) for kind in (*(config.get("architectures") or ()), *listed))


def _on_meta(folder: Path, kind: str) -> Any:
    """A model of a class of transformers without weights, by the configuration of a checkpoint; None where that cannot be."""
    made = getattr(importlib.import_module("transformers"), kind, None)
    try:
        config = made.config_class.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return made(config)
    except Exception:  # a class that is none of models, that needs what is not installed, or another configuration
        return None


def _renaming(model: Any, shapes: Mapping[str, Any]) -> Callable[[str], tuple[str, str | None, Any]]:
    """What gives of a tensor's name the name of its parameter, the pattern of a converter that it matches, and that converter."""
    core = _core()
    transforms = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, core.WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, core.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def renamed(name: str) -> tuple[str, str | None, Any]:
        target, pattern = core.rename_source_key(name, renamings, converters, model.base_model_prefix, shapes)
        if target not in shapes and name in shapes:
            target, pattern = core.rename_source_key(name, [], [], model.base_model_prefix, shapes)
        return target, pattern, by_pattern.get(pattern)

    return renamed


def _core() -> Any:
    return importlib.import_module("transformers.core_model_loading")


def _aliases(model: Any) -> dict[str, tuple[str, ...]]:
    """All names of each tied parameter, by each of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: (name, *(other for other in own if other != name)) for own in names.values() for name in own}


def _simplest(parts: list[Stored], rows: Tensor, width: int) -> Place:
    """The place of a parameter that has these rows of tensors; where it has whole tensors, they are put in its order."""
    names, sizes = [stored.name for stored in parts], {stored.numel // width for stored in parts}
    if len(sizes) == 1 and rows.numel() == sizes.copy().pop() * len(parts):
        blocks = rows.view(len(parts), -1)
        begins = blocks[:, :1]
        if torch.equal(blocks, begins + torch.arange(blocks.shape[1])) and not (begins % blocks.shape[1]).any():
            return Place(tuple(names[number] for number in (begins[:, 0] // blocks.shape[1]).tolist()))
    return Place(tuple(names), rows, width)
