"""Strategies: the score by which each ranks the entries of a weight, and what it must know for it. A new one is added here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NEEDS = ("gradient", "fisher", "hessian_gradient", "flow", "activation", "token_fisher")  # fields of Stats


@dataclass
class Stats:
    """What calibration found out about one target, in float32 (bfloat16 where asked), of the weight's shape but for the last two.

    Attributes:
        gradient: mean over the examples of the gradient of the loss.
        fisher: mean over the examples of the square of each example's own gradient.
        hessian_gradient: Hessian of the mean loss times its gradient, over all targets together.
        flow: gradient of SynFlow's sum of outputs, with respect to the absolute weight.
        activation: `[inputs]`, float64, of a linear layer: mean over the examples of the sum over tokens of the squared input.
        token_fisher: `[inputs]`, float64, of a linear layer: the same of the squared input times the squared length of the
            token's gradient at the output.
        examples: how many examples were seen.
    """

    gradient: Tensor | None = None
    fisher: Tensor | None = None
    hessian_gradient: Tensor | None = None
    flow: Tensor | None = None
    activation: Tensor | None = None
    token_fisher: Tensor | None = None
    examples: int = 0


@dataclass(frozen=True)
class Strategy:
    """A way to rank the entries of a weight.

    Attributes:
        score: `score(weight, stats, **options)` gives a tensor of the weight's shape; the largest scores are chosen.
        needs: the field of `Stats` that it reads, or None.
        options: its options and their default values.
        positive: whether only a positive score speaks for an entry.
        squares: whether the score of several entries together, a column, is the sum of the squares of their scores, and not the
            sum. It is so where the score is the size of a signed number.
        columns: whether the score is one of each column of a linear layer, `[inputs]`, as the mean over its entries; without data
            training itself can choose by it.
    """

    score: Callable[..., Tensor]
    needs: str | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    positive: bool = False
    squares: bool = False
    columns: bool = False

    @property
    def wants_data(self) -> bool:
        """Whether it cannot do without batches."""
        return self.needs not in (None, "flow")


STRATEGIES: dict[str, Strategy] = {}


def strategy(
    needs: str | None = None,
    positive: bool = False,
    squares: bool = False,
    columns: bool = False,
    **options: float,
) -> Callable[[Callable], Callable]:
    """Enter a score function under its own name."""

    def enter(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
        STRATEGIES[score.__name__] = Strategy(score, needs, options, positive, squares, columns)
        return score

    return enter


def strategy_of(asked: str | Callable[..., Tensor], name: str, has_data: bool) -> Strategy:
    """The strategy of a configuration; a callable `score(name, weight, stats)` is bound to the target `name`.

    A callable says what it reads by an attribute `needs`; without one it gets the mean gradient where there is data. An attribute
    `squares` that is true sums the squares of its scores over a column, not the scores.

    Raises:
        ValueError: A callable needs what calibration does not find out.
    """
    if isinstance(asked, str):
        return STRATEGIES[asked]
    needs = getattr(asked, "needs", "gradient" if has_data else None)
    if needs is not None and needs not in NEEDS:
        raise ValueError(f"strategy: expected `needs` of the callable to be None or one of {', '.join(NEEDS)}, got {needs!r}")

    def score(weight: Tensor, stats: Stats, **options: Any) -> Tensor:
        values = asked(name, weight, stats, **options)
        if not isinstance(values, Tensor):
            got = type(values).__name__
        elif values.shape != weight.shape or values.is_complex():
            got = f"{list(values.shape)} of {values.dtype}"
        else:
            return values
        raise ValueError(f"strategy: expected a score of shape {list(weight.shape)} for {name}, got {got}")

    return Strategy(score, needs, squares=bool(getattr(asked, "squares", False)))


@strategy(squares=True)
def magnitude(weight: Tensor, stats: Stats) -> Tensor:
    """|w|; of a column the sum of w^2, its norm."""
    return weight.abs()


@strategy(needs="gradient", squares=True)
def gradient(weight: Tensor, stats: Stats) -> Tensor:
    """|mean g|: signed gradients are summed, the absolute value is taken at the end; of a column the sum of (mean g)^2."""
    return stats.gradient.abs()


@strategy(needs="gradient")
def snip(weight: Tensor, stats: Stats) -> Tensor:
    """|w g|, of which a column has the sum: the sum of squares is `taylor_fo`'s."""
    return _times(weight, stats.gradient).abs_()


