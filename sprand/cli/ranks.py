"""Which of several processes of a run this is: the first one speaks and writes, the others work along in silence."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import torch


def is_first() -> bool:
    """Whether this is the first process of all, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def is_first_here() -> bool:
    """Whether this is the first process of its machine, which says what is wrong there."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def gpu() -> int:
    """The number of the GPU that is this process's."""
    return int(os.environ.get("LOCAL_RANK", 0))


def wait() -> None:
    """Wait until every process has come here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Let nothing be seen of what other processes than the first print, log and warn of."""
    if is_first():
        yield
        return
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
