"""A checkpoint folder that appears whole or not at all: written under a hidden name, gone on with after a stop, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..files.atomic import settle
from .shards import INDEX, Checkpoint

REVERT_FILE, REVERT_KEY = "sprand_revert.dat", "sprand_revert"  # not *.safetensors: servers load every such file of a folder
STATE_FILE = "sprand_unfinished.json"
OTHER_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5",
    "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", REVERT_FILE, STATE_FILE,
)  # fmt: skip


class NewFolder:
    """A folder in the making.

    Args:
        out: what it will be called.
        identity: what decides its content; one that was left unfinished with another identity is thrown away.

    Raises:
        FileExistsError: A file of this name is there, or a folder that is not empty.
    """

    def __init__(self, out: str | os.PathLike[str], identity: Any) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.with_name(f".{self.out.name}.sprand-unfinished")
        self.identity = json.dumps(identity)
        empty = self.out.is_dir() and not any(self.out.iterdir())
        if self.out.exists() and not empty:
            raise FileExistsError(f"{out} exists; give a new folder, or an empty one")

    def begin(self) -> Path:
        """Make the hidden folder, or find what an earlier run left in it."""
        state = self.path / STATE_FILE
        unfinished = not self.path.is_symlink() and state.is_file()
        if not unfinished or state.read_text(encoding="utf-8") != self.identity:
            self.discard()
            self.path.mkdir(parents=True)
            state.write_text(self.identity, encoding="utf-8")
        return self.path

    def discard(self) -> None:
        """Remove what was written."""
        if self.path.is_symlink():
            self.path.unlink()
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self) -> Path:
        """Give it its name, when all it holds is on the disk."""
        (self.path / STATE_FILE).unlink()
        for path in sorted(self.path.rglob("*")):
            settle(path)
        settle(self.path)
        os.replace(self.path, self.out)
        settle(self.out.parent)
        return self.out


def identity_of(checkpoint: Checkpoint, **more: Any) -> dict[str, Any]:
    """What tells one checkpoint on this disk from another, cheaply, and further facts."""
    shards = [(str(shard.path.resolve()), shard.size, shard.path.stat().st_mtime_ns) for shard in checkpoint.shards.values()]
    return {"shards": shards, **more}


def carry_over(base: Path, folder: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Copy configuration, tokenizer and other files of a checkpoint folder; weights in any form are left out.

    Args:
        base: what was given as the checkpoint; nothing is copied where it is a single file.
        folder: where to.
        checkpoint: its safetensors files are written otherwise.

    Returns:
        What was left out, relative to `base`: weights in another form, which would be those of the base.
    """
    left_out = []
    written_otherwise = (*checkpoint.shards, INDEX, REVERT_FILE)
    for path in _files(base) if base.is_dir() else ():
        name = path.relative_to(base)
        if not any(fnmatch(path.name, pattern) for pattern in OTHER_WEIGHTS):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        elif str(name) not in written_otherwise:
            left_out.append(str(name))
    return tuple(left_out)


def _files(base: Path) -> Iterator[Path]:
    """The files of a folder and its folders, but for hidden folders, where version control and downloads keep theirs."""
    for path in sorted(base.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from (inner for inner in sorted(path.rglob("*")) if inner.is_file())
        elif path.is_file():
            yield path
