"""sprand in other ways at the same trained count: fewer kinds of layers, and masks that move while the model trains."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import sprand
from quality import peers
from sprand.adapters.state import state_of
from sprand.cli.finetune import methods, tasks
from sprand.cli.finetune.models import head_names
from sprand.cli.finetune.settings import Settings
from sprand.layers.sites import sites_of

LAYERS = {"random-vo": ("v", "o"), "random-qv": ("q", "v")}
CHANGES = 8  # of a moving mask, over a run
MOVING = ("regrow", "recompute")
VARIANTS = (*LAYERS, *MOVING, "diagonal blocks", "relative")


def applied(model: nn.Module, settings: Settings, mask: sprand.Mask | None = None) -> methods.Method:
    """Entries of a model that stays what it is, with no wrapper of PEFT: drawn as the options say, or given."""
    if mask is not None:
        config = sprand.SparseConfig(strategy=mask, modules_to_save=head_names(model) or None, seed=settings.seed)
    else:
        config = methods.sparse_config(settings, model)
    sprand.apply(model, config, disjoint=settings.disjoint or None)
    targets = [site.shape for site in sites_of(model)]
    return methods.tuned(model, settings, dict(sprand.named_parameters(model)), targets)


def attach(name: str, model: nn.Module, budget: float, settings: Settings, task: tasks.Task, steps: int) -> methods.Method:
    """A model made ready to train with one of `VARIANTS`.

    `random-vo` and `random-qv` spend the budget of all linear layers on the value and output, or query and value projections.
    `regrow` begins with random entries and exchanges a fifth of them for those with the largest gradients; `recompute` begins
    with a gradient mask and chooses it anew on the weights as they are (SPEFT's dynamic masking). Both change the mask eight
    times, for the last time after two thirds of the steps. `diagonal blocks` are those of DiaBlo. `relative` gives each tensor of
    random entries the rate times the root mean square of its weights over that of all.

    Args:
        name: which.
        model: changed in place.
        budget: fraction of the targeted weights.
        settings: the options of the run.
        task: its training rows are what a gradient mask is chosen by.
        steps: how many the run takes.
    """
    own = dataclasses.replace(settings, strategy="gradient" if name == "recompute" else "random", density=budget)
    if name in LAYERS:
        count = sprand.select(model, methods.sparse_config(own, model)).nnz
        layers = peers.of_kinds([n for n, m in model.named_modules() if isinstance(m, nn.Linear)], LAYERS[name])
        return applied(model, dataclasses.replace(own, density=None, budget=str(count), target_modules=tuple(layers)))
    if name == "diagonal blocks":
        return applied(model, own, diagonal_blocks(sprand.select(model, methods.sparse_config(own, model)).shapes, budget))
    if name == "relative":
        method = applied(model, own)
        scale_rates(method.optimizer, relative_rms(model))
        return method
    plain = copy.deepcopy(model)
    method = applied(model, own, methods.chosen(model, own, task))
    every = max(1, 2 * steps // (3 * CHANGES))
    moving = {"every": every, "until": CHANGES * every, "seed": settings.seed}
    if name == "regrow":
        mask = sprand.DynamicMask(model, method.optimizer, **moving)
    else:
        config = methods.sparse_config(own, plain)

        def again(trained: nn.Module) -> dict[str, Tensor]:
            return chosen_again(plain, trained, config, own, task)

        mask = sprand.DynamicMask(model, method.optimizer, mode="recompute", strategy=again, **moving)
    method.optimizer.register_step_post_hook(lambda *_: mask.step())
    return method


def diagonal_blocks(shapes: Mapping[str, Sequence[int]], density: float) -> sprand.Mask:
    """All entries of the blocks on the diagonal of each weight.

    Args:
        shapes: of the weights, by name.
        density: the share of the entries to take; the number of blocks is the divisor of all sizes that comes nearest.
    """
    common = math.gcd(*(size for shape in shapes.values() for size in shape))
    blocks = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(math.log(n * density)))
    indices = {}
    for name, (rows, columns) in shapes.items():
        row, column = torch.arange(rows)[:, None] * blocks // rows, torch.arange(columns) * blocks // columns
        indices[name] = (row == column).flatten().nonzero()[:, 0].int()
    return sprand.Mask(indices, shapes)


def relative_rms(model: nn.Module) -> dict[int, float]:
    """Of each trained tensor, by its id, the root mean square of the weights it is part of, over that of all such weights."""
    squares = {site.entries.delta: float(site.weight.detach().float().square().sum()) for site in sites_of(model)}
    sizes = {site.entries.delta: site.weight.numel() for site in sites_of(model)}
    mean = sum(squares.values()) / sum(sizes.values())
    return {id(delta): math.sqrt(square / sizes[delta] / mean) for delta, square in squares.items()}


def scale_rates(optimizer: torch.optim.Optimizer, shares: dict[int, float]) -> None:
    """Multiply the rate of each tensor by its share, 1 where it has none, in every step; schedules see the rate without."""
    for group in list(optimizer.param_groups):
        first, *others = group["params"]
        group["params"] = [first]
        for parameter in others:
            optimizer.add_param_group({**group, "params": [parameter]})

    def scale(*_: object) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= shares.get(id(group["params"][0]), 1.0)

    optimizer.register_step_pre_hook(scale)


def changed(model: nn.Module) -> int:
    """How many weights of a model differ from its base or may: those that train now, and those that a moving mask left behind."""
    now = sum(site.entries.delta.numel() for site in sites_of(model))
    return now + sum(frozen.indices.numel() for frozen in state_of(model).current.frozen.values())


def chosen_again(
    plain: nn.Module, trained: nn.Module, config: sprand.SparseConfig, settings: Settings, task: tasks.Task
) -> dict[str, Tensor]:
    """The gradient mask of the weights as they are now, by parameter name."""
    now = dict(trained.named_parameters())
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(now[name])
    return dict(sprand.select(plain, config, **methods.calibration(settings, task)))
