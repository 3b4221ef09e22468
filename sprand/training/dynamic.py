"""Dynamic masks: while a model trains, some of its trained entries are exchanged for others, every so many steps."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.frozen import Frozen, nothing_frozen
from ..adapters.model import write
from ..adapters.state import state_of
from ..kernels import ops
from ..kernels.topk import largest, order_keys
from ..layers import sharding
from ..layers.sites import Site, carried, sites_of
from ..selection import pattern
from ..selection.config import AS_GIVEN
from .candidates import Candidates

ALLOWED = {
    "drop": ("delta_change", "delta"),
    "grow": ("gradient", "random"),
    "decay": (None, "linear", "cosine"),
    "mode": ("regrow", "recompute"),
}
WATCHED = 4  # candidates per entry to grow: the first gradient chooses them, all gradients of `steps` decide among them

Strategy = Mapping[str, Tensor] | Callable[[nn.Module], Mapping[str, Tensor]]


class DynamicMask:
    """Moves the mask of a model in training: call `step()` after every `optimizer.step()`.

    `mode="regrow"` (SpIEL, arXiv 2401.16405, and RigL, arXiv 1911.11134): every `every` steps a fraction of each weight's
    entries is dropped and as many are grown among the positions that do not train. A dropped entry goes back to its base
    value. `mode="recompute"` (SPEFT, arXiv 2412.13488): what was trained stays in the weights, and `strategy` draws the mask
    anew; the adapter keeps the entries left behind (positions, folded and base values), and `sprand.save` writes them. In
    both modes the number of entries of each weight stays, entries that stay keep the optimizer's moments, and new ones
    start from zero. Parameters and optimizer state are changed in place.

    The gradients by which entries grow exist for one weight at a time and, where the weight is large, for one chunk of its
    rows; they are not seen inside of `torch.compile`. A weight grows no entry whose gradient is zero or not finite, and
    drops no more than it grows. All choices are deterministic, equal scores go to the lower position. Under
    `torch.distributed` every rank calls `step()`; the ranks' gradients are added, and all of them move the mask alike.

    To resume, load the model's, the optimizer's and this object's `state_dict`, in this order.

    Args:
        model: a model with trained entries; itself, not its wrapper.
        optimizer: the optimizer that holds them; None if it is given by `bind` before the first step.
        every: steps between two changes.
        fraction: of each weight's entries, exchanged at a change, in (0, 1); for `"regrow"`, by default 0.2.
        drop: `"delta_change"`: entries that changed least since the last change; `"delta"`: entries nearest to their base.
        grow: `"gradient"`: the largest sums of gradients; `"random"`: any, drawn from `seed`.
        steps: how many steps before a change give those gradients, 1 to `every`; by default 5, or `every` if that is less.
            The first of them chooses four candidates for each entry to grow, its first backward for each weight.
        decay: `"cosine"` (RigL) or `"linear"` (SpIEL) lowers the fraction to zero at `until`; None keeps it.
        until: the last step that may change the mask; None for no end.
        mode: `"regrow"` or `"recompute"`.
        strategy: for `"recompute"`: `{parameter name: bool mask or flat indices}`, or a function that makes it of the model.
        seed: of random growth.

    Attributes:
        count: steps so far.
        changes: changes of the mask so far.

    Raises:
        ValueError: an option out of range, a model without trained entries, sharded ones, or an optimizer without them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int = 20,
        fraction: float | None = None,
        drop: str = "delta_change",
        grow: str = "gradient",
        steps: int | None = None,
        decay: str | None = None,
        until: int | None = None,
        mode: str = "regrow",
        strategy: Strategy | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("drop", drop), ("grow", grow), ("decay", decay), ("mode", mode)):
            if value not in ALLOWED[name]:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, ALLOWED[name]))}, got {value!r}")
        every, until = _positive("every", every), None if until is None else _positive("until", until)
        steps = min(5, every) if steps is None else _positive("steps", steps)
        if steps > every:
            raise ValueError(f"steps: expected at most every={every}, got {steps}")
        if decay is not None and until is None:
            raise ValueError(f"decay={decay!r} lowers the fraction to zero at a step: give until")
        if mode == "recompute" and not (callable(strategy) or isinstance(strategy, Mapping)):
            raise ValueError(
                "strategy: mode='recompute' needs {parameter name: mask or indices} or a function that makes it of the model, "
                f"got {strategy!r}"
            )
        if mode == "recompute" and (fraction is not None or decay is not None):
            raise ValueError("fraction, decay: mode='recompute' draws the whole mask anew; leave them out")
        if mode == "regrow" and strategy is not None:
            raise ValueError("strategy: only for mode='recompute'")
        fraction = 0.2 if fraction is None else fraction
        if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real) or not 0 < fraction < 1:
            raise ValueError(f"fraction: expected a number in (0, 1), got {fraction!r}")
        self.model, self.optimizer, self.mode, self.strategy, self.seed = model, None, mode, strategy, seed
        self.every, self.fraction, self.drop, self.grow, self.steps = every, float(fraction), drop, grow, steps
        self.decay, self.until, self.count, self.changes = decay, until, 0, 0
        self._adapter = state_of(model).current
        if self._adapter is None or not self._adapter.indices:
            raise ValueError("DynamicMask: this model has no sparse entries that are active now")
        sharding.refuse(model, "DynamicMask", "train with DistributedDataParallel, ZeRO-1 or ZeRO-2 instead")
        sites = sites_of(model)
        self._anchors = {site.name: site.entries.delta.detach().clone() for site in sites}
        self._candidates: dict[str, Candidates] = {}
        if optimizer is not None:
            self.bind(optimizer)
        self._arm()

    def bind(self, optimizer: torch.optim.Optimizer) -> DynamicMask:
        """Give the optimizer whose moments move with the mask.

        Args:
            optimizer: holds every trained entry of the model.

        Returns:
            The same object.

        Raises:
            ValueError: it does not hold every trained entry of the model.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [site.name for site in sites_of(self.model) if id(site.entries.delta) not in held]
        if missing:
            raise ValueError(
                f"DynamicMask: the optimizer does not hold the trained entries of {missing[0]} ({len(missing)} of "
                f"{len(self._anchors)} weights); make it over sprand.parameters(model)"
            )
        self.optimizer = optimizer
        return self

    @torch.no_grad()
    def step(self) -> bool:
        """Count a step, and change the mask if it is time.

        Returns:
            Whether the mask was changed.

        Raises:
            RuntimeError: no optimizer is bound, another adapter was made active, an optimizer state that cannot be moved, or no
                gradient since the last change that could say what to grow. The model is as it was then.
            ValueError: a mask of `strategy` that does not fit.
        """
        if self.optimizer is None:
            raise RuntimeError("DynamicMask: no optimizer; give it when the mask is made, or by bind(optimizer)")
        if state_of(self.model).current is not self._adapter:
            raise RuntimeError("DynamicMask: another adapter is active than when this was made; make one for it")
        self.count += 1
        for candidates in self._candidates.values():
            candidates.settle()
        changes = self._changes_at(self.count)
        if changes:
            sites = sites_of(self.model)
            for site in sites:
                list(site.moments(self.optimizer))
            self._recompute(sites) if self.mode == "recompute" else self._regrow(sites)
            self._anchors = {site.name: site.entries.delta.detach().clone() for site in sites}
            self._adapter.indices = {site.name: site.entries.indices for site in sites}
            self._adapter.config = dataclasses.replace(self._adapter.config, **AS_GIVEN)
            self.changes += 1
        self._arm()
        return changes

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here, to the bit: tensors and numbers."""
        return {
            "count": self.count,
            "changes": self.changes,
            "anchors": dict(self._anchors),
            "candidates": {
                name: {"positions": c.positions, "sums": c.sums} for name, c in self._candidates.items() if c.sums is not None
            },
            "frozen": {name: dataclasses.asdict(frozen) for name, frozen in self._adapter.frozen.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; the model holds the mask and the weights of that moment already.

        Raises:
            ValueError: it was made for other weights.
        """
        shapes = {name: list(anchor.shape) for name, anchor in state["anchors"].items()}
        own = {name: list(anchor.shape) for name, anchor in self._anchors.items()}
        if shapes != own:
            raise ValueError(f"DynamicMask: expected a state for the entries {own}, got {shapes}")
        sites = {site.name: site for site in sites_of(self.model)}
        for kind, where, values in (("frozen", "indices", "values"), ("candidates", "positions", "sums")):
            for name, kept in state[kind].items():
                if name not in sites or kept[where].shape != kept[values].shape:
                    raise ValueError(f"DynamicMask: expected {kind} positions and values of {', '.join(sites)}, got {name}")
                pattern.check_indices(f"DynamicMask: {name}", kept[where].sort().values, sites[name].weight.numel())
        self.count, self.changes = int(state["count"]), int(state["changes"])
        self._anchors = {name: state["anchors"][name].to(anchor, copy=True) for name, anchor in self._anchors.items()}
        self._adapter.frozen = {
            name: Frozen(*(frozen[part].to(sites[name].weight.device) for part in ("indices", "values", "base")))
            for name, frozen in state["frozen"].items()
        }
        for name in self._adapter.frozen:
            sites[name].mark_folded()
        if self.changes:
            self._adapter.config = dataclasses.replace(self._adapter.config, **AS_GIVEN)
        self._disarm()
        self._arm()
        for name, kept in state["candidates"].items():
            candidates = self._candidates[name]
            candidates.positions, candidates.sums = kept["positions"].to(candidates.active), kept["sums"].to(self._anchors[name])

    def _changes_at(self, count: int) -> bool:
        return count % self.every == 0 and (self.until is None or count <= self.until)

    def _exchanged(self, site: Site, count: int) -> int:
        """How many entries of a weight are exchanged at a step."""
        nnz, part = site.entries.indices.numel(), self.fraction
        if self.decay is not None:
            progress = count / self.until
            part *= 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return min(round(part * nnz), site.weight.numel() - nnz)

    def _arm(self) -> None:
        """Let the next backward passes look for candidates, if they are among the last before a change."""
        change = -(-(self.count + 1) // self.every) * self.every
        if self.mode == "recompute" or self.grow != "gradient" or self.count < change - self.steps or self._candidates:
            return
        if not self._changes_at(change):
            return
        for site in sites_of(self.model):
            grown, free = self._exchanged(site, change), site.weight.numel() - site.entries.indices.numel()
            if grown:
                dtype = ops.accumulation_dtype(site.weight.dtype)
                candidates = Candidates(site.entries.indices, min(free, WATCHED * grown), dtype)
                self._candidates[site.name] = candidates
                site.watch(candidates)

    def _disarm(self) -> None:
        self._candidates = {}
        for site in sites_of(self.model):
            site.watch(None)

    def _regrow(self, sites: list[Site]) -> None:
        if self._candidates and all(c.sums is None for c in self._candidates.values()):
            raise RuntimeError(
                f"DynamicMask: no gradient was seen in the {self.steps} steps before this change; call step() once after each "
                "optimizer.step(), and do not compile the model with torch.compile"
            )
        for site in sites:
            entries, weight = site.entries, site.weight
            grown = self._grown(site, self._exchanged(site, self.count))
            if not grown.numel():
                continue
            moved = entries.delta.detach() - (self._anchors[site.name] if self.drop == "delta_change" else 0)
            nearness = moved.abs().neg().nan_to_num(nan=-math.inf)
            dropped = largest(order_keys(nearness), grown.numel())
            ops.patch_(weight.data, entries.indices[dropped], entries.base[dropped], None)
            stays = torch.ones_like(entries.indices, dtype=torch.bool).index_fill_(0, dropped, False).nonzero().flatten()
            indices, order = torch.cat([entries.indices[stays], grown]).sort()
            source = torch.cat([stays, stays.new_full((grown.numel(),), -1)])[order]
            base = torch.cat([entries.base[stays], ops.gather(weight.data, grown)])[order]
            site.replace(indices, base, carried(entries.delta.detach(), source), source, self.optimizer)
        self._disarm()

    def _grown(self, site: Site, count: int) -> Tensor:
        """The positions to grow, sorted."""
        indices, weight = site.entries.indices, site.weight
        if self.grow == "gradient":
            candidates = self._candidates.get(site.name)
            return indices.new_empty(0) if candidates is None else candidates.largest(count)
        drawn = indices.new_empty(indices.numel() + count)
        key = pattern.draw_key(f"regrow {self.count}", site.name, weight.shape, self.seed)
        ops.uniform_indices_(drawn, weight.numel(), key)
        return drawn[~torch.isin(drawn, indices)][:count].sort().values

    def _recompute(self, sites: list[Site]) -> None:
        write(self.model)
        with torch.enable_grad():
            picked = self.strategy(self.model) if callable(self.strategy) else self.strategy
        if not isinstance(picked, Mapping):
            raise ValueError(f"strategy: expected {{parameter name: mask or indices}}, got {type(picked).__name__}")
        drawn = {}
        for site in sites:
            if site.name not in picked:
                raise ValueError(f"strategy: expected a mask or indices of {site.name}, got only {', '.join(picked) or 'none'}")
            drawn[site.name] = pattern.from_user(site.name, picked[site.name], site.weight.shape).to(site.entries.indices)
            nnz = site.entries.indices.numel()
            if drawn[site.name].numel() != nnz:
                raise ValueError(f"strategy: expected {nnz} entries of {site.name}, as before, got {drawn[site.name].numel()}")
        write(self.model)
        for site in sites:
            entries, weight, indices = site.entries, site.weight, drawn[site.name]
            frozen = self._adapter.frozen.get(site.name) or nothing_frozen(entries.indices, entries.base)
            values = ops.gather(weight.data, entries.indices)
            self._adapter.frozen[site.name] = frozen.fold(entries.indices, values, entries.base)
            site.mark_folded()
            place = torch.searchsorted(entries.indices, indices).clamp_(max=indices.numel() - 1)
            source = torch.where(entries.indices[place] == indices, place, -1)
            site.replace(indices, ops.gather(weight.data, indices), torch.zeros_like(entries.delta), source, self.optimizer)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")
    return int(value)
