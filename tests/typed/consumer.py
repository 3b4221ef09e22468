"""The public names as a typed program uses them; `make types` checks this file with mypy in strict mode, nothing runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

import sprand
from sprand.selection.strategies import Stats
from sprand.serving import AdapterPool, DeltaReceiver, DeltaSync


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], folder: Path) -> Path:
    """Apply, train, save."""
    config = sprand.SparseConfig(density=0.01, target_modules=["q", "v"], strategy="random", seed=1)
    assert_type(config.density, float | None)
    assert_type(sprand.SparseConfig.from_json(config.to_json()), sprand.SparseConfig)
    model = sprand.apply(model, config)
    assert_type(sprand.parameters(model), list[nn.Parameter])
    assert_type(sprand.named_parameters(model), Iterator[tuple[str, nn.Parameter]])
    optimizer = sprand.SparseAdamW(model, lr=sprand.suggest_lr(model), weight_decay=0.0, max_grad_norm=1.0)
    as_any: torch.optim.Optimizer = optimizer
    for inputs, targets in batches:
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        as_any.zero_grad()
    sprand.print_trainable_parameters(model)
    assert_type(sprand.summary(model), str)
    assert_type(sprand.visible_share(model), float)
    return sprand.save(model, folder)


def use(model: nn.Module, folder: Path) -> nn.Module:
    """Load, switch, combine, merge."""
    model = sprand.load(model, folder, name="first")
    sprand.switch(model, {"first": 0.5})
    sprand.combine(model, {"first": 1.0}, "sum", name="both")
    with sprand.disabled(model) as plain:
        assert_type(plain, nn.Module)
    sprand.write(model)
    for module in model.modules():
        if isinstance(module, sprand.SparseModule):
            assert_type(module.sparse_entries("weight").delta, Tensor)
    return sprand.merge(sprand.unmerge(model))


def choose(model: nn.Module, batches: list[Tensor], folder: Path) -> sprand.Mask:
    """Select with a strategy of the library's and one of one's own."""

    def largest(name: str, weight: Tensor, stats: Stats) -> Tensor:
        return weight.abs() if stats.gradient is None else stats.gradient.abs()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        result: Tensor = model(batch).sum()
        return result

    mask = sprand.select(model, strategy="snip", density=0.01, data=batches, loss_fn=loss)
    assert_type(mask, sprand.Mask)
    assert_type(mask.nnz, int)
    sprand.apply(model, strategy=largest, density=0.01)
    mask.save(folder / "mask.safetensors")
    sprand.plot_selection(mask, folder / "mask.png")
    sprand.apply(model, strategy=sprand.Mask.load(folder / "mask.safetensors"))
    return mask


def serve(model: nn.Module, folder: Path, trained: nn.Module) -> None:
    """Adapters of a live model, and a copy that follows training."""
    pool = AdapterPool(model)
    pool.add("first", folder)
    with pool.use("first") as served:
        assert_type(served, nn.Module)
    sync, receiver = DeltaSync(trained), DeltaReceiver(model)
    receiver.receive(sync.indices())
    assert_type(receiver.receive(sync.values()), int)


def explore(model: nn.Module, optimizer: sprand.SparseAdamW) -> bool:
    """A mask that moves."""
    mask = sprand.DynamicMask(model, optimizer, every=100, fraction=0.2)
    return mask.step()
