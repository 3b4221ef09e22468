"""Combines adapter files into one adapter file, and takes one of them out again, proven against the base's files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.combining import Origin, Part, Rule, Whole, combined, content_checksum, record, shared_counts
from ..adapters.file import AdapterFile, finite
from ..adapters.trained import Trained
from ..files import described
from ..selection import pattern
from ..selection.config import GIVEN, SparseConfig
from .edits import edits_of, read_bases
from .merge import Adapters, warn_of_twins
from .shards import Checkpoint, open_checkpoint
from .stream import Progress

ANEW = "combine the others anew instead"
Listed = dict[str, tuple[Tensor, Tensor]]  # indices and deltas by parameter name


@dataclass(frozen=True)
class Combined:
    """What combining wrote.

    Attributes:
        folder: the adapter.
        entries: how many it holds.
        sources: of each adapter in it its name, weight, checksum, and how many of its entries another has as well.
        left_out: parameters trained in full that were left out.
    """

    folder: Path
    entries: int
    sources: list[dict[str, Any]]
    left_out: tuple[str, ...] = ()


def combine(
    adapters: Adapters,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str = "sum",
    density: float | None = None,
    seed: int = 0,
    signs: str = "total",
    drop_heads: bool = False,
    progress: Progress = lambda count: None,
) -> Combined:
    """Write one adapter whose entries are the union of those of several: the bits of `sprand.combine`, without a model.

    Args:
        adapters: folders of adapters, each with its weight, in the order in which they are summed.
        base: folder of the checkpoint they were trained on, or one safetensors file; each adapter is proven to be of it.
        out: folder of the new adapter; one that is there is replaced, unless it is one of those that are combined.
        method, density, seed, signs: how, as in `sprand.adapters.combining.Rule`.
        drop_heads: leave out modules trained in full (each task keeps its own head); without it they are refused.
        progress: called with the number of bytes of the base that were read.

    Raises:
        FileNotFoundError: There is no adapter or no checkpoint.
        ValueError: An adapter is damaged, of another base, or cannot be combined, or an option does not fit. Nothing is written.
        OSError: The adapter cannot be written.
    """
    rule, pairs = Rule(method, density, seed, signs), list(adapters)
    opened = [AdapterFile.read(path, weight) for path, weight in pairs]
    _refuse_overwriting(out, opened)
    warn_of_twins(opened)
    if not opened:
        raise ValueError("expected at least one adapter, got none")
    left_out = tuple(dict.fromkeys(name for adapter in opened for name in adapter.heads)) if drop_heads else ()
    opened = [_combinable(adapter, drop_heads) for adapter in opened]
    checkpoint = open_checkpoint(base)
    edits = edits_of(checkpoint, opened, rule)
    bases = read_bases(checkpoint, edits, progress)
    listed, places = {}, {}
    for parameter in edits.parameters:
        whole = parameter.pending.entries()
        listed[parameter.name] = whole.indices, whole.deltas
        everywhere = torch.arange(whole.indices.numel())
        positions = [everywhere if position is None else position for _, position in parameter.claims]
        places[parameter.name] = [opened.index(adapter) for adapter, _ in parameter.claims], positions
    shared = shared_counts(len(opened), places.values())
    origins = [
        Origin(described.label(adapter.path), adapter.weight, _checksum(_entries_of(adapter)), count)
        for adapter, count in zip(opened, shared, strict=True)
    ]
    return _write(out, checkpoint, opened, _trained(opened, listed, bases), record(rule, origins), left_out)


def remove(
    whole: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress = lambda count: None,
) -> Combined:
    """Write what is left of a combined adapter without one of those in it, exactly: as if it had not been combined with it.

    That is so for a sum, of an adapter that shares no entry with the others: its entries are taken out, all others stay
    as they are. Where entries are shared a difference of rounded sums is not what was there before, so it is refused.

    Args:
        whole: an adapter that `combine` wrote.
        adapter: one of those in it.
        base: folder of the checkpoint they were trained on, or one safetensors file.
        out: folder of the new adapter; one that is there is replaced, unless it is one of these two.
        progress: called with the number of bytes of the base that were read.

    Raises:
        FileNotFoundError: There is no adapter or no checkpoint.
        ValueError: The whole is no sum, or the adapter is not in it, shares entries, or is all of it. Nothing is written then.
        OSError: The adapter cannot be written.
    """
    opened = [AdapterFile.read(path) for path in (whole, adapter)]
    _refuse_overwriting(out, opened)
    combination, taken = _combinable(opened[0], False), _combinable(opened[1], True)
    selection = combination.selection or {}
    if selection.get("strategy") != "combine" or selection["method"] != "sum":
        how = f"by {selection['method']}" if selection.get("method") else "alone"
        raise ValueError(
            f"{whole} was made {how}; only an adapter that sprand combine --method sum wrote can lose one of its parts"
        )
    origin = _origin(combination, taken)
    own = _entries_of(combination)
    left = _left(combination, own, taken, origin["weight"])
    checkpoint = open_checkpoint(base)
    bases = read_bases(checkpoint, edits_of(checkpoint, [combination]), progress)
    listed = {name: (indices[left[name]], deltas[left[name]]) for name, (indices, deltas) in own.items() if left[name].any()}
    bases = {name: bases[name][left[name]] for name in listed}
    others = [source for source in selection["sources"] if source is not origin]
    trained = _trained([combination], listed, bases)
    return _write(out, checkpoint, [combination], trained, selection | {"sources": others}, ())


def _origin(combination: AdapterFile, taken: AdapterFile) -> dict[str, Any]:
    """What a sum says of one of its parts.

    Raises:
        ValueError: The adapter is none of its parts, shares entries with another one, or is the only one.
    """
    sources = combination.selection["sources"]
    checksum = _checksum(_entries_of(taken))
    origin = next((source for source in sources if source["checksum"] == checksum), None)
    if origin is None:
        names = ", ".join(source["name"] for source in sources)
        raise ValueError(
            f"{taken.path} is not in {combination.path}, which was made of {names} (or it was trained further since)"
        )
    if origin["shared"]:
        raise ValueError(
            f"{origin['shared']:,} entries of {taken.path} are in other parts of {combination.path} as well, and what those were "
            f"before is not known to the bit; {ANEW} (train with disjoint= to have parts that can be taken out)"
        )
    if len(sources) == 1:
        raise ValueError(f"{taken.path} is all there is in {combination.path}; nothing would be left")
    return origin


def _left(combination: AdapterFile, own: Listed, taken: AdapterFile, weight: float) -> dict[str, Tensor]:
    """Which entries of a sum are left without one of its parts, bool `[nnz]` by parameter name.

    Raises:
        ValueError: The sum does not hold the part to the bit.
    """
    left = {name: torch.ones(indices.numel(), dtype=torch.bool) for name, (indices, _) in own.items()}
    parts = {name: [Part(0, weight, *entries)] for name, entries in _entries_of(taken).items()}
    for name, part in combined(Rule(), 1, parts).items():
        places = _places(own[name], part) if name in own else None
        if places is None:
            raise ValueError(f"{combination.path} was trained further since {taken.path} was combined into it; {ANEW}")
        left[name][places] = False
    return left


def _places(entries: tuple[Tensor, Tensor], part: Whole) -> Tensor | None:
    """Where the entries of a part stand among others; None where these do not hold them to the bit."""
    indices, deltas = entries
    if indices.numel() < part.indices.numel():
        return None
    places = torch.searchsorted(indices, part.indices).clamp(max=indices.numel() - 1)
    same = torch.equal(indices[places], part.indices) and torch.equal(deltas[places], part.delta)
    return places if same else None


def _combinable(adapter: AdapterFile, drop_heads: bool) -> AdapterFile:
    """An adapter of which every change is a delta, whole modules left out if asked."""
    if not math.isfinite(adapter.weight):
        raise ValueError(f"weights: expected finite numbers, got {adapter.weight}")
    if drop_heads:
        adapter = adapter.without_heads()
    adapter.refuse_unmixable("leave them out, since each task keeps its own head (--drop-heads)")
    if not adapter.targets:
        raise ValueError(f"{adapter.path} changes no entry by a delta; there is nothing to combine")
    return adapter


def _entries_of(adapter: AdapterFile) -> Listed:
    return {name: adapter.entries(name) for name in adapter.targets}


def _checksum(listed: Listed) -> str:
    return content_checksum(*({name: pair[i] for name, pair in listed.items()} for i in range(2)))


def _refuse_overwriting(out: str | os.PathLike[str], adapters: Sequence[AdapterFile]) -> None:
    folders = [adapter.path if adapter.path.is_dir() else adapter.path.parent for adapter in adapters]
    if Path(out).resolve() in [folder.resolve() for folder in folders]:
        raise ValueError(f"{out} is one of the adapters that are read; give another folder for the result")


def _trained(adapters: Sequence[AdapterFile], listed: Listed, bases: Mapping[str, Tensor]) -> dict[str, Trained]:
    """Given entries, as they go to a file."""
    trained = {}
    for name, (indices, delta) in listed.items():
        if not finite(delta):
            raise ValueError(f"the combined values of {name} are not finite; give smaller weights")
        shape = next(adapter.targets[name]["shape"] for adapter in adapters if name in adapter.targets)
        trained[name] = Trained(tuple(shape), delta, bases[name], indices.to(pattern.index_dtype(math.prod(shape))))
    return trained


def _write(
    out: str | os.PathLike[str],
    checkpoint: Checkpoint,
    adapters: Sequence[AdapterFile],
    trained: Mapping[str, Trained],
    selection: dict[str, Any],
    left_out: tuple[str, ...],
) -> Combined:
    config = SparseConfig(strategy=GIVEN, target_modules=None, target_parameters=tuple(trained))
    base_model = next((adapter.base_model for adapter in adapters if adapter.base_model), checkpoint.folder.name)
    classes = next((adapter.architecture["classes"] for adapter in adapters if adapter.architecture), None)
    architecture = None if classes is None else {"classes": classes}
    made = AdapterFile.made(out, config, trained, base_model=base_model, selection=selection, architecture=architecture)
    folder = made.store()
    count = sum(part.delta.numel() for part in trained.values())
    return Combined(folder, count, selection["sources"], left_out)
