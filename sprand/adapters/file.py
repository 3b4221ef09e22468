"""The file of an adapter: its values, a seed or indices, fingerprints of the base, and the proof of all that on reading."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import described
from ..files.forms import OBJECT, SHAPE, TEXT, WHOLE, optional, record, simple, table_of
from ..selection import pattern
from ..selection.config import GIVEN, SparseConfig
from ..selection.mask import check_selection
from ..version import __version__

WEIGHTS_FILE, CONFIG_FILE, KEY = "adapter_model.safetensors", "adapter_config.json", "sprand"
FORMAT_VERSION, WITHOUT_FROZEN = 2, 1  # 2 adds frozen entries; an adapter that has none is written as 1
DTYPES = {_name: getattr(torch, _name) for _name in ("float64", "float32", "bfloat16", "float16")}
NARROWER = {torch.float64: (torch.float32, torch.bfloat16, torch.float16), torch.float32: (torch.bfloat16, torch.float16)}

_DTYPE = simple(f"one of {', '.join(DTYPES)}", lambda value: isinstance(value, str) and value in DTYPES)
_FINGERPRINT = simple(
    "hashes by dtype",
    lambda value: isinstance(value, dict) and bool(value) and all(isinstance(item, str) for item in value.values()),
)
_ENTRIES = {"nnz": WHOLE, "fingerprint": _FINGERPRINT}
FORM = record(
    {
        "base_model": optional(TEXT),
        "config": OBJECT,
        "targets": table_of(record({"shape": SHAPE, "dtype": _DTYPE, **_ENTRIES}, {"frozen": record(_ENTRIES)})),
        "saved": table_of(record({"shape": SHAPE, "dtype": TEXT})),
        "sprand_version": TEXT,
    },
    {"selection": optional(check_selection)},
)
_VERSIONS = record({"format_version": WHOLE, "pattern_version": WHOLE, "sprand_version": TEXT})


def store(
    path: str | os.PathLike[str], description: Mapping[str, Any], tensors: Mapping[str, Tensor], heads: Mapping[str, Tensor]
) -> Path:
    """Write an adapter to a folder: its file in one atomic step, then the copy of its description.

    Args:
        path: the folder; made if it is not there, an adapter in it is replaced.
        description: `format_version`, `base_model`, `config`, `targets`, and `selection` where there is one.
        tensors: `delta.*`, `indices.*`, `frozen_indices.*` and `frozen_values.*` by name, on the CPU.
        heads: values of parameters trained in full, by parameter name.

    Returns:
        The folder.

    Raises:
        ValueError: the path is that of a file.
        OSError: the folder cannot be written; an adapter that was there is untouched.
    """
    if Path(path).is_file() or Path(path).suffix == ".safetensors":
        raise ValueError(f"an adapter is a folder, and {path} is the name of a file; give a folder, which is made where none is")
    tensors = {**tensors, **{f"saved.{name}": value for name, value in heads.items()}}
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    description = {
        **description,
        "pattern_version": pattern.PATTERN_VERSION,
        "sprand_version": __version__,
        "saved": {name: {"shape": list(value.shape), "dtype": dtype_name(value.dtype)} for name, value in heads.items()},
    }
    folder = Path(path)
    described.write_json(folder / CONFIG_FILE, described.write(folder / WEIGHTS_FILE, KEY, description, tensors))
    return folder


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a saved adapter, proven to be undamaged.

    Args:
        path: folder written by `save`, or its safetensors file.

    Returns:
        The description, and the tensors `delta.*`, `indices.*`, `saved.*`, `frozen_*.*` by name.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: the file is damaged, no sprand adapter, or of a newer format.
    """
    file = Path(path)
    file = file / WEIGHTS_FILE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no adapter at {path}: expected {WEIGHTS_FILE} there, as written by sprand.save")
    description, tensors = described.read(file, KEY, "adapter", _VERSIONS)
    if description["format_version"] > FORMAT_VERSION or description["pattern_version"] != pattern.PATTERN_VERSION:
        raise ValueError(
            f"{file} has format {description['format_version']} and pattern {description['pattern_version']} (of sprand "
            f"{description['sprand_version']}); this sprand {__version__} reads format {FORMAT_VERSION} and pattern "
            f"{pattern.PATTERN_VERSION}"
        )
    try:
        FORM("its description", description)
        SparseConfig.from_dict(description["config"])
        _check_saved(description, tensors)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; take another copy of the adapter") from error
    return description, tensors


