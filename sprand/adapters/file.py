"""An adapter's file: its values, a seed or indices, fingerprints of the base, and the proof of all that on reading."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import described
from ..kernels.dtypes import dtype_name
from ..layers.units import Units, whole_units
from ..selection import pattern
from ..selection.config import AS_GIVEN, GIVEN, SparseConfig
from . import layout
from .fingerprint import DTYPES, check_entries
from .trained import Trained

WEIGHTS_FILE, CONFIG_FILE, KEY = "adapter_model.safetensors", "adapter_config.json", "sprand"
FOLDER_OF_RUN = "adapter"  # in the folder of a run of `sprand finetune`


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter that was read, or is to be written.

    `sprand.save` and PEFT's `save_pretrained` write one format: a folder that PEFT loads, whose safetensors file holds the
    adapter under PEFT's names. Of `sprand.save` that file is complete by itself: its header carries the description, with
    checksums of it and of the values. PEFT describes an adapter in its configuration alone.

    Attributes:
        path: its folder, or its safetensors file.
        description: what it says of itself, as JSON types.
        tensors: what it holds, by the names in the file.
        weight: its factor where adapters are combined.
    """

    path: Path
    description: dict[str, Any]
    tensors: dict[str, Tensor]
    weight: float = 1.0

    @classmethod
    def read(cls, path: str | os.PathLike[str], weight: float = 1.0) -> AdapterFile:
        """Read a saved adapter and prove that it is undamaged.

        Args:
            path: folder of the adapter, its safetensors file, or the folder of a run of `sprand finetune`.
            weight: its factor where adapters are combined.

        Raises:
            FileNotFoundError: There is no adapter.
            ValueError: The file is damaged, no adapter of sprand, or of a newer format.
        """
        place = _place(Path(path))
        file = place / WEIGHTS_FILE if place.is_dir() else place
        if not file.is_file():
            raise FileNotFoundError(
                f"no adapter at {path}: expected {WEIGHTS_FILE} there, as sprand.save and save_pretrained write it"
            )
        metadata, tensors = described.contents(file, "adapter")
        if KEY in metadata:
            said = described.proven(file, metadata[KEY], tensors, "adapter", layout.check_versions)
        else:
            said = _said_beside(file) | {"checksum": described.checksum(tensors)}
        layout.refuse_newer(file, said)
        try:
            adapter = cls(place, *layout.opened(said, tensors), float(weight))
            if adapter.config.strategy not in (GIVEN, *pattern.RANDOM_STRATEGIES):
                raise ValueError(f"expected a strategy that draws, or given entries, got {adapter.config.strategy!r}")
            adapter._check_heads()
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}; take another copy of the adapter") from error
        return adapter

    @classmethod
    def made(
        cls,
        path: str | os.PathLike[str],
        config: SparseConfig,
        trained: Mapping[str, Trained],
        heads: Mapping[str, Tensor] | None = None,
        base_model: str | None = None,
        selection: Mapping[str, Any] | None = None,
        architecture: Mapping[str, Any] | None = None,
    ) -> AdapterFile:
        """An adapter that `store` writes.

        Args:
            path: the folder to write.
            config: how the entries were chosen; of a strategy that they do not follow from, only what was targeted is kept.
            trained: the entries of each parameter, by its name; all with indices, or none.
            heads: values of parameters trained in full, by name.
            base_model: what the base is called.
            selection: how entries were chosen that do not follow from a seed.
            architecture: of the model, see `architecture_of`.
        """
        given = config.strategy == GIVEN or any(part.indices is not None for part in trained.values())
        heads = heads or {}
        targets = {name: part.describe() for name, part in trained.items()}
        description = {
            **layout.written_versions(targets),
            "base_model": layout.portable(base_model),
            "config": config.to_dict() | (AS_GIVEN if given else {}),
            "selection": selection,
            "architecture": architecture,
            "targets": targets,
            "saved": sorted(heads),
        }
        tensors = {key: value for name, part in trained.items() for key, value in part.tensors(name).items()}
        return cls(Path(path), description, tensors | {layout.head_key(name): value for name, value in heads.items()})

    def store(self) -> Path:
        """Write the adapter to its folder: the file in one atomic step, then the configuration by which PEFT loads it.

        Returns:
            The folder; it is made where it is not there, and an adapter in it is replaced.

        Raises:
            ValueError: The path is that of a file.
            OSError: The folder cannot be written; an adapter that was there is untouched.
        """
        if self.path.is_file() or self.path.suffix == ".safetensors":
            raise ValueError(
                f"an adapter is a folder, and {self.path} is the name of a file; give a folder, which is made where none is"
            )
        tensors = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in self.tensors.items()}
        if self.config.strategy != GIVEN:
            tensors[layout.PREFIX + layout.DRAW] = layout.draw_of(self.config.strategy, self.config.layout, self.config.seed)
        settings, versions = layout.settings_of(self.description), layout.written_versions(self.targets)
        described.write(self.path / WEIGHTS_FILE, KEY, versions | settings, tensors)
        described.write_json(self.path / CONFIG_FILE, {"versions": versions | {layout.SEALED: True}} | settings)
        return self.path

    @cached_property
    def config(self) -> SparseConfig:
        """How its entries were chosen."""
        return SparseConfig.from_dict(self.description["config"])

    @property
    def targets(self) -> dict[str, dict[str, Any]]:
        """What it says of each parameter that it trains entries of: shape, dtype, count and fingerprint."""
        return self.description["targets"]

    @property
    def heads(self) -> dict[str, Tensor]:
        """The values of parameters that were trained in full, by name."""
        return {name: self.tensors[layout.head_key(name)] for name in self.description["saved"]}

    @property
    def base_model(self) -> str | None:
        """What the base is called."""
        return self.description["base_model"]

    @property
    def selection(self) -> dict[str, Any] | None:
        """How entries were chosen that do not follow from a seed."""
        return self.description.get("selection")

    @property
    def architecture(self) -> dict[str, Any] | None:
        """Which classes of transformers its model is made of, and what its head means; see `architecture_of`."""
        return self.description.get("architecture")

    @property
    def checksum(self) -> str:
        """The hash of all tensors."""
        return self.description["checksum"]

    @property
    def copied_heads(self) -> bool:
        """Whether parameters trained in full were copies, as in PEFT: what a model ties to one of them stayed as it was."""
        return self.description.get("copied_heads", False)

    @property
    def has_frozen(self) -> bool:
        """Whether it has frozen entries: those of a redrawn mask, or what `sprand diff` could not hold as deltas."""
        return any("frozen" in target for target in self.targets.values())

    def delta(self, name: str) -> Tensor | None:
        """The deltas of a parameter as they are stored, `[nnz]`; None where there are none."""
        return self.tensors.get(layout.key("delta", name))

    def entries(self, name: str) -> tuple[Tensor, Tensor]:
        """The trained entries of a parameter, proven.

        Returns:
            Their indices `[nnz]`, flat and sorted, int32 (int64 from 2**31 entries), and their deltas `[nnz]`.

        Raises:
            ValueError: The entries are missing, not finite, or no indices of that parameter.
        """
        target, delta = self.targets[name], self.delta(name)
        nnz, numel = target["nnz"], math.prod(target["shape"])
        if not _has_length(delta, nnz):
            there = None if delta is None else list(delta.shape)
            raise ValueError(f"{self.path}: expected {nnz} values for {name}, got {there}")
        if delta.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{self.path}: expected values of float32 or float64 for {name}, got {dtype_name(delta.dtype)}")
        if not finite(delta):
            raise ValueError(f"{self.path}: the values of {name} are not finite")
        if self.config.strategy != GIVEN:
            indices = draw(self.config, name, target, nnz)
        elif "axis" in target:
            chosen = self.tensors.get(layout.key(layout.UNITS[target["axis"]], name))
            indices = pattern.from_columns(f"{self.path}: {name}", chosen, target["shape"], target["axis"])
            if indices.numel() != nnz:
                raise ValueError(f"{self.path}: expected {nnz} entries in whole columns of {name}, got {indices.numel()}")
        else:
            indices = self.tensors.get(layout.key("indices", name))
            if not _are_indices(indices, nnz):
                raise ValueError(f"{self.path}: expected {nnz} integer indices for {name}")
            pattern.check_indices(f"{self.path}: {name}", indices, numel)
        return indices.to(pattern.index_dtype(numel)), delta

    def columns(self, name: str) -> tuple[int, Tensor] | None:
        """The whole columns that the trained entries of a parameter are, however they were chosen and stored.

        Returns:
            The dimension of the weight that counts them, 1 or 0, and their numbers `[c]`, ascending; the deltas `[nnz]` are those
            of the weight's part `weight.index_select(dimension, numbers)`. None where the entries are no whole columns.

        Raises:
            ValueError: The entries are missing, not finite, or no indices of that parameter.
        """
        target, (indices, _) = self.targets[name], self.entries(name)
        if "axis" in target:
            return target["axis"], Units.of(target["shape"], target["axis"]).whole(indices)
        return whole_units(target["shape"], indices)

    def frozen(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The frozen entries of a parameter, proven; None where there are none.

        Returns:
            Their indices `[n]`, flat and sorted, and their values `[n]`.

        Raises:
            ValueError: The entries are missing, not finite, or no indices of that parameter.
        """
        target = self.targets[name]
        if "frozen" not in target:
            return None
        nnz, numel = target["frozen"]["nnz"], math.prod(target["shape"])
        indices = self.tensors.get(layout.key("frozen_indices", name))
        values = self.tensors.get(layout.key("frozen_values", name))
        if not _are_indices(indices, nnz) or not _has_length(values, nnz):
            raise ValueError(f"{self.path}: expected {nnz} integer indices and values of frozen entries for {name}")
        if dtype_name(values.dtype) not in DTYPES or not finite(values):
            raise ValueError(f"{self.path}: the values of frozen entries of {name} are not finite numbers")
        pattern.check_indices(f"{self.path}: frozen entries of {name}", indices, numel)
        return indices.to(pattern.index_dtype(numel)), values

    def check_base(self, name: str, base: Tensor) -> None:
        """Prove that `base` `[nnz]` is what the trained entries of a parameter started from.

        One that was trained over a quantized base cannot be told: the dense values that it started from are in no checkpoint.

        Raises:
            ValueError: The adapter was trained on another base.
        """
        if "quantized" not in self.targets[name]:
            check_entries(self.path, name, base, self.targets[name])

    def check_frozen_base(self, name: str, base: Tensor) -> None:
        """Prove that `base` `[n]` is what the frozen entries of a parameter started from.

        Raises:
            ValueError: The adapter was trained on another base.
        """
        check_entries(self.path, name, base, self.targets[name]["frozen"])

    def added_row(self, name: str, frozen: Tensor) -> int | None:
        """The first row that a parameter was given after `apply`; None for none.

        Args:
            name: of the parameter.
            frozen: the indices of its frozen entries.
        """
        target = self.targets[name]
        count = target["frozen"].get("added", 0)
        return int(frozen[-count]) // math.prod(target["shape"][1:]) if count else None

    def beside(self, untrained: Mapping[str, Tensor]) -> AdapterFile:
        """The same adapter with further tensors in its file, which it does not train: PEFT reads modules as a whole."""
        tensors = self.tensors | {layout.head_key(name): value for name, value in untrained.items()}
        return replace(self, description=self.description | {"untrained": sorted(untrained)}, tensors=tensors)

    def without_heads(self) -> AdapterFile:
        """The same adapter without the parameters that were trained in full."""
        return replace(self, description=self.description | {"saved": []})

    def refuse_unmixable(self, instead: str) -> None:
        """Prove that all an adapter changes are deltas.

        Raises:
            ValueError: The adapter holds values as well; the message ends in what to do instead.
        """
        if self.heads:
            raise ValueError(f"{self.path} trained whole modules ({', '.join(self.heads)}), which cannot be mixed; {instead}")
        if self.has_frozen:
            raise ValueError(
                f"{self.path} has frozen entries (of a redrawn mask, sprand diff, or added rows), which cannot be "
                "mixed; merge it alone, with weight 1"
            )

    def _check_heads(self) -> None:
        for name, value in self.heads.items():
            if name in self.targets:
                raise ValueError(f"{name} is trained both in full and in part")
            if not finite(value):
                raise ValueError(f"the values of {name} are not finite")


def open_adapters(adapters: Iterable[tuple[str | os.PathLike[str], float]]) -> list[AdapterFile]:
    """Read adapters, each with a factor.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: No adapter was given, one is damaged, or one cannot be mixed.
    """
    opened = [AdapterFile.read(path, weight) for path, weight in adapters]
    if not all(math.isfinite(adapter.weight) for adapter in opened):
        raise ValueError(f"weights: expected finite numbers, got {[adapter.weight for adapter in opened]}")
    if not opened:
        raise ValueError("expected at least one adapter, got none")
    for adapter in opened if len(opened) > 1 or opened[0].weight != 1 else ():
        adapter.refuse_unmixable("merge it alone, with weight 1")
    return opened


def draw(config: SparseConfig, name: str, target: Mapping[str, Any], nnz: int) -> Tensor:
    """The positions that a random strategy draws of a weight, of which an adapter says shape and axis."""
    axis = target.get("axis") if config.layout == pattern.COLUMNS else None
    return pattern.draw(config.strategy, name, target["shape"], nnz, config.seed, axis=axis)


def finite(values: Tensor) -> bool:
    """Whether all values are finite."""
    return bool(torch.isfinite(values).all())


def _place(path: Path) -> Path:
    """Where an adapter lies: of the folder of a run, in its folder `adapter`."""
    inner = path / FOLDER_OF_RUN
    return inner if not (path / WEIGHTS_FILE).is_file() and (inner / WEIGHTS_FILE).is_file() else path


def _has_length(values: Tensor | None, count: int) -> bool:
    return values is not None and list(values.shape) == [count]


def _are_indices(values: Tensor | None, count: int) -> bool:
    return _has_length(values, count) and values.dtype in (torch.int32, torch.int64)


def _said_beside(file: Path) -> dict[str, Any]:
    """What the configuration beside a file that PEFT wrote says, with its versions."""
    beside = file.parent / CONFIG_FILE
    none = f"{file} is no adapter of sprand: its header has no description, and"
    if not beside.is_file():
        raise ValueError(f"{none} no {CONFIG_FILE} lies beside it")
    settings = described.read_json(beside)
    kind = settings.get("peft_type", "none")
    if kind != layout.PEFT_TYPE or settings.get("targets") is None:
        raise ValueError(f"{none} {CONFIG_FILE} beside it is of type {kind}, expected {layout.PEFT_TYPE} with its targets")
    try:
        return settings | layout.versions_of(settings)
    except ValueError as error:
        raise ValueError(f"{beside} is damaged: {error}; take another copy of the adapter") from error
