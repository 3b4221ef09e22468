"""What an adapter holds, in numbers: entries, density and size of the change of each parameter, and how they were chosen."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.file import AdapterFile, open_adapters
from ..kernels.ops import patched
from ..selection.mask import chosen_by
from ..selection.pattern import RANDOM_STRATEGIES
from .edits import edits_of, read_bases
from .shards import open_checkpoint


@dataclass(frozen=True)
class Line:
    """One parameter of an adapter.

    Attributes:
        name, shape: of the parameter.
        nnz: trained entries.
        values: frozen entries, of a redrawn mask or of `sprand diff`.
        density: both, over all entries.
        rms, largest: root mean square and largest size of the deltas.
        zero: share of the deltas that are zero.
        visible: share of the trained entries whose value in bfloat16 is other than the base's; None without a base.
    """

    name: str
    shape: tuple[int, ...]
    nnz: int
    values: int
    density: float
    rms: float
    largest: float
    zero: float
    visible: float | None


@dataclass(frozen=True)
class LargeChange:
    """One of the largest changes: where, and by how much."""

    name: str
    position: tuple[int, ...]
    delta: float


@dataclass(frozen=True)
class Report:
    """What an adapter holds.

    Attributes:
        path: the adapter.
        chosen: how its entries were chosen, in words.
        lines: its parameters.
        changes: the largest deltas.
        description: what is stored with it: configuration, version, base model, and a fingerprint of each parameter's base.
        saved: shape of each parameter that was trained in full.
    """

    path: Path
    chosen: str
    lines: list[Line]
    changes: list[LargeChange]
    description: dict[str, Any]
    saved: dict[str, list[int]]

    @property
    def nnz(self) -> int:
        """Trained entries of all parameters."""
        return sum(line.nnz for line in self.lines)

    @property
    def density(self) -> float:
        """Entries over the sizes of all parameters."""
        total = sum(math.prod(line.shape) for line in self.lines)
        return sum(line.nnz + line.values for line in self.lines) / max(1, total)

    @property
    def rms(self) -> float:
        """Root mean square of all deltas."""
        return math.sqrt(sum(line.rms**2 * line.nnz for line in self.lines) / max(1, self.nnz))

    @property
    def visible(self) -> float | None:
        """Share of all trained entries that bfloat16 shows; None without a base."""
        if any(line.visible is None for line in self.lines):
            return None
        return sum(line.visible * line.nnz for line in self.lines) / max(1, self.nnz)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "path": str(self.path), "chosen": self.chosen, "nnz": self.nnz, "density": self.density, "rms": self.rms,
            "visible": self.visible, "targets": [asdict(line) for line in self.lines],
            "largest_changes": [asdict(change) for change in self.changes], "saved": self.saved,
            "description": {key: value for key, value in self.description.items() if key != "saved"},
        }  # fmt: skip


def inspect(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, top: int = 10) -> Report:
    """Read an adapter, and its base if one is given.

    Args:
        path: folder of the adapter.
        base: folder of the base checkpoint; it is proven to be the adapter's.
        top: how many of the largest changes to name.

    Raises:
        FileNotFoundError: There is no adapter or no checkpoint.
        ValueError: The adapter is damaged, or of another base.
    """
    (adapter,) = open_adapters([(path, 1.0)])
    bases = {}
    if base is not None:
        checkpoint = open_checkpoint(base)
        bases = read_bases(checkpoint, edits_of(checkpoint, [adapter]))
    lines, changes = [], []
    for name in adapter.targets:
        lines.append(_line(adapter, name, bases.get(name)))
        changes += _largest(adapter, name, top)
    changes.sort(key=lambda change: -abs(change.delta))
    heads = {name: list(values.shape) for name, values in adapter.heads.items()}
    return Report(adapter.path, _chosen(adapter), lines, changes[:top], adapter.description, heads)


def _line(adapter: AdapterFile, name: str, base: Tensor | None) -> Line:
    _, deltas = adapter.entries(name)
    frozen = adapter.frozen(name)
    shape = tuple(adapter.targets[name]["shape"])
    values = 0 if frozen is None else frozen[0].numel()
    sizes = deltas.double().abs()
    some = deltas.numel() > 0
    return Line(
        name=name,
        shape=shape,
        nnz=deltas.numel(),
        values=values,
        density=(deltas.numel() + values) / max(1, math.prod(shape)),
        rms=float(sizes.square().mean().sqrt()) if some else 0.0,
        largest=float(sizes.max()) if some else 0.0,
        zero=float((sizes == 0).double().mean()) if some else 0.0,
        visible=None if base is None else _visible(base, deltas),
    )


def _largest(adapter: AdapterFile, name: str, top: int) -> list[LargeChange]:
    """The largest changes of one parameter."""
    indices, deltas = adapter.entries(name)
    shape = tuple(adapter.targets[name]["shape"])
    places = deltas.double().abs().topk(min(top, deltas.numel())).indices
    changes = []
    for index, delta in zip(indices[places].long(), deltas[places].tolist(), strict=True):
        position = torch.unravel_index(index, shape) if shape else ()
        changes.append(LargeChange(name, tuple(map(int, position)), delta))
    return changes


def plot(report: Report, path: str | os.PathLike[str]) -> Path:
    """Draw density and size of the change, a row per layer and a column per kind of module.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
    """
    from ..adapters.plots import averaged, draw

    sizes = {line.name: math.prod(line.shape) for line in report.lines}
    density, rms = ({line.name: getattr(line, number) for line in report.lines} for number in ("density", "rms"))
    panels = [
        (averaged(density, sizes), f"density: {report.nnz:,} entries, {report.chosen}", "density", ".2%"),
        (averaged(rms, sizes), "root mean square of the deltas", "rms", ".2g"),
    ]
    return draw(panels, path)


def _visible(base: Tensor, deltas: Tensor) -> float:
    if not base.numel():
        return 0.0
    rounded = base.to(torch.bfloat16)
    return float((patched(rounded, deltas.float()) != rounded).double().mean())


def _chosen(adapter: AdapterFile) -> str:
    config = adapter.config
    if adapter.selection:
        return chosen_by(adapter.selection)
    if config.strategy in RANDOM_STRATEGIES:
        amount = f"density {config.density:g}" if config.density else f"budget {config.budget}"
        layout = "" if config.layout == "unstructured" else f", {config.layout}"
        return f"{config.strategy}, {amount}, seed {config.seed}{layout}"
    return "given indices"
