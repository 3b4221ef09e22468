"""Dynamic masks: while a model trains, some of its trained entries are exchanged for others, every so many steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.frozen import Frozen, nothing_frozen
from ..adapters.model import write
from ..adapters.state import state_of
from ..adapters.waiting import found, refuse_waiting
from ..kernels import ops
from ..layers import sharding
from ..layers.sites import Site, sites_of
from ..layers.units import Units
from ..selection import pattern
from ..selection.config import AS_GIVEN
from ..selection.inputs import has_inputs
from .candidates import Candidates, ColumnCandidates
from .exchange import mark_frozen, moments, redraw, regrow, watch
from .mask_options import Options, Strategy

WATCHED = 4  # candidates per entry to grow: the first gradient chooses them, all gradients of `steps` decide among them


class DynamicMask:
    """Moves the mask of a model in training: call `step()` after every `optimizer.step()`.

    What moves are single entries or, of a weight that trains whole columns, columns.

    `mode="regrow"` (SpIEL, arXiv 2401.16405, and RigL, arXiv 1911.11134): every `every` steps a fraction of each weight's
    entries is dropped and as many are grown among the positions that do not train. A dropped entry goes back to its base
    value. `mode="recompute"` (SPEFT, arXiv 2412.13488): what was trained stays in the weights, and `strategy` draws the mask
    anew; the adapter keeps the entries left behind (positions, values and base), and `sprand.save` writes them. In
    both modes the number of entries of each weight stays, entries that stay keep the optimizer's moments, and new ones
    start from zero. Parameters and optimizer state are changed in place.

    The gradients by which entries grow exist for one weight at a time and, where the weight is large, for one chunk of its
    rows; inside of `torch.compile` they are not seen, but scores of columns are. A weight grows nothing whose gradient is zero
    or not finite, and drops no more than it grows. All choices are deterministic, equal scores go to the lower position. Under
    `torch.distributed` every rank calls `step()`; the ranks' gradients are added, and all of them move the mask alike.

    To resume, load the model's, the optimizer's and this object's `state_dict`, in this order.

    Args:
        model: a model with trained entries; itself, not its wrapper.
        optimizer: the optimizer that holds them; None if it is given by `bind` before the first step.
        every: steps between two changes.
        fraction: of each weight's entries, exchanged at a change, in (0, 1); for `"regrow"`, by default 0.2.
        drop: `"delta_change"`: entries that changed least since the last change; `"delta"`: entries nearest to their base.
        grow: `"gradient"`: the largest sums of gradients, of columns (of linear layers) those of the score of `"token_fisher"`;
            `"random"`: any, drawn from `seed`.
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
        ValueError: An option is out of range, the model has no trained entries, or columns of other layers than linear ones that
            gradients would grow, or is sharded, or the optimizer does not hold them.
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
        self.options = Options(every, fraction, drop, grow, steps, decay, until, mode, strategy, seed)
        self.model, self.optimizer = model, None
        self.count = self.changes = 0
        self._adapter = state_of(model).current
        if self._adapter is None or not self._adapter.patterns:
            raise ValueError("DynamicMask: this model has no sparse entries that are active now")
        sharding.refuse(model, "DynamicMask", "train with DistributedDataParallel, ZeRO-1 or ZeRO-2 instead")
        refuse_waiting(bool(found(model)), "DynamicMask")
        self._units = {site.name: _units_of(site) for site in sites_of(model)}
        if mode == "regrow" and grow == "gradient":
            _refuse_unscored(self._units, sites_of(model))
        self._anchors = _deltas(sites_of(model))
        self._candidates: dict[str, Candidates] = {}
        if optimizer is not None:
            self.bind(optimizer)
        self._arm()

    @property
    def mode(self) -> str:
        """How the mask changes: `"regrow"` or `"recompute"`."""
        return self.options.mode

    def bind(self, optimizer: torch.optim.Optimizer) -> DynamicMask:
        """Give the optimizer whose moments move with the mask.

        Args:
            optimizer: holds every trained entry of the model.

        Returns:
            The same object.

        Raises:
            ValueError: The optimizer does not hold every trained entry of the model.
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
            RuntimeError: No optimizer is bound, another adapter was made active, an optimizer state cannot be moved, or no
                gradient was seen that could say what to grow. The model is as it was then.
            ValueError: A mask that `strategy` gives does not fit its weight.
        """
        if self.optimizer is None:
            raise RuntimeError("DynamicMask: no optimizer; give it when the mask is made, or by bind(optimizer)")
        if state_of(self.model).current is not self._adapter:
            raise RuntimeError("DynamicMask: another adapter is active than when this was made; make one for it")
        self.count += 1
        for candidates in self._candidates.values():
            candidates.settle()
        changes = self.options.changes_at(self.count)
        if changes:
            self._change()
        self._arm()
        return changes

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here, to the bit: tensors and numbers."""
        return {
            "count": self.count,
            "changes": self.changes,
            "anchors": dict(self._anchors),
            "candidates": {
                name: {"positions": candidates.positions, "sums": candidates.sums}
                for name, candidates in self._candidates.items()
                if candidates.sums is not None
            },
            "frozen": {name: dataclasses.asdict(frozen) for name, frozen in self._adapter.frozen.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; the model holds the mask and the weights of that moment already.

        Raises:
            ValueError: The state was made for other weights, or by a mask with other options.
        """
        sites = {site.name: site for site in sites_of(self.model)}
        self._check_state(state, sites)
        self.count, self.changes = int(state["count"]), int(state["changes"])
        self._anchors = {name: state["anchors"][name].to(anchor, copy=True) for name, anchor in self._anchors.items()}
        self._adapter.frozen = {}
        for name, parts in state["frozen"].items():
            device = sites[name].device
            self._adapter.frozen[name] = Frozen(*(parts[part].to(device) for part in ("indices", "values", "base")))
            mark_frozen(sites[name])
        if self.changes:
            self._adapter.config = dataclasses.replace(self._adapter.config, **AS_GIVEN)
        self._disarm()
        self._arm()
        for name, parts in state["candidates"].items():
            candidates = self._candidates[name]
            candidates.positions = parts["positions"].to(candidates.active)
            candidates.sums = parts["sums"].to(candidates.active.device)

    def _check_state(self, state: Mapping[str, Any], sites: Mapping[str, Site]) -> None:
        shapes = {name: list(anchor.shape) for name, anchor in state["anchors"].items()}
        own = {name: list(anchor.shape) for name, anchor in self._anchors.items()}
        if shapes != own:
            raise ValueError(f"DynamicMask: expected a state for the entries {own}, got {shapes}")
        for kind, where, values in (("frozen", "indices", "values"), ("candidates", "positions", "sums")):
            for name, parts in state[kind].items():
                if name not in sites or parts[where].shape != parts[values].shape:
                    raise ValueError(f"DynamicMask: expected {kind} positions and values of {', '.join(sites)}, got {name}")
                most = self._units[name].count if kind == "candidates" else sites[name].numel
                pattern.check_indices(f"DynamicMask: {name}", parts[where].sort().values, most)
        searched = self._growing(int(state["count"]))
        if not state["candidates"].keys() <= searched.keys():
            raise ValueError(
                f"DynamicMask: the state looks for entries to grow after step {state['count']}, this mask does not; make it with "
                "the same options"
            )

    def _growing(self, count: int) -> dict[str, int]:
        """How many units each weight grows at the next change, where gradients after the step `count` choose them."""
        change = self.options.next_change(count)
        if not self.options.searches_before(change, count):
            return {}
        numbers = {site.name: self._exchanged(site, change) for site in sites_of(self.model)}
        return {name: number for name, number in numbers.items() if number}

    def _exchanged(self, site: Site, count: int) -> int:
        """How many units of a weight, entries or columns, are exchanged at a step."""
        units = self._units[site.name]
        held = site.entries.pattern.nnz // units.size
        asked = round(self.options.fraction_at(count) * held)
        return min(asked, units.count - held)

    def _arm(self) -> None:
        """Let the next backward passes look for candidates, if they are among the last before a change."""
        if self._candidates:
            return
        growing = self._growing(self.count)
        for site in sites_of(self.model) if growing else ():
            if site.name in growing:
                self._candidates[site.name] = self._candidates_of(site, growing[site.name])
                watch(site, self._candidates[site.name])

    def _candidates_of(self, site: Site, growing: int) -> Candidates:
        chosen, units = site.entries.pattern.chosen, self._units[site.name]
        if units.size > 1:
            return ColumnCandidates(chosen, units.count)
        free = site.numel - chosen.numel()
        return Candidates(chosen, min(free, WATCHED * growing), ops.accumulation_dtype(site.weight.dtype))

    def _disarm(self) -> None:
        self._candidates = {}
        for site in sites_of(self.model):
            watch(site, None)

    def _change(self) -> None:
        sites = sites_of(self.model)
        for site in sites:
            list(moments(site, self.optimizer))  # raises before anything is changed
        if self.mode == "recompute":
            self._recompute(sites)
        else:
            self._regrow(sites)
        self._anchors = _deltas(sites)
        self._adapter.patterns = {site.name: site.entries.pattern for site in sites}
        self._adapter.config = dataclasses.replace(self._adapter.config, **AS_GIVEN)
        self.changes += 1

    def _regrow(self, sites: list[Site]) -> None:
        if self._candidates and all(candidates.sums is None for candidates in self._candidates.values()):
            raise RuntimeError(
                f"DynamicMask: no gradient was seen in the {self.options.steps} steps before this change; call step() once after "
                "each optimizer.step(), and do not compile the model with torch.compile"
            )
        for site in sites:
            grown = self._grown(site, self._exchanged(site, self.count))
            if grown.numel():
                moved = site.entries.delta.detach()
                if self.options.drop == "delta_change":
                    moved = moved - self._anchors[site.name]
                regrow(site, self._units[site.name], grown, moved, self.optimizer)
        self._disarm()

    def _grown(self, site: Site, count: int) -> Tensor:
        """The units that a weight grows now, sorted; at most `count`."""
        held, units = site.entries.pattern.chosen, self._units[site.name]
        if self.options.grow == "gradient":
            candidates = self._candidates.get(site.name)
            return held.new_empty(0) if candidates is None else candidates.largest(count)
        drawn = held.new_empty(held.numel() + count)
        key = pattern.draw_key(f"regrow {self.count}", site.name, site.shape, self.options.seed)
        ops.uniform_indices_(drawn, units.count, key)
        free = drawn[~torch.isin(drawn, held)]
        return free[:count].sort().values

    def _recompute(self, sites: list[Site]) -> None:
        write(self.model)
        masks = self._drawn(sites)
        write(self.model)
        for site in sites:
            frozen = self._adapter.frozen.get(site.name) or nothing_frozen(site.entries.indices, site.entries.base)
            self._adapter.frozen[site.name] = redraw(site, masks[site.name], frozen, self.optimizer)

    def _drawn(self, sites: list[Site]) -> dict[str, Tensor]:
        """What the strategy draws for each weight: as many positions as train already, sorted."""
        masks = self.options.strategy
        if callable(masks):
            with torch.enable_grad():
                masks = masks(self.model)
        if not isinstance(masks, Mapping):
            raise ValueError(f"strategy: expected {{parameter name: mask or indices}}, got {type(masks).__name__}")
        drawn = {}
        for site in sites:
            name, before = site.name, site.entries.indices
            if name not in masks:
                raise ValueError(f"strategy: expected a mask or indices of {name}, got only {', '.join(masks) or 'none'}")
            indices = pattern.from_user(name, masks[name], site.weight.shape).to(before)
            if indices.numel() != before.numel():
                raise ValueError(f"strategy: expected {before.numel()} entries of {name}, as before, got {indices.numel()}")
            drawn[name] = indices
        return drawn


def _deltas(sites: list[Site]) -> dict[str, Tensor]:
    """Copies of the trained changes by parameter name."""
    return {site.name: site.entries.delta.detach().clone() for site in sites}


def _units_of(site: Site) -> Units:
    """What is exchanged of a weight: its columns, where whole ones train, or its entries."""
    return site.entries.pattern.columns or Units.of(site.shape, None)


def _refuse_unscored(units: Mapping[str, Units], sites: list[Site]) -> None:
    """Refuse to grow, by gradients, columns that nothing scores."""
    for site in sites:
        if units[site.name].size > 1 and not has_inputs(site):
            raise ValueError(
                f"DynamicMask: {site.name} trains whole columns, and gradients grow those of linear layers alone; give "
                "grow='random', or leave it out (exclude_modules)"
            )
