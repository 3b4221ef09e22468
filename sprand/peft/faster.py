"""PEFT's SHiRA and Super-Tuning on sprand's kernels: the layers stay theirs, their forward makes no dense copy of a weight."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.shira import ShiraModel
from peft.tuners.shira.layer import Linear as ShiraLinear
from peft.tuners.supertuning import SupertuningModel
from peft.tuners.supertuning.layer import Linear as SupertuningLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..layers.units import Units
from ..layers.writable import check_writable
from ..selection import pattern
from .adapter_target import AdapterTarget, Positions
from .hosted import host, refuse_applied, unhost
from .plan import base_modules


class FastLayer:
    """Mixed into a PEFT layer: its parameters, names and files stay, and its entries are written into the weight.

    A subclass says by `positions(adapter_name)` in which tensor the layer keeps them, and by `flat` what flat indices they are.
    """

    _sprand_target: AdapterTarget
    _sprand_sources: dict[str, Tensor]

    @property
    def base_weight(self) -> nn.Parameter:
        """The weight itself, also while code that reads it by name would get an alias."""
        return self.base_layer._parameters["weight"]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the active adapters in its weight."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        self._follow()
        return self.base_layer(x, *args, **kwargs)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Make other adapters the active ones, as in PEFT; the weight follows."""
        super().set_adapter(*args, **kwargs)
        self._follow()

    def enable_adapters(self, enabled: bool) -> None:
        """Turn all adapters on or off, as in PEFT; the weight follows."""
        super().enable_adapters(enabled)
        self._follow()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in PEFT, and exact: `unmerge` gives the base back bit for bit."""
        target, weight = self._sprand_target, self.base_weight
        names = target.known(check_adapters_to_merge(self, adapter_names) or ())
        if not names:
            return
        self._follow()
        for name in names:
            self._take(name)
            if safe_merge and not target.deltas[name].isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.merged_adapters.extend(names)
        target.merge(weight, self.merged_adapters)

    def unmerge(self) -> None:
        """Put the base back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._sprand_target.unmerge(self.base_weight)
        self.merged_adapters.clear()
        self._follow()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as in PEFT; one that is active leaves the weight first."""
        target = self._sprand_target
        target.activate(self.base_weight, [name for name in target.active if name != adapter_name])
        super().delete_adapter(adapter_name)
        self._sprand_sources.pop(adapter_name, None)
        target.indices._buffers.pop(adapter_name, None)
        target.bases._buffers.pop(adapter_name, None)
        target.forget()

    def _take(self, name: str) -> None:
        """Read where the entries of an adapter are, if PEFT has other ones by now."""
        source = self.positions(name)
        if self._sprand_sources.get(name) is source:
            return
        self._sprand_sources[name] = source
        target, weight = self._sprand_target, self.base_weight
        target.activate(weight, [active for active in target.active if active != name])
        target.indices.put(name, self.flat(source).to(weight.device), Units.of(weight.shape, 1), persistent=False)
        target.forget()

    def _follow(self) -> None:
        """Let the weight hold the adapters that PEFT says are active."""
        target = self._sprand_target
        names = [] if self.disable_adapters or self.merged else target.known(self.active_adapters)
        for name in names:
            self._take(name)
        target.activate(self.base_weight, names)


class FastShira(FastLayer, ShiraLinear):
    """PEFT's SHiRA layer on sprand's kernels."""

    def positions(self, adapter_name: str) -> Tensor:
        return self.shira_indices[adapter_name]

    def flat(self, positions: Tensor) -> Tensor:
        rows, columns = positions.long()
        return (rows * self.in_features + columns).to(pattern.index_dtype(self.base_weight.numel()))


class FastSupertuning(FastLayer, SupertuningLinear):
    """PEFT's Super-Tuning layer on sprand's kernels. Of a 16-bit weight a change is rounded once, not twice."""

    def positions(self, adapter_name: str) -> Tensor:
        return self.supertuning_indices[adapter_name]

    def flat(self, positions: Tensor) -> Tensor:
        return positions


class FastTuner:
    """Mixed into a PEFT tuner: unloading gives ordinary modules back."""

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        layers = [module for module in self.model.modules() if isinstance(module, FastLayer)]
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for layer in layers:
            if not merge:
                layer._sprand_target.activate(layer.base_weight, ())
            unhost(layer.base_layer)
        return model


class FastShiraModel(FastTuner, ShiraModel):
    """PEFT's SHiRA tuner over `FastShira` layers."""


class FastSupertuningModel(FastTuner, SupertuningModel):
    """PEFT's Super-Tuning tuner over `FastSupertuning` layers."""


FAST = {ShiraLinear: (FastShira, "shira_weight"), SupertuningLinear: (FastSupertuning, "supertuning_values")}
FAST_TUNERS = {ShiraModel: FastShiraModel, SupertuningModel: FastSupertuningModel}


def accelerate(model: nn.Module) -> nn.Module:
    """Let a SHiRA or Super-Tuning model run on sprand's kernels, in place: its parameters, files and verbs stay PEFT's.

    No dense copy of a weight is made or kept for backward, the gradient is sampled, and merging is exact. Layers with a quantized
    base, and Super-Tuning with low-rank parts, stay as they are.

    Args:
        model: a PEFT model, or one that PEFT layers were injected into.

    Returns:
        The same object.

    Raises:
        ValueError: The model has no such layer, a layer is merged, or its weight cannot be written.
    """
    layers = [module for module in model.modules() if type(module) in FAST and _can_change(module)]
    if not layers:
        kinds = sorted({type(module).__name__ for module in model.modules() if isinstance(module, BaseTunerLayer)})
        raise ValueError(
            f"accelerate: expected a model with SHiRA or Super-Tuning layers on plain linear layers, got "
            f"{', '.join(kinds) or 'none'}"
        )
    refuse_applied(model, "accelerate")
    if any(layer.merged for layer in layers):
        raise ValueError("accelerate: the adapters are merged; call model.unmerge_adapter() first")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = {id(module): name for name, module in reversed([*base_modules(base)])}
    names = [f"{modules[id(layer.base_layer)]}.weight" for layer in layers]
    check_writable({name: layer.base_layer.weight for name, layer in zip(names, layers, strict=True)})
    for name, layer in zip(names, layers, strict=True):
        layer.__class__, values = FAST[type(layer)]
        scales = getattr(layer, "scaling", None)
        target = AdapterTarget(name, getattr(layer, values), Positions(), BufferDict(persistent=False), scales)
        layer._sprand_target, layer._sprand_sources = target, {}
        host(layer.base_layer, "weight", target)
        layer._follow()
    tuner = getattr(model, "base_model", None)
    if type(tuner) in FAST_TUNERS:
        tuner.__class__ = FAST_TUNERS[type(tuner)]
    return model


def _can_change(layer: Any) -> bool:
    plain = type(layer.base_layer) is nn.Linear and getattr(layer, "quantization_backend", None) is None
    return plain and not any(getattr(layer, "supertuning_rank", {}).values())
