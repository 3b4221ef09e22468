"""A paired comparison of two methods over the test rows and seeds that both have: the difference and its bootstrap interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

RESAMPLES = 4000
CAPTION = (
    "`vs` columns: the method's test result minus the other's, over the seeds that both have, with the 95 % interval of a "
    "paired bootstrap that draws the test rows and the seeds anew, both with replacement (4,000 times; rows are sentences, or "
    "blocks of 128 tokens weighed alike, so a difference of perplexities may be a digit off that of the means). Bold where the "
    "interval leaves out 0. Three seeds say little about other seeds: `n/3` is how many of them were better, and only 3/3 or "
    "0/3 with a bold interval should be read as a difference. Intervals are not corrected for the number of comparisons. `sd` "
    "is the standard deviation over seeds."
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """One method against another.

    Attributes:
        mean: difference of the metric, the first method's minus the second's.
        low, high: ends of the 95 % interval.
        better: seeds for which the first is better.
        seeds: seeds compared.
    """

    mean: float
    low: float
    high: float
    better: int
    seeds: int

    def __str__(self) -> str:
        text = f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"
        bold = f"**{text}**" if self.low > 0 or self.high < 0 else text
        return f"{bold} {self.better}/{self.seeds}"


def difference(first: Mapping[int, Tensor], second: Mapping[int, Tensor], metric: str) -> Difference | None:
    """Compare two methods.

    Args:
        first, second: of each seed, the test rows in one order: whether each was right, or its mean loss, float64 [rows].
        metric: "accuracy", or "perplexity", the exponential of the mean loss.

    Returns:
        The difference; None where they share no seed with rows.
    """
    seeds = [seed for seed in first if seed in second and len(first[seed]) == len(second[seed]) > 0]
    if not seeds:
        return None
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.stack([rows[seed] for seed in seeds], 1) for rows in (first, second))
    plain = _metric(ours.mean(0), metric) - _metric(theirs.mean(0), metric)
    rows = len(ours)
    drawn = torch.empty(RESAMPLES, len(seeds), dtype=torch.float64)
    for part in drawn.split(500):
        weights = torch.zeros(len(part), rows, dtype=torch.float64)
        weights.scatter_add_(1, torch.randint(rows, weights.shape, generator=generator), torch.full_like(weights, 1 / rows))
        part.copy_(_metric(weights @ ours, metric) - _metric(weights @ theirs, metric))
    choice = torch.randint(len(seeds), (RESAMPLES, len(seeds)), generator=generator)
    low, high = drawn.gather(1, choice).mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    better = plain > 0 if metric == "accuracy" else plain < 0
    return Difference(float(plain.mean()), low, high, int(better.sum()), len(seeds))


def _metric(means: Tensor, metric: str) -> Tensor:
    return means if metric == "accuracy" else means.exp()
