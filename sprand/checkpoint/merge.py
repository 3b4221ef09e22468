"""Merges adapters into a checkpoint folder without loading a model, exactly, and proves what was written."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.file import AdapterFile, open_adapters
from ..files import described
from .edits import EditedParameter, Edits, edits_of
from .folder import REVERT_FILE, REVERT_KEY, NewFolder, carry_over, identity_of
from .head_config import CONFIG, head_config
from .shards import INDEX, Checkpoint, Shard, open_checkpoint
from .stream import Progress, Rewrite, RewrittenShard

Adapters = Iterable[tuple[str | os.PathLike[str], float]]


@dataclass(frozen=True)
class Merged:
    """What a merge wrote, or a revert.

    Attributes:
        folder: the new checkpoint.
        entries: how many entries are other than in what was read, whole tensors included.
        tensors: how many tensors have some.
        added: names of tensors that were added (or, by `revert`, taken out).
        left_out: files that hold weights in another form and were not copied, relative to the folder that was read.
        config: fields of `config.json` that are other than in what was read.
        unsaid: what `config.json` lacks of a head that was added, in a sentence; None where it lacks nothing.
    """

    folder: Path
    entries: int
    tensors: int
    added: tuple[str, ...]
    left_out: tuple[str, ...]
    config: tuple[str, ...] = ()
    unsaid: str | None = None


def merge(
    base: str | os.PathLike[str],
    adapters: Adapters,
    out: str | os.PathLike[str],
    *,
    revertible: bool = True,
    progress: Progress = lambda count: None,
) -> Merged:
    """Write a checkpoint with adapters merged into it: the bits that `sprand.load`, `sprand.merge` and saving would give.

    One adapter with weight 1 is merged whole; several, or other weights, are summed as by `sprand.switch(model, {name: weight})`.
    Everything is written to a hidden folder beside `out`, which takes its name at the end. A merge that was stopped goes on
    with the files that are missing there.

    Args:
        base: folder of the base checkpoint, or one safetensors file.
        adapters: folders of adapters, each with its weight.
        out: the folder to make; it must not exist, or be empty.
        revertible: also keep the base values of the changed entries, in `sprand_revert.dat`.
        progress: called with the number of bytes that are done.

    Raises:
        FileNotFoundError: There is no checkpoint or no adapter.
        FileExistsError: A file `out` is there, or a folder that is not empty.
        ValueError: An adapter is of another base or damaged. `out` is not there then.
        OSError: The folder cannot be written. `out` is not there then.
    """
    checkpoint, opened = open_checkpoint(base), open_adapters(adapters)
    warn_of_twins(opened)
    made = NewFolder(out, identity_of(checkpoint, adapters=adapters_of(opened)))
    edits = edits_of(checkpoint, opened)
    job, config = _Job(checkpoint, edits), head_config(checkpoint, opened, edits)
    job.prove_samples()
    unfinished = made.begin()
    try:
        with edits.worked_out_ahead(checkpoint):
            for shard in checkpoint.shards.values():
                if not (unfinished / shard.name).is_file() or job.differs(unfinished, shard, lambda count: None) is not None:
                    job.write(unfinished, shard, progress)
                else:
                    progress(shard.size)
        edits.prove()
    except ValueError:
        made.discard()
        raise
    left_out = carry_over(Path(base), unfinished, checkpoint)
    job.write_index(unfinished)
    config.write(checkpoint, unfinished)
    if revertible:
        description = job.revert_description(opened, bool(config.fields))
        described.write(unfinished / REVERT_FILE, REVERT_KEY, description, edits.base_values())
    count, added = len(edits.by_tensor) + len(edits.added), tuple(edits.added)
    return Merged(made.finish(), edits.count, count, added, left_out, tuple(config.fields), config.unsaid)


def verify(
    base: str | os.PathLike[str],
    adapters: Adapters,
    out: str | os.PathLike[str],
    *,
    progress: Progress = lambda count: None,
) -> None:
    """Read a merged checkpoint and its base again, and prove every byte: changed entries, and all that must not change.

    Raises:
        ValueError: Something is different; the message names the tensor.
    """
    checkpoint, opened = open_checkpoint(base), open_adapters(adapters)
    edits = edits_of(checkpoint, opened)
    job, config = _Job(checkpoint, edits), head_config(checkpoint, opened, edits)
    with edits.worked_out_ahead(checkpoint):
        for shard in checkpoint.shards.values():
            wrong = job.differs(Path(out), shard, progress)
            if wrong is not None:
                raise ValueError(f"{Path(out) / shard.name} is not what the merge writes: {wrong} is different; merge again")
    edits.prove()
    if checkpoint.index is not None and json.loads((Path(out) / INDEX).read_text(encoding="utf-8")) != job.index():
        raise ValueError(f"{Path(out) / INDEX} is not what the merge writes; merge again")
    if config.fields and (Path(out) / CONFIG).read_text(encoding="utf-8") != config.text(checkpoint):
        raise ValueError(f"{Path(out) / CONFIG} is not what the merge writes; merge again")


class _Job:
    """The files of one merge of adapters into a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, edits: Edits) -> None:
        self.checkpoint, self.edits = checkpoint, edits
        self.last = list(checkpoint.shards)[-1]
        self.rewrites = {name: Rewrite(edit.stored, edit.touches, edit.apply) for name, edit in edits.by_tensor.items()}
        for parameter in edits.parameters:
            edit, *others = parameter.edits
            if not others and len(edit.claims) == 1:  # it can be proven as soon as its tensor is done
                self.rewrites[edit.stored.name] = Rewrite(edit.stored, edit.touches, edit.apply, parameter.prove)

    def prove_samples(self) -> None:
        """Prove the smallest parameters, one of each shard, so that a wrong base is refused before anything is written."""
        smallest: dict[str, EditedParameter] = {}
        for parameter in sorted(self.edits.parameters, key=lambda parameter: parameter.numel):
            smallest.setdefault(parameter.edits[0].stored.file, parameter)
        for parameter in smallest.values():
            parameter.apply(self.checkpoint)

    def write(self, folder: Path, shard: Shard, progress: Progress) -> None:
        """Write one file."""
        unfinished = folder / f"{shard.name}.part"
        self._rewritten(shard).write(unfinished, progress)
        os.replace(unfinished, folder / shard.name)

    def differs(self, folder: Path, shard: Shard, progress: Progress) -> str | None:
        """What is different between a written file and what it should be."""
        if not (folder / shard.name).is_file():
            return "all of it (there is no such file)"
        return self._rewritten(shard).differs(folder / shard.name, progress)

    def index(self) -> dict[str, Any] | None:
        """The index of the new checkpoint; None where there is one file."""
        index, added = copy.deepcopy(self.checkpoint.index), self.edits.added
        if index is None or not added:
            return index
        index["weight_map"] |= {name: self.last for name in added}
        metadata = index.get("metadata") or {}
        size, count = sum(values.nbytes for values in added.values()), sum(values.numel() for values in added.values())
        for key, total in (("total_size", size), ("total_parameters", count)):
            if isinstance(metadata.get(key), int):
                metadata[key] += total
        return index

    def write_index(self, folder: Path) -> None:
        """Write the index, with the bytes of the base's where nothing was added."""
        if self.checkpoint.index is not None and self.edits.added:
            (folder / INDEX).write_text(json.dumps(self.index(), indent=2) + "\n", encoding="utf-8")
        elif self.checkpoint.index is not None:
            shutil.copyfile(self.checkpoint.folder / INDEX, folder / INDEX)

    def revert_description(self, opened: Iterable[AdapterFile], new_config: bool) -> dict[str, Any]:
        """What `revert` needs beside the base values: which adapters, and what the files were that say other things now."""
        folder, header = self.checkpoint.folder, None
        if self.edits.added:
            shard = self.checkpoint.shards[self.last]
            with open(shard.path, "rb") as file:
                header = file.read(shard.data)[8:].decode()
        new_index = bool(self.edits.added) and self.checkpoint.index is not None
        return {
            "format_version": 1,
            "adapters": adapters_of(opened),
            "added": list(self.edits.added),
            "header": header,
            "index": (folder / INDEX).read_bytes().decode() if new_index else None,
            "config": (folder / CONFIG).read_bytes().decode() if new_config else None,
        }

    def _rewritten(self, shard: Shard) -> RewrittenShard:
        return RewrittenShard(shard, self.rewrites, self.edits.added if shard.name == self.last else {})


def warn_of_twins(opened: Iterable[AdapterFile]) -> None:
    """Warn where an adapter is given more than once, under whatever path: its changes count each time."""
    paths: dict[tuple[Any, ...], list[str]] = {}
    for adapter in opened:
        drawn = adapter.config.strategy, adapter.config.seed, adapter.config.layout
        paths.setdefault((adapter.checksum, *drawn), []).append(str(adapter.path))
    for same in paths.values():
        if len(same) > 1:
            warnings.warn(
                f"{' and '.join(same)} are one adapter, whose changes count {len(same)} times; give it once if that is not meant",
                stacklevel=3,
            )


def adapters_of(opened: Iterable[AdapterFile]) -> list[dict[str, Any]]:
    """Which adapters, with which weights."""
    return [{"checksum": adapter.checksum, "weight": adapter.weight} for adapter in opened]
