"""What trains, in words: PEFT's one line, a table by target, and the share of deltas that change a weight."""

from __future__ import annotations

from torch import nn

from ..layers.sites import sites_of
from .state import active_sites, state_of


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how much of a model trains, in PEFT's own words.

    Args:
        model: a model with trained entries.

    Raises:
        ValueError: the model has no trained entries.
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
        ValueError: the model has no trained entries.
    """
    state = state_of(model)
    rows = [("target", "shape", "trained", "density", "rms delta")]
    for site in sites_of(model):
        delta = site.entries.delta.detach()
        rms = "-" if delta.is_meta else f"{delta.square().mean().sqrt().item() if delta.numel() else 0.0:.3g}"
        shape, density = "x".join(map(str, site.shape)), delta.numel() / site.numel
        rows.append((site.name, shape, f"{delta.numel():,}", f"{density:.4%}", rms))
    for name, p in model.named_parameters():
        if state.current is not None and name in state.current.saved:
            rows.append((name, "x".join(map(str, p.shape)), f"{p.numel():,}", "in full", "-"))
    trained, total = _counts(model)
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    active = "a mixture" if state.mixed else state.active or "none, the base"
    return "\n".join([*lines, f"{trained:,} of {total:,} parameters train ({trained / total:.4%}); active adapter: {active}"])


def visible_share(model: nn.Module) -> float:
    """The share of the trained entries that differ from the base in their weight's dtype.

    A delta of less than half a unit in the last place of its base changes no weight: a share near 0 in a low-precision
    model says that the learning rate is too low to train anything (yet), however well the deltas move.

    Args:
        model: of `sprand.apply`, or of PEFT with a `SprandConfig`.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: the model has no trained entries, or no adapter is active.
    """
    trained, changed = 0, []
    for site in active_sites(model):
        entries = site.entries
        trained += entries.delta.numel()
        changed.append((entries.values() != entries.base).sum())
    return int(sum(count.cpu() for count in changed)) / trained


def _counts(model: nn.Module) -> tuple[int, int]:
    """Trained scalars, and the parameters of the model itself (deltas are entries of it, not more of it)."""
    state_of(model)
    deltas = {id(site.entries.delta) for site in sites_of(model)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters() if id(p) not in deltas)
