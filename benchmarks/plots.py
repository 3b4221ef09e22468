"""The figures of the benchmarks; without matplotlib they say so and the tables stand alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from report import Row

OURS = ("#f6b26b", "#e07b00", "#8a4b00")
THEIRS = ("#b7c4cf", "#7d92a3", "#4a5f70")


def time_ratios(rows: Sequence[Row], path: Path) -> None:
    """Step time over the frozen model's, per method and width, one panel per dtype."""
    rows = [row for row in rows if row.get("ratio") is not None and row["method"] != "frozen"]
    for panel, dtype in panels([_dtype(row) for row in rows], path):
        here = [row for row in rows if _dtype(row) == dtype]
        widths = sorted({row["width"] for row in here})
        labels = list(dict.fromkeys(row["label"] for row in here))
        height = 0.8 / len(widths)
        for row in here:
            shade = widths.index(row["width"])
            y = labels.index(row["label"]) + (shade - (len(widths) - 1) / 2) * height
            error = [[max(row["ratio"] - row["ratio_p20"], 0)], [max(row["ratio_p80"] - row["ratio"], 0)]]
            panel.barh(y, row["ratio"] - 1, height, left=1, color=_color(row, shade, len(widths)))
            panel.errorbar(row["ratio"], y, xerr=error, color="black", linewidth=0.8)
            side = row["ratio_p80"] if row["ratio"] >= 1 else 1
            panel.annotate(f"{row['ratio']:.2f}", (max(side, 1), y), (4, 0), textcoords="offset points", va="center", fontsize=7)
        _finish(panel, labels, f"{dtype}, bars top to bottom: {', '.join(map(str, widths))} wide")
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xlabel("training step / frozen model's forward + input-gradient backward")


def memory(rows: Sequence[Row], path: Path) -> None:
    """Peak memory above the frozen model's at the most tokens measured, per method, one panel per dtype and setting."""
    rows = [row for row in rows if row.get("above_mib") is not None and row["method"] != "frozen"]
    rows = [row for row in rows if row["tokens"] == max(other["tokens"] for other in rows)]
    for panel, setting in panels([_setting(row) for row in rows], path):
        here = [row for row in rows if _setting(row) == setting]
        labels = [row["label"] for row in here]
        end = 1.15 * max([row["above_mib"] for row in here if row["method"] != "full"] or [here[0]["above_mib"]])
        for y, row in enumerate(here):
            beyond = row["above_mib"] > end > 0
            saved = min(max(row.get("saved_above_mib") or 0, 0), max(row["above_mib"], 0))
            panel.barh(y, row["above_mib"], 0.7, color=_color(row, 1, 3))
            panel.barh(y, saved, 0.7, color="none", hatch="////", edgecolor="white", linewidth=0)
            text = f"{row['above_mib']:.0f}" + (" (bar cut off)" if beyond else "")
            place = {"xytext": (-4, 0), "ha": "right", "color": "white"} if beyond else {"xytext": (4, 0)}
            x = end if beyond else max(row["above_mib"], 0)
            panel.annotate(text, (x, y), textcoords="offset points", va="center", fontsize=8, **place)
        _finish(panel, labels, setting)
        if end > 0:
            panel.set_xlim(right=end)
        panel.set_xlabel("MiB above the frozen model's own peak (hatched: activations saved for backward)")


def speedups(rows: Sequence[Row], path: Path) -> None:
    """Plain PyTorch's time over ours, per op, one panel per dtype; one dot per shape, one line of dots per density."""
    rows = [row for row in rows if row.get("speedup") is not None]
    for panel, dtype in panels([_dtype(row) for row in rows], path):
        here = [row for row in rows if _dtype(row) == dtype]
        labels = list(dict.fromkeys(_operator(row) for row in here))
        densities = sorted({row["density"] for row in here})
        for index, density in enumerate(densities):
            dots = [row for row in here if row["density"] == density]
            offset = (index - (len(densities) - 1) / 2) * 0.8 / len(densities)
            x, y = [row["speedup"] for row in dots], [labels.index(_operator(row)) + offset for row in dots]
            panel.plot(x, y, "o", color=_shade(OURS, index, len(densities)), markersize=5, label=f"{100 * density:g} %")
        _finish(panel, labels, dtype)
        panel.set_xscale("log")
        plain_ticks(panel.xaxis)
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xlabel("times faster than the fastest plain PyTorch, one dot per shape")
        panel.legend(title="density", fontsize=8)


def _operator(row: Row) -> str:
    return str(row["op"]) if row.get("layout", "unstructured") == "unstructured" else f"{row['op']}, {row['layout']}"


def _dtype(row: Row) -> str:
    return str(row["dtype"])


