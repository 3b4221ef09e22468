"""How the cost of a step grows with density, tokens, the length of sequences, width and depth: the points that are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from methods import PEER_DENSITY, Method, at, expand
from report import Progress, Row
from rounds import Setting, time_methods

COLUMNS = (
    "unit", "machine", "axis", "x", "width", "layers", "dtype", "tokens", "length", "method", "label", "density", "trained",
    "seconds", "seconds_p20", "seconds_p80", "ratio", "ratio_p20", "ratio_p80", "forward", "backward", "optimizer", "repeats",
    "note",
)  # fmt: skip
TABLE = {
    "x": ("", "g"), "label": ("method", ""), "trained": ("trained weights", ",d"), "milliseconds": ("ms", ".1f"),
    "ratio": ("ratio to frozen", ".3f"), "ratio_p20": ("p20", ".3f"), "ratio_p80": ("p80", ".3f"),
    "forward_ms": ("forward", ".1f"),
    "backward_ms": ("backward", ".1f"), "optimizer_ms": ("optimizer", ".1f"), "note": ("", ""),
}  # fmt: skip
BASE = Setting(width=512, layers=2, dtype="fp32", tokens=512, length=256)
QUICK = Setting(width=64, layers=1, dtype="fp32", tokens=64, length=32)
NAMES = ("frozen", "sprand", "lora", "shira", "supertuning", "peft-sparta", "full")
VALUES: dict[str, tuple[float, ...]] = {
    "density": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "tokens": (128, 256, 512, 1024, 2048),
    "length": (64, 256, 1024),
    "width": (128, 256, 512, 768, 1024),
    "layers": (1, 2, 4, 8),
}
QUICK_VALUES: dict[str, tuple[float, ...]] = {
    "density": (0.01, 0.1), "tokens": (32, 64), "length": (16, 64), "width": (64, 128), "layers": (1, 2),
}  # fmt: skip
TITLES = {
    "density": "trained share of the linears", "tokens": "tokens in a batch", "length": "tokens in a sequence",
    "width": "width of the model", "layers": "layers",
}  # fmt: skip
MOST_OF_PEERS = 0.3


@dataclass(frozen=True)
class Point:
    """One place on one axis; all densities are one, since they are measured on one model.

    Attributes:
        axis: a key of `VALUES`.
        value: of the setting there; None for the axis of densities.
        setting: what is trained.
        densities: of sprand.
    """

    axis: str
    value: int | None
    setting: Setting
    densities: tuple[float, ...]

    @property
    def unit(self) -> str:
        return self.axis if self.value is None else f"{self.axis} {self.value}"

    @cached_property
    def methods(self) -> list[Method]:
        methods = expand(NAMES, self.densities, self.setting.dtype)
        if self.value is None:
            shared = [density for density in self.densities if density <= MOST_OF_PEERS]
            methods = [m for m in methods if m.key not in ("lora", "shira")]
            methods += [at(name, density) for name in ("lora", "shira") for density in shared]
        return methods

    def measure(self, repeats: int, warmup: int, bar: Progress) -> list[Row]:
        rows = time_methods(self.setting, self.methods, repeats, warmup, bar)
        return [
            {"unit": self.unit, "axis": self.axis, "x": row["density"] if self.value is None else self.value, **row}
            for row in rows
        ]


def points(quick: bool) -> list[Point]:
    base, values = (QUICK, QUICK_VALUES) if quick else (BASE, VALUES)
    found = [Point("density", None, base, values["density"])]
    for axis in ("tokens", "length", "width", "layers"):
        for value in map(int, values[axis]):
            fixed = {"tokens": {"length": min(values["tokens"])}, "length": {"tokens": max(values["length"])}}.get(axis, {})
            found.append(
                Point(axis, value, replace(base, **{name: int(v) for name, v in fixed.items()}, **{axis: value}), (PEER_DENSITY,))
            )
    return found


def shown(row: Row) -> Row:
    """A row with milliseconds beside its seconds."""
    if row.get("seconds") is None:
        return row
    phases = {f"{name}_ms": 1e3 * row[name] for name in ("forward", "backward", "optimizer")}
    return {**row, "milliseconds": 1e3 * row["seconds"], **phases}