def _check_saved(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for name, entry in description["saved"].items():
        value = tensors.get(f"saved.{name}")
        if value is None or (list(value.shape), dtype_name(value.dtype)) != (entry["shape"], entry["dtype"]):
            raise ValueError(f"expected values of shape {entry['shape']} and dtype {entry['dtype']} for {name}")
        if not finite(value):
            raise ValueError(f"the values of {name} are not finite")
    if both := description["saved"].keys() & description["targets"].keys():
        raise ValueError(f"{min(both)} is trained both in full and in part")


def entries(
    path: Path, config: SparseConfig, name: str, target: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The trained entries of one target of an adapter that was read, proven.

    Returns:
        Their indices `[nnz]`, flat and sorted, int32 (int64 from 2**31 entries), and their deltas `[nnz]`.

    Raises:
        ValueError: they are missing, not finite, or no indices of that target.
    """
    delta, numel = tensors.get(f"delta.{name}"), math.prod(target["shape"])
    if delta is None or list(delta.shape) != [target["nnz"]]:
        raise ValueError(
            f"{path}: expected {target['nnz']} values for {name}, got {None if delta is None else list(delta.shape)}"
        )
    if delta.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{path}: expected values of float32 or float64 for {name}, got {dtype_name(delta.dtype)}")
    if not finite(delta):
        raise ValueError(f"{path}: the values of {name} are not finite")
    if config.strategy == GIVEN:
        indices = tensors.get(f"indices.{name}")
        if indices is None or indices.shape != delta.shape or indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{path}: expected {target['nnz']} integer indices for {name}")
        pattern.check_indices(f"{path}: {name}", indices, numel)
    else:
        indices = draw(config, name, target["shape"], target["nnz"])
    return indices.to(pattern.index_dtype(numel)), delta


def frozen_entries(path: Path, name: str, target: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The folded entries of one target of an adapter that was read, proven: indices and values, both `[n]`.

    Raises:
        ValueError: they are missing, not finite, or no indices of that target.
    """
    indices, values, nnz = tensors.get(f"frozen_indices.{name}"), tensors.get(f"frozen_values.{name}"), target["frozen"]["nnz"]
    integers = indices is not None and indices.dtype in (torch.int32, torch.int64)
    if values is None or not integers or list(indices.shape) != [nnz] or list(values.shape) != [nnz]:
        raise ValueError(f"{path}: expected {nnz} integer indices and values of frozen entries for {name}")
    if dtype_name(values.dtype) not in DTYPES or not finite(values):
        raise ValueError(f"{path}: the values of frozen entries of {name} are not finite numbers")
    numel = math.prod(target["shape"])
    pattern.check_indices(f"{path}: frozen entries of {name}", indices, numel)
    return indices.to(pattern.index_dtype(numel)), values


def fingerprints(base: Tensor) -> dict[str, str]:
    """Hashes of base entries, in their dtype and as they would be in narrower ones, so that a base may be cast."""
    return {dtype_name(dtype): described.digest([base.to(dtype)]) for dtype in (base.dtype, *NARROWER.get(base.dtype, ()))}


def check_base(path: Path, name: str, base: Tensor, stored: Mapping[str, str]) -> None:
    """Prove by their fingerprint that entries are those an adapter was trained on.

    The narrower of the two dtypes is compared: a checkpoint may be loaded in another one than it was trained in.

    Raises:
        ValueError: they are not.
    """
    trained = next(iter(stored))
    here = fingerprints(base)
    common = [dtype for dtype in stored if dtype in here]
    same = stored[trained] == here[trained] if trained in here else bool(common) and stored[common[0]] == here[common[0]]
    if not same:
        raise ValueError(
            f"{path} was trained on another base: the entries it changes in {name} have other values in this model; load the "
            "base checkpoint it was trained on (and no merged or further trained one)"
        )


def draw(config: SparseConfig, name: str, shape: list[int], nnz: int) -> Tensor:
    """The positions that a random strategy draws; none for another strategy."""
    if config.strategy not in pattern.RANDOM_STRATEGIES:
        return torch.empty(0)
    return pattern.draw(config.strategy, name, shape, nnz, config.seed, layout=config.layout)


def finite(values: Tensor) -> bool:
    """Whether all values are finite."""
    return bool(torch.isfinite(values).all())


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype in the words of a description, `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Source:
    """An adapter that was read, and its factor."""

    path: Path
    description: dict[str, Any]
    tensors: dict[str, Tensor]
    weight: float = 1.0

    @property
    def config(self) -> SparseConfig:
        """How its entries were chosen."""
        return SparseConfig.from_dict(self.description["config"])


def open_adapters(adapters: Iterable[tuple[str | os.PathLike[str], float]]) -> list[Source]:
    """Read adapters, each with a factor.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: none was given, one is damaged, or it cannot be mixed.
    """
    sources = [Source(Path(path), *read(path), float(weight)) for path, weight in adapters]
    if not all(math.isfinite(source.weight) for source in sources):
        raise ValueError(f"weights: expected finite numbers, got {[source.weight for source in sources]}")
    if not sources:
        raise ValueError("expected at least one adapter, got none")
    for source in sources if len(sources) > 1 or sources[0].weight != 1 else ():
        refuse_unmixable(source, "merge it alone, with weight 1")
    return sources


def refuse_unmixable(source: Source, instead: str) -> None:
    """Prove that all an adapter changes are deltas.

    Raises:
        ValueError: it holds values as well; the message ends in what to do instead.
    """
    if source.description["saved"]:
        whole = ", ".join(source.description["saved"])
        raise ValueError(f"{source.path} trained whole modules ({whole}), which cannot be mixed; {instead}")
    if any("frozen" in target for target in source.description["targets"].values()):
        raise ValueError(
            f"{source.path} has entries that are stored as values (of a redrawn mask, or sprand diff), which cannot be "
            "mixed; merge it alone, with weight 1"
        )