def _setting(row: Row) -> str:
    return f"{row['dtype']}, {row['tokens']} tokens" + (", checkpointing" if row["checkpointing"] else "")


def panels(
    names: Iterable[str], path: Path, across: int = 2, size: tuple[float, float] = (7.5, 4.8)
) -> Iterator[tuple[Any, str]]:
    """A panel for each name, to be drawn on, at most `across` in a row, each of `size` inches; then the figure is saved.

    There is none at all where nothing can be drawn, which is said.
    """
    names = list(dict.fromkeys(names))
    if not names:
        print(f"{path.name} not drawn: no numbers", file=sys.stderr)
        return
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name} not drawn: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(len(names), across)
    down = -(-len(names) // across)
    figsize = (size[0] * across, size[1] * down)
    figure, axes = pyplot.subplots(down, across, figsize=figsize, squeeze=False, layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    yield from zip(axes.flat, names, strict=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _shade(family: tuple[str, str, str], index: int, count: int) -> str:
    return family[1] if count == 1 else family[min(round(2 * index / (count - 1)), 2)]


def _color(row: Row, index: int, count: int) -> str:
    return _shade(OURS if str(row["method"]).startswith("sprand") else THEIRS, index, count)


def _finish(panel, labels: Sequence[str], title: str) -> None:
    panel.set_yticks(range(len(labels)), labels)
    panel.invert_yaxis()
    panel.set_title(title, fontsize=10)
    panel.margins(x=0.12)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def plain_ticks(*axes: Any) -> None:
    """Logarithmic axes on which all is drawn get their numbers written out: at each decade, of a few also at 2 and 5."""
    from matplotlib import ticker

    for axis in axes:
        low, high = axis.get_view_interval()
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}")
        axis.set_minor_formatter(ticker.NullFormatter())


def selection(rows: Sequence[Row], path: Path) -> None:
    """Time and memory of each way to choose entries, over the model's own forward and backward."""
    rows = [row for row in rows if row.get("ratio") is not None]
    labels = [str(row["method"]) for row in rows]
    colours = [THEIRS[1] if label.startswith("naive") else "grey" if label == "one pass" else OURS[1] for label in labels]
    what = {"ratio": "seconds over one forward and backward of the same data", "above_mib": "MiB above its peak"}
    for panel, column in panels(what if rows else (), path):
        panel.barh(range(len(rows)), [row[column] for row in rows], 0.7, color=colours)
        for y, row in enumerate(rows):
            panel.annotate(
                f"{row[column]:.2f}" if column == "ratio" else f"{row[column]:.0f}", (max(row[column], 0), y), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        _finish(panel, labels, "")
        panel.set_xlabel(what[column])


def switching(rows: Sequence[Row], path: Path) -> None:
    """Time of a switch, one panel per model."""
    rows = [row for row in rows if row.get("seconds")]
    for panel, name in panels([f"{row['dtype']}, {row['width']} wide" for row in rows], path):
        here = [row for row in rows if f"{row['dtype']}, {row['width']} wide" == name]
        for y, row in enumerate(here):
            panel.barh(y, 1e3 * row["seconds"], 0.7, color=_color(row | {"method": row["label"]}, 1, 3))
            place = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            panel.annotate(f"{1e3 * row['seconds']:.2f}", (1e3 * row["seconds"], y), (4, 0), **place)
        _finish(panel, [row["label"] for row in here], f"{name}, {here[0]['device']}")
        panel.set_xscale("log")
        plain_ticks(panel.xaxis)
        panel.set_xlabel("one switch, ms")


def long_run(rows: Sequence[Row], path: Path) -> None:
    """Loss and resident memory against steps, one line per run."""
    styles = {
        "sparse": (OURS[2], "-", 1.5), "full": (OURS[1], "-", 4.0), "dense": ("black", "-", 1.2), "again": (THEIRS[2], ":", 1.2),
    }  # fmt: skip
    what = {"loss": "loss, mean of a hundredth of the steps, nats", "rss_mib": "RSS over its first look, MiB"}
    for panel, column in panels(what, path):
        for key in dict.fromkeys(str(row["run"]) for row in rows):
            here = [row for row in rows if row["run"] == key]
            color, style, width = styles[key]
            start, most = (0, width) if column == "loss" else (here[0][column], 2)
            steps, values = [row["step"] for row in here], [row[column] - start for row in here]
            panel.plot(steps, values, style, color=color, linewidth=min(width, most), label=str(here[0]["label"]))
        if column == "loss":
            place = (steps[-1], rows[0]["floor"])
            panel.axhline(rows[0]["floor"], color="grey", linestyle="--", linewidth=1)
            panel.annotate("entropy of the source", place, (0, 3), textcoords="offset points", ha="right", fontsize=8)
        panel.set_ylabel(what[column])
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
