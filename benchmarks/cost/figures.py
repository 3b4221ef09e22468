"""The figures of the cost suite: time of a step along each axis, on log axes, and what the life of an adapter costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cost.growth import TITLES
from plots import OURS, THEIRS, panels, plain_ticks
from report import Row

STYLES = {
    "frozen": ("black", "--"), "sprand": (OURS[1], "o-"), "lora": ("#2a6f97", "s-"), "shira": ("#7d92a3", "^-"),
    "supertuning": ("#9a7fb0", "v-"), "peft-sparta": ("#6a9f6a", "D-"), "full": ("#8c2f39", "x-"),
}  # fmt: skip


def growth(rows: Sequence[Row], path: Path) -> None:
    """One panel per axis; the frozen model is the floor."""
    rows = [row for row in rows if row.get("seconds") is not None]
    for panel, axis in panels([axis for axis in TITLES if any(row["axis"] == axis for row in rows)], path):
        here = [row for row in rows if row["axis"] == axis]
        for name, (color, style) in STYLES.items():
            mine = [row for row in here if str(row["method"]).partition("@")[0] == name]
            if not mine:
                continue
            label = str(mine[0]["label"])
            if axis == "density":
                label = label.rsplit(" ", 2)[0] if "@" in str(mine[0]["method"]) else label
            if axis == "density" and len(mine) == 1:
                panel.axhline(
                    1e3 * mine[0]["seconds"], color=color, linestyle="--" if name == "frozen" else ":", label=label, linewidth=1
                )
                continue
            mine = sorted(mine, key=lambda row: row["x"])
            panel.plot(
                [row["x"] for row in mine], [1e3 * row["seconds"] for row in mine], style, color=color, label=label, markersize=4
            )
        panel.set_xscale("log")
        panel.set_yscale("log")
        plain_ticks(panel.xaxis, panel.yaxis)
        panel.set_xlabel(TITLES[axis])
        panel.set_ylabel("one training step, ms")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=7)


def life(rows: Sequence[Row], path: Path) -> None:
    """Bytes on disk, seconds to set up, seconds to merge: one bar per size and method."""
    rows = [row for row in rows if row.get("bytes") is not None]
    quantities = {"bytes": "MB on disk", "set_up": "set-up, seconds", "merge": "merging in memory, seconds"}
    labels = list(dict.fromkeys(str(row["label"]) for row in rows))
    units = list(dict.fromkeys(str(row["unit"]) for row in rows))
    height = 0.8 / max(1, len(units))
    for panel, quantity in panels(list(quantities) if rows else [], path):
        for row in rows:
            if not row[quantity] or (quantity == "merge" and row["method"] == "full"):
                continue
            shade = units.index(str(row["unit"]))
            family = OURS if str(row["method"]).startswith("sprand") else THEIRS
            y = labels.index(str(row["label"])) + (shade - (len(units) - 1) / 2) * height
            length = row[quantity] / 1e6 if quantity == "bytes" else row[quantity]
            panel.barh(y, length, height, color=family[shade % 3])
        panel.set_yticks(range(len(labels)), labels)
        panel.invert_yaxis()
        panel.set_xscale("log")
        plain_ticks(panel.xaxis)
        panel.set_xlabel(quantities[quantity])
        panel.set_title(f"bars top to bottom: {'; '.join(units)}", fontsize=8)
        panel.grid(axis="x", alpha=0.3)
