"""What trains, in words: PEFT's one line, a table by target, and the share of deltas that change a weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers.sites import Site, named_parameters, sites_of
from .state import active_sites, state_of


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how much of a model trains, in PEFT's own words.

    Args:
        model: a model with trained entries.

    Raises:
        ValueError: The model has no trained entries.
    """
    trained, total = _counts(model)
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")


def summary(model: nn.Module) -> str:
    """A table of the targets: shape, trained entries, density, and the size of the change so far.

    Args:
        model: a model with trained entries.

    Returns:
        Plain text, a line per target and one of totals.

    Raises:
        ValueError: The model has no trained entries.
    """
    state = state_of(model)
    saved = () if state.current is None else state.current.saved
    rows = [("target", "shape", "trained", "density", "rms delta")]
    rows += [_row(site) for site in sites_of(model)]
    rows += [
        (name, shape_text(p.shape), f"{p.numel():,}", "in full", "-") for name, p in named_parameters(model) if name in saved
    ]
    trained, total = _counts(model)
    active = "a mixture" if state.mixed else state.active or "none, the base"
    totals = f"{trained:,} of {total:,} parameters train ({trained / total:.4%}); active adapter: {active}"
    return f"{text_table(rows, left=2)}\n{totals}"


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of equal length, the first `left` columns flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row[:left], widths[:left], strict=True)]
        padded += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def visible_share(model: nn.Module) -> float:
    """The share of the trained entries that differ from the base in their weight's dtype.

    A delta of less than half a unit in the last place of its base changes no weight: a share near 0 in a low-precision
    model says that the learning rate is too low to train anything (yet), however well the deltas move.

    Args:
        model: of `sprand.apply`, or of PEFT with a `SprandConfig`.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: The model has no trained entries, or no adapter is active.
    """
    trained, changed = 0, []
    for site in active_sites(model):
        entries = site.entries
        trained += entries.delta.numel()
        changed.append((entries.values() != entries.base).sum())
    return int(sum(count.cpu() for count in changed)) / trained


def _row(site: Site) -> tuple[str, ...]:
    delta = site.entries.delta.detach()
    density = delta.numel() / site.numel
    return site.name, shape_text(site.shape), f"{delta.numel():,}", f"{density:.4%}", _rms_text(delta)


def _rms_text(delta: Tensor) -> str:
    if delta.is_meta:
        return "-"
    return f"{delta.square().mean().sqrt().item():.3g}" if delta.numel() else "0"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as a table shows it: `64x128`."""
    return "x".join(map(str, shape))


def _counts(model: nn.Module) -> tuple[int, int]:
    """Trained scalars, and the parameters of the model itself (deltas are entries of it, not more of it)."""
    state_of(model)
    deltas = {id(site.entries.delta) for site in sites_of(model)}
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters if id(p) not in deltas)
