"""Takes merged adapters out of a checkpoint again: the base, bit for bit, from the values that the merge kept."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from torch import Tensor

from ..adapters.file import open_adapters
from ..files import described
from ..files.forms import NUMBER, TEXT, WHOLE, list_of, optional, record
from .edits import Edits, edits_of
from .folder import REVERT_FILE, REVERT_KEY, NewFolder, carry_over, identity_of
from .head_config import CONFIG
from .merge import Adapters, Merged, adapters_of
from .shards import INDEX, Checkpoint, open_checkpoint, read_header
from .stream import Progress, Rewrite, RewrittenShard

FORM = record(
    {
        "format_version": WHOLE,
        "adapters": list_of(record({"checksum": TEXT, "weight": NUMBER})),
        "added": list_of(TEXT),
        "header": optional(TEXT),
        "index": optional(TEXT),
    },
    {"config": optional(TEXT)},
)


def revert(
    merged: str | os.PathLike[str], adapters: Adapters, out: str | os.PathLike[str], *, progress: Progress = lambda count: None
) -> Merged:
    """Write the base of a merged checkpoint.

    A merged value and a delta do not determine the base value: it was rounded. The merge keeps the base values of the changed
    entries in `sprand_revert.dat`; where they are, what was merged, and that they are those of the base is known from the
    adapters. Every entry is proven: the base value found, changed by the adapters, must give the merged one.

    Args:
        merged: a folder that `merge` wrote.
        adapters: those that were merged, with the same weights, in the same order.
        out: the folder to make; it must not exist, or be empty.
        progress: called with the number of bytes that are done.

    Raises:
        FileNotFoundError: There is no merged checkpoint, no adapter, or no base values.
        FileExistsError: A file `out` is there, or a folder that is not empty.
        ValueError: Other adapters were merged, or the checkpoint was changed since. `out` is not there then.
        OSError: The folder cannot be written. `out` is not there then.
    """
    opened = open_adapters(adapters)
    folder = Path(merged)
    if not (folder / REVERT_FILE).is_file():
        raise FileNotFoundError(
            f"no {REVERT_FILE} in {merged}: a merged value and a delta do not determine the base value, and only a merge that "
            "keeps the base values can be reverted; take the base checkpoint instead"
        )
    description, values = described.read(folder / REVERT_FILE, REVERT_KEY, "merge's base values", FORM)
    if description["format_version"] != 1:
        raise ValueError(f"{folder / REVERT_FILE} has format {description['format_version']}; install a newer sprand")
    if description["adapters"] != adapters_of(opened):
        weights = ", ".join(str(entry["weight"]) for entry in description["adapters"])
        raise ValueError(
            f"{merged} was merged from other adapters, or with other weights: expected {len(description['adapters'])}, with "
            f"weights {weights}, in the order of the merge"
        )
    checkpoint = _without(open_checkpoint(merged), description["added"])
    made = NewFolder(out, identity_of(checkpoint, revert=adapters_of(opened)))
    edits = edits_of(checkpoint, opened)
    _give_base(edits, values, folder / REVERT_FILE)
    edits.prove()
    rewrites = {name: Rewrite(edit.stored, edit.touches, edit.restore) for name, edit in edits.by_tensor.items()}
    last = list(checkpoint.shards)[-1]
    made.discard()
    unfinished = made.begin()
    try:
        for shard in checkpoint.shards.values():
            text = description["header"].encode() if shard.name == last and description["header"] is not None else None
            header = None if text is None else len(text).to_bytes(8, "little") + text
            RewrittenShard(shard, rewrites, header=header).write(unfinished / shard.name, progress)
            if header is not None:
                read_header(unfinished / shard.name)
    except ValueError:
        made.discard()
        raise
    left_out = carry_over(folder, unfinished, checkpoint)
    if description.get("config") is not None:
        (unfinished / CONFIG).write_bytes(description["config"].encode())
    if description["index"] is not None:
        (unfinished / INDEX).write_bytes(description["index"].encode())
    elif checkpoint.index is not None:
        shutil.copyfile(folder / INDEX, unfinished / INDEX)
    count = sum(value.numel() for value in values.values())
    return Merged(made.finish(), count, len(rewrites), tuple(description["added"]), left_out)


def _without(checkpoint: Checkpoint, added: list[str]) -> Checkpoint:
    """The same files, seen as if they did not hold some tensors."""
    shards = {
        name: dataclasses.replace(shard, tensors=tuple(stored for stored in shard.tensors if stored.name not in added))
        for name, shard in checkpoint.shards.items()
    }
    tensors = {name: stored for name, stored in checkpoint.tensors.items() if name not in added}
    return dataclasses.replace(checkpoint, shards=shards, tensors=tensors)


def _give_base(edits: Edits, values: dict[str, Tensor], file: Path) -> None:
    """Let every edit know what its tensor held before."""
    expected = {name: (value.shape, value.dtype) for name, value in edits.base_values().items()}
    if expected != {name: (value.shape, value.dtype) for name, value in values.items()}:
        raise ValueError(f"{file} does not hold the base values of these adapters; take the base checkpoint instead")
    for name, base in edits.base_values().items():
        base.copy_(values[name])