@strategy(needs="gradient", positive=True)
def force(weight: Tensor, stats: Stats) -> Tensor:
    """-w g: entries that a step of the gradient makes larger; of a column the sum, in which signs cancel."""
    return _times(weight, stats.gradient).neg_()


@strategy(needs="gradient", squares=True)
def taylor_fo(weight: Tensor, stats: Stats) -> Tensor:
    """(w g)^2, ranked by its root |w g|: the same order, and squares of small float32 do not vanish; of a column the sum."""
    return _times(weight, stats.gradient).abs_()


@strategy(needs="fisher")
def fisher(weight: Tensor, stats: Stats) -> Tensor:
    """Mean over the examples of each one's squared gradient, the diagonal of the empirical Fisher; of a column the sum."""
    return stats.fisher


@strategy(needs="hessian_gradient", temperature=200.0)
def grasp(weight: Tensor, stats: Stats, temperature: float) -> Tensor:
    """-(H g) w, of the loss of logits divided by `temperature`; of a column the sum, in which signs cancel."""
    return _times(weight, stats.hessian_gradient).neg_()


@strategy(needs="flow")
def synflow(weight: Tensor, stats: Stats) -> Tensor:
    """|w| times the gradient of the sum of outputs of the network of absolute weights, for an input of ones; a column's sum."""
    return _times(weight, stats.flow).abs_()


@strategy(squares=True, rank=128)
def lift(weight: Tensor, stats: Stats, rank: int) -> Tensor:
    """|entries of the best approximation of rank `rank`| of the weight as a matrix `[shape[0], everything else]`.

    Of a column the sum of their squares.
    """
    if weight.dim() < 2 or weight.numel() == 0:
        return weight.abs()
    matrix = weight.reshape(weight.shape[0], -1)
    rows, cols = matrix.shape
    if rank >= min(rows, cols):
        return weight.abs()
    wide = rows <= cols
    exact = matrix.double() if wide else matrix.double().T
    _, vectors = torch.linalg.eigh(exact @ exact.T)
    top = vectors[:, -int(rank) :]
    low = top @ (top.T @ exact)
    return (low if wide else low.T).abs().view(weight.shape)


@strategy(rank=128)
def off_principal(weight: Tensor, stats: Stats, rank: int) -> Tensor:
    """-min(|w|, |entries of the best approximation of rank `rank`|), each over its root mean square; of a column the sum.

    So entries come first that are small, or that the principal directions of the weight leave out. Training by rewards that can
    be verified moves these, and follows the training of all weights by them alone; by principal ones it does worst (arXiv
    2511.08567, which draws a mask of half of the entries and more).
    """
    parts = (weight.abs().double(), lift(weight, stats, rank).double())
    scaled = [part / part.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny) for part in parts]
    return torch.minimum(*scaled).neg_()


@strategy(needs="activation", columns=True)
def activation(weight: Tensor, stats: Stats) -> Tensor:
    """Sum over tokens of x^2, of the input x that a column reads; a forward pass alone, and every token counts, padding too."""
    return stats.activation


@strategy(needs="token_fisher", columns=True)
def token_fisher(weight: Tensor, stats: Stats) -> Tensor:
    """Sum over tokens of |dY|^2 x^2, of the gradient dY at the layer's output: the sum over a column of squared gradients.

    Of `fisher`, which squares the gradient of each example, it differs by what the tokens of an example have in common.
    """
    return stats.token_fisher * (stats.token_fisher.numel() / weight.numel())


def _times(weight: Tensor, other: Tensor) -> Tensor:
    """The product in the wider of float32 and the weight's dtype."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype) * other.to(weight.device, dtype)
