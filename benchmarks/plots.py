"""The figures of the benchmarks; without matplotlib they say so and the tables stand alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from report import Row

OURS = ("#f6b26b", "#e07b00", "#8a4b00")
THEIRS = ("#b7c4cf", "#7d92a3", "#4a5f70")


def time_ratios(rows: Sequence[Row], path: Path) -> None:
    """Step time over the frozen model's, per method and width, one panel per dtype."""
    rows = [row for row in rows if row.get("ratio") is not None and row["method"] != "frozen"]
    figure, panels = figure_with([_dtype(row) for row in rows], path)
    if figure is None:
        return
    for panel, dtype in panels:
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
    figure_saved(figure, path)


def memory(rows: Sequence[Row], path: Path) -> None:
    """Peak memory above the frozen model's at the most tokens measured, per method, one panel per dtype and setting."""
    rows = [row for row in rows if row.get("above_mib") is not None and row["method"] != "frozen"]
    rows = [row for row in rows if row["tokens"] == max(other["tokens"] for other in rows)]
    figure, panels = figure_with([_setting(row) for row in rows], path)
    if figure is None:
        return
    for panel, setting in panels:
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
    figure_saved(figure, path)


def speedups(rows: Sequence[Row], path: Path) -> None:
    """Plain PyTorch's time over ours, per op, one panel per dtype; one dot per shape, one line of dots per density."""
    rows = [row for row in rows if row.get("speedup") is not None]
    figure, panels = figure_with([_dtype(row) for row in rows], path)
    if figure is None:
        return
    for panel, dtype in panels:
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
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xlabel("times faster than the fastest plain PyTorch, one dot per shape")
        panel.legend(title="density", fontsize=8)
    figure_saved(figure, path)


def _operator(row: Row) -> str:
    return str(row["op"]) if row.get("layout", "unstructured") == "unstructured" else f"{row['op']}, {row['layout']}"


def _dtype(row: Row) -> str:
    return str(row["dtype"])


def _setting(row: Row) -> str:
    return f"{row['dtype']}, {row['tokens']} tokens" + (", checkpointing" if row["checkpointing"] else "")


def figure_with(names: Sequence[str], path: Path, across: int = 2, size: tuple[float, float] = (7.5, 4.8)):
    """A figure and its panels by name, at most `across` in a row, each of `size` inches; (None, []) where nothing is drawn."""
    names = list(dict.fromkeys(names))
    if not names:
        print(f"{path.name} not drawn: no numbers", file=sys.stderr)
        return None, []
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name} not drawn: matplotlib is not installed", file=sys.stderr)
        return None, []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(len(names), across)
    down = -(-len(names) // across)
    figsize = (size[0] * across, size[1] * down)
    figure, axes = pyplot.subplots(down, across, figsize=figsize, squeeze=False, layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    return figure, list(zip(axes.flat, names, strict=False))


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


def figure_saved(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    from matplotlib import pyplot

    pyplot.close(figure)


def selection(rows: Sequence[Row], path: Path) -> None:
    """Time and memory of each way to choose entries, over the model's own forward and backward."""
    rows = [row for row in rows if row.get("ratio") is not None]
    figure, panels = figure_with(["time", "memory"] if rows else [], path)
    if figure is None:
        return
    labels = [str(row["method"]) for row in rows]
    colours = [THEIRS[1] if label.startswith("naive") else "grey" if label == "one pass" else OURS[1] for label in labels]
    for (panel, _), column, what in zip(
        panels,
        ("ratio", "above_mib"),
        ("seconds over one forward and backward of the same data", "MiB above its peak"),
        strict=True,
    ):
        panel.barh(range(len(rows)), [row[column] for row in rows], 0.7, color=colours)
        for y, row in enumerate(rows):
            panel.annotate(
                f"{row[column]:.2f}" if column == "ratio" else f"{row[column]:.0f}", (max(row[column], 0), y), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        _finish(panel, labels, "")
        panel.set_xlabel(what)
    figure_saved(figure, path)


def switching(rows: Sequence[Row], path: Path) -> None:
    """Time of a switch, one panel per model."""
    rows = [row for row in rows if row.get("seconds")]
    figure, panels = figure_with([f"{row['dtype']}, {row['width']} wide" for row in rows], path)
    if figure is None:
        return
    for panel, name in panels:
        here = [row for row in rows if f"{row['dtype']}, {row['width']} wide" == name]
        for y, row in enumerate(here):
            panel.barh(y, 1e3 * row["seconds"], 0.7, color=_color(row | {"method": row["label"]}, 1, 3))
            place = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            panel.annotate(f"{1e3 * row['seconds']:.2f}", (1e3 * row["seconds"], y), (4, 0), **place)
        _finish(panel, [row["label"] for row in here], f"{name}, {here[0]['device']}")
        panel.set_xscale("log")
        panel.set_xlabel("one switch, ms")
    figure_saved(figure, path)


def long_run(rows: Sequence[Row], path: Path) -> None:
    """Loss and resident memory against steps, one line per run."""
    figure, panels = figure_with(["loss", "memory"], path)
    if figure is None:
        return
    (losses, _), (memory, _) = panels
    styles = {
        "sparse": (OURS[2], "-", 1.5),
        "full": (OURS[1], "-", 4.0),
        "dense": ("black", "-", 1.2),
        "again": (THEIRS[2], ":", 1.2),
    }
    for key in dict.fromkeys(str(row["run"]) for row in rows):
        here = [row for row in rows if row["run"] == key]
        steps = [row["step"] for row in here]
        color, style, width = styles[key]
        label = str(here[0]["label"])
        losses.plot(steps, [row["loss"] for row in here], style, color=color, linewidth=width, label=label)
        start = here[0]["rss_mib"]
        memory.plot(steps, [row["rss_mib"] - start for row in here], style, color=color, linewidth=min(width, 2), label=label)
    losses.axhline(rows[0]["floor"], color="grey", linestyle="--", linewidth=1)
    losses.annotate(
        "entropy of the source", (steps[-1], rows[0]["floor"]), (0, 3), textcoords="offset points", ha="right", fontsize=8
    )
    losses.set_ylabel("loss, mean of a hundredth of the steps, nats")
    memory.set_ylabel("RSS over its first look, MiB")
    for panel in (losses, memory):
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure_saved(figure, path)
