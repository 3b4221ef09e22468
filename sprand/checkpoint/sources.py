"""Adapters that were read, each with its factor, and whether they can be mixed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter_file import read
from ..config import SparseConfig


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
