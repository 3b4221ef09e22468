"""Files that are replaced in one step: a reader, a crash or a full disk sees the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".sprand-tmp"


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `file` when the block ends well, and is gone when it does not.

    It lies in a hidden folder beside `file` that its process holds locked. What a process that was killed left there has lost
    its lock, and is removed by the next one to write there. All is on the disk, as far as the system can tell, when this ends.
    """
    remove_stale(file.parent)
    folder, lock = _locked_folder(file)
    temporary = folder / file.name
    try:
        yield temporary
        settle(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, file)
        settle(file.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def settle(path: Path) -> None:
    """Wait until a file's content, or which names a folder has, is on the disk.

    Raises:
        OSError: The file cannot be written there.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # a file system that has no fsync of folders
            raise
    finally:
        os.close(handle)


def _locked_folder(file: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=file.parent, prefix=f".{file.name}.", suffix=UNFINISHED))
        with contextlib.suppress(FileNotFoundError):  # another process took it for stale before it was locked
            lock = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks: nothing there counts as stale
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():
                return folder, lock
            os.close(lock)


def remove_stale(folder: Path) -> None:
    """Remove what writers that are no more have left in a folder."""
    with os.scandir(folder) as entries:
        hidden = [entry for entry in entries if entry.name.startswith(".")]
    unfinished = [entry.path for entry in hidden if entry.name.endswith(UNFINISHED)]
    for path in unfinished:
        with contextlib.suppress(OSError):  # locked by its writer, removed by another, or no folder
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
