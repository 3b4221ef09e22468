"""Exact top-k: as a sort of all scores would choose, whatever the ties, per target and over all."""

from __future__ import annotations

import pytest
import torch

from sprand.kernels import topk
from sprand.kernels.topk import EXCLUDED, Pool, largest, order_keys

SCORES = {
    "normal": lambda n: torch.randn(n),
    "many ties": lambda n: torch.randint(-2, 3, (n,)).float(),
    "all equal": lambda n: torch.zeros(n),
    "both zeros": lambda n: torch.tensor([0.0, -0.0])[torch.arange(n) % 2],
    "tiny": lambda n: torch.randn(n) * 1e-42,
    "far apart": lambda n: torch.randn(n) * torch.tensor(10.0) ** torch.randint(-30, 30, (n,)),
    "infinite": lambda n: torch.where(torch.rand(n) < 0.1, float("inf"), torch.where(torch.rand(n) < 0.1, -float("inf"), 1.0)),
    "bfloat16": lambda n: torch.randn(n).bfloat16(),
}
scores = pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)


def by_sorting(score, k):
    """Stable: of equal scores the first."""
    return (score.double() + 0.0).sort(descending=True, stable=True).indices[:k].sort().values


@scores
@pytest.mark.parametrize("small", [0, 1 << 16])
@pytest.mark.parametrize("n, k", [(1, 1), (7, 0), (7, 3), (7, 7), (1000, 1), (1000, 137), (1000, 999)])
def test_largest_is_what_a_stable_sort_chooses(make, n, k, small, monkeypatch):
    monkeypatch.setattr(topk, "CHUNK", 300)
    monkeypatch.setattr(topk, "SMALL", small)
    score = make(n)
    assert torch.equal(largest(order_keys(score), k), by_sorting(score, k))


@scores
@pytest.mark.parametrize("k", [0, 1, 50, 400, 1499, 1500])
def test_a_pool_over_targets_is_what_a_stable_sort_of_all_chooses(make, k):
    sizes = (3, 500, 0, 900, 97)
    targets = [make(size) for size in sizes]
    pool = Pool(k)
    for number, score in enumerate(targets):
        pool.add(str(number), order_keys(score), score.numel())
    chosen = pool.chosen()
    start = 0
    expected = by_sorting(torch.cat(targets), k)
    for number, size in enumerate(sizes):
        mine = expected[(expected >= start) & (expected < start + size)] - start
        found = chosen[str(number)][1] if str(number) in chosen else torch.empty(0, dtype=torch.int64)
        assert torch.equal(found, mine)
        start += size


def test_a_pool_holds_little():
    pool = Pool(100)
    for number in range(50):
        pool.add(str(number), order_keys(torch.randn(1000)), 1000)
        assert sum(keys.numel() for _, keys, _ in pool._parts) <= 300


def test_excluded_entries_come_last():
    keys = order_keys(torch.tensor([-float("inf"), -1.0, 5.0, 2.0]))
    keys[2] = EXCLUDED
    assert largest(keys, 3).tolist() == [0, 1, 3]
    pool = Pool(3)
    pool.add("w", keys, 4)
    assert pool.chosen()["w"][1].tolist() == [0, 1, 3]
