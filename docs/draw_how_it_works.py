"""Draws docs/images/how_it_works.png: one linear layer, its chosen entries, and what a training step does with them."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, Rectangle

from sprand.selection import pattern

INK, FROZEN, CHOSEN, SECOND = "#1f2933", "#dfe5ec", "#d9480f", "#1971c2"
OUT, IN, TOKENS = 12, 16, 7


def grid(ax, x, y, rows, cols, color=FROZEN, marked=(), size=0.3, mark=CHOSEN):
    """A matrix with its upper left corner at (x, y); returns the centre of an entry as a function of row and column."""
    for r in range(rows):
        for c in range(cols):
            face = mark if (r, c) in marked else color
            ax.add_patch(Rectangle((x + c * size, y - (r + 1) * size), size * 0.92, size * 0.92, facecolor=face, linewidth=0))
    return lambda r, c: (x + (c + 0.46) * size, y - (r + 0.54) * size)


def arrow(ax, start, end, color=INK, bend=0.0):
    style = f"arc3,rad={bend}"
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, linewidth=1.4, color=color, connectionstyle=style)
    )


def main() -> None:
    indices = pattern.draw("random", "weight", (OUT, IN), 12, seed=0)
    chosen = {(int(i) // IN, int(i) % IN) for i in indices}
    sample = sorted(chosen)[len(chosen) // 2]
    fig, ax = plt.subplots(figsize=(13.5, 5))
    ax.set_xlim(0, 21.5)
    ax.set_ylim(-1.1, 6.3)
    ax.set_aspect("equal")
    ax.axis("off")

    def title(x, text):
        ax.text(x, 5.95, text, fontsize=11.5, weight="bold", color=INK)

    def note(x, y, text, color=INK):
        ax.text(x, y, text, fontsize=10, color=color, va="top", linespacing=1.45)

    title(0.2, "1  a few entries of W train")
    entry = grid(ax, 0.2, 4.9, OUT, IN, marked=chosen)
    note(0.2, 5.35, "W [out, in], frozen")
    grid(ax, 6.0, 4.9, OUT, 1, color=CHOSEN)
    note(5.75, 5.35, "delta  [nnz]", CHOSEN)
    note(0.2, 0.95, "before use:  W[indices] = cast(base + delta)\npositions come from a seed; base keeps the bits")

    title(7.8, "2  forward: plain F.linear")
    grid(ax, 7.8, 4.9, TOKENS, IN // 2, color="#a5d8ff", size=0.3)
    note(7.8, 5.35, "input [tokens, in]")
    note(10.5, 4.1, "x  W\u1d40", INK)
    grid(ax, 11.4, 4.9, TOKENS, OUT // 2, color="#b2f2bb")
    note(11.4, 5.35, "output")
    note(7.8, 2.4, "no adapter in the way:\nthe cost of the frozen model.\nkept for backward: the input,\nand a reference to W")

    title(14.2, "3  backward: the chosen gradients alone")
    row, column = sample
    y_cells = {(t, row // 2) for t in range(TOKENS)}
    x_cells = {(t, column // 2) for t in range(TOKENS)}
    left = grid(ax, 14.2, 4.9, TOKENS, OUT // 2, color="#b2f2bb", marked=y_cells)
    note(14.2, 5.35, "grad_output")
    right = grid(ax, 17.1, 4.9, TOKENS, IN // 2, color="#a5d8ff", marked=x_cells)
    note(17.1, 5.35, "input")
    grid(ax, 20.6, 4.9, OUT, 1, color="#f4d9c9", marked={(sorted(chosen).index(sample), 0)})
    note(20.2, 5.35, "grad", CHOSEN)
    target = (20.55, 4.9 - (sorted(chosen).index(sample) + 0.5) * 0.3)
    arrow(ax, left(TOKENS - 1, row // 2), target, CHOSEN, 0.35)
    arrow(ax, right(TOKENS - 1, column // 2), target, CHOSEN, 0.2)
    note(
        14.2,
        0.95,
        "one dot product over tokens per chosen entry (SDDMM),\nno [out, in] gradient;  grad_input = grad_output W as ever",
    )

    note(
        0.2,
        -0.55,
        "4  step: SparseAdamW updates delta and its two moments and writes W, in one pass.   "
        "merge: drop the extras.   unmerge: put base back, bit for bit.",
        SECOND,
    )
    arrow(ax, (5.95, entry(row, 0)[1]), (entry(row, column)[0] + 0.15, entry(row, column)[1]), CHOSEN)
    target_file = Path(__file__).parent / "images" / "how_it_works.png"
    target_file.parent.mkdir(exist_ok=True)
    fig.savefig(target_file, dpi=110, bbox_inches="tight", facecolor="white")
    print(f"{target_file.name}: {torch.numel(indices)} of {OUT * IN} entries")


if __name__ == "__main__":
    main()
