"""Forked copies of the test process: killed at random, stopped at a call, short of disk space; what they find comes back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A copy of a process has none of its threads: torch must not count on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def started(work: Callable[[], object]) -> int:
    """A copy that does the work and leaves, with 0, or with 1 where it raised."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(child: int) -> int:
    """How it left; minus a number where that signal killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(seconds: float, work: Callable[[], object]) -> int:
    """Let a copy work, and kill it after so long."""
    child = started(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return status_of(child)


def killed_at(owner: object, name: str, number: int, before: bool, work: Callable[[], object]) -> int:
    """Let a copy work, and kill it before or after its call `number` of a function."""

    def run() -> None:
        function, calls = getattr(owner, name), []

        def deadly(*args: object, **options: object) -> object:
            calls.append(None)
            if len(calls) == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, deadly)
        work()

    return status_of(started(run))


def on_small_disk(folder: Path, size: int, work: Callable[[], object]) -> None:
    """Let a copy work with a file system of `size` bytes at a folder, in a namespace of its own; its failure fails the test."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()

    def run() -> None:
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
            os._exit(77)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) != 0:
            os._exit(77)
        work()

    status = status_of(started(run))
    if status == 77:
        pytest.skip("this kernel lets nobody mount a small file system in a namespace of their own (unshare -Urm)")
    assert status == 0
