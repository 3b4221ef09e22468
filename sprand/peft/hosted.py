"""Hosted modules: sparse modules whose deltas live in a PEFT layer around them, one delta per adapter.

`host` gives a module the same forward that `sprand.apply` gives it. What differs is where the entries are kept
(`AdapterTarget`, shared with the PEFT layer) and that several adapters may be in effect on one weight: then
`base + sum of scale * delta` is summed in float32 in their order and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..layers.attached import AttachedModule
from ..layers.entries import Entries
from ..layers.module import SparseModule, change_class, sparse_class, track, untrack
from ..layers.sites import Site, site_of
from .adapter_target import AdapterTarget


class HostedModule(SparseModule):
    """A sparse module that registers no tensor of its own: its entries are those of its `AdapterTarget`s."""

    _sprand_hosted: dict[str, AdapterTarget]

    @property
    def _sprand_targets(self) -> dict[str, AdapterTarget]:
        return {name: target for name, target in self._sprand_hosted.items() if target.active}

    @property
    def _sprand_active(self) -> bool:
        return any(target.active for target in self._sprand_hosted.values())

    def sparse_entries(self, parameter: str = "weight") -> Entries:
        return self._sprand_hosted[parameter].entries(self._parameters[parameter])

    def sparse_sites(self, prefix: str) -> Iterator[Site]:
        """The weights with adapters in effect, by their names in the base model."""
        for parameter, target in self._sprand_hosted.items():
            if target.in_effect:
                yield site_of(target.name, self, parameter)

    def sparse_deltas(self) -> Iterator[tuple[nn.Parameter, str]]:
        """The deltas in effect; one of several, or one whose indices do not ascend, is no delta of `sparse_entries` itself."""
        return ((target.deltas[key], name) for name, target in self._sprand_hosted.items() for key in target.in_effect)

    def make_schedule(self, parameter: str) -> None:
        """Nothing: a target makes its schedules when it is used."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        for name, target in self._sprand_hosted.items():
            target.cast_base(self._parameters[name])
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A checkpoint of a PEFT model holds base weights, and the adapters beside them."""
        for name, target in self._sprand_hosted.items():
            if not target.merged:
                target.restore(self._parameters[name])
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, target in self._sprand_hosted.items():
            if not target.merged:
                target.restore(self._parameters[name])
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, target in self._sprand_hosted.items():
            if prefix + name in state_dict:
                target.forget_base()


def refuse_applied(model: nn.Module, what: str) -> None:
    """Refuse a model that trains entries of `sprand.apply`: PEFT would freeze them, and a weight can have one of the two.

    Raises:
        ValueError: It does.
    """
    applied = [name for name, module in model.named_modules() if isinstance(module, AttachedModule)]
    if applied:
        raise ValueError(
            f"{what}: this model trains entries of sprand.apply (in {applied[0]}), which PEFT would freeze; call "
            "sprand.merge(model) or sprand.unmerge(model) first, or train all of it by sprand.apply"
        )


def host(module: nn.Module, parameter: str, target: AdapterTarget) -> None:
    """Let a module use the entries of `target` wherever it uses `parameter`."""
    if not isinstance(module, HostedModule):
        change_class(module, sparse_class(HostedModule, type(module)))
        module.__dict__["_sprand_hosted"] = {}
        track(module)
    module._sprand_hosted[parameter] = target
    module._parameters[parameter].requires_grad_(False)


def unhost(module: nn.Module) -> None:
    """Give a module its class back; its weights stay as they are."""
    if isinstance(module, HostedModule):
        untrack(module)
        change_class(module, module.plain_class)
        del module.__dict__["_sprand_hosted"]
