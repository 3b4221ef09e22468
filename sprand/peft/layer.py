"""The PEFT layer: holds the adapters of one module of the base model, which it lets use them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..adapters.waiting import columns_at
from ..kernels import ops
from ..layers import sharding
from ..layers.sites import Site, site_of
from ..layers.target import BASE, DELTA, INDICES
from .adapter_target import AdapterTarget, Delta, Deltas, Positions, is_whole
from .config import SprandConfig
from .hosted import host, unhost
from .lora import LINEAR, TRANSPOSED, kind_of

# What a layer counts its input and output features by: (in, out).
FEATURES = (("in_features", "out_features"), ("in_channels", "out_channels"), ("num_embeddings", "embedding_dim"), ("nx", "nf"))


class SprandLayer(nn.Module, BaseTunerLayer):
    """Wraps a module of any kind. For its `weight` it has `sprand_delta`, a dict of one parameter `[nnz]` per adapter,
    under the name `sprand_delta.default.weight`.

    For another parameter `name` that is `sprand_delta_name`. Indices are in `sprand_indices`, the original entries in
    `sprand_base`, both by adapter too. Its own names begin with `sprand_`, so that they hide none of the wrapped module.
    """

    adapter_layer_names: tuple[str, ...] = (DELTA,)
    other_param_names: tuple[str, ...] = (INDICES, BASE)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.sprand_targets: dict[str, AdapterTarget] = {}
        self._sites: dict[str, Site] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self._containers("weight")
        self.register_load_state_dict_post_hook(_read_bases)

    def sprand_add(self, site: Site, indices: Tensor, adapter_name: str, config: SprandConfig, low_cpu_mem_usage: bool) -> None:
        """Give an adapter its entries `[nnz]` of one parameter, with a delta of zero."""
        modules, positions, bases = self._containers(site.parameter)
        if site.parameter not in self.sprand_targets:
            self.sprand_targets[site.parameter] = AdapterTarget(site.name, Deltas(modules), positions, bases)
            self._host(site)
        target = self.sprand_targets[site.parameter]
        delta = self._zeros(site, indices.numel())
        modules[adapter_name] = Delta(delta.to("meta") if low_cpu_mem_usage else delta)
        positions.put(adapter_name, indices, site.units, persistent=not config.drawn)
        if config.waits:
            target.waiting[adapter_name] = columns_at(positions.pattern(adapter_name)), config
        self._read_base(site, target, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer makes of its input, with the active adapters in its weights."""
        return self.base_layer(*args, **kwargs)

    def sprand_put(self, parameter: str, adapter_name: str, indices: Tensor) -> None:
        """Give an adapter whose delta is zero other entries `[nnz]` of a parameter, sorted and as many."""
        target = self.sprand_targets[parameter]
        weight = self.get_base_layer()._parameters.get(parameter)
        target.indices.replace(adapter_name, indices)
        target.waiting.pop(adapter_name, None)
        target.forget_positions(adapter_name)
        if self.quantization_backend is None and weight is not None:
            target.read_base(weight)

    def sprand_weights(self) -> Iterator[tuple[str, Tensor, AdapterTarget]]:
        """Name, weight and target of every parameter that an adapter trains."""
        module = self.get_base_layer()
        return ((name, module._parameters.get(name), target) for name, target in self.sprand_targets.items())

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let these adapters be in effect; with several, their changes are summed in float32 in this order and rounded once."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.sprand_refresh()

    def enable_adapters(self, enabled: bool) -> None:
        """Use the adapters, or the base alone, bit for bit."""
        super().enable_adapters(enabled)
        if not enabled and self.merged:
            self.unmerge()
        self.sprand_refresh()

    def sprand_refresh(self) -> None:
        """Write into the weights what is in effect now."""
        names = [] if self.disable_adapters or self.merged else self.active_adapters
        for _, weight, target in self.sprand_weights():
            target.activate(weight, names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away."""
        for _, weight, target in self.sprand_weights():
            target.activate(weight, [name for name in target.active if name != adapter_name])
            target.forget()
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the sum of adapters in the weights.

        Args:
            safe_merge: prove first that every merged entry is finite.
            adapter_names: which; by default the active ones.

        Raises:
            ValueError: `safe_merge` is asked for and an entry is not finite; the weights are as they were.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if self.sprand_trains(name)]
        if not names:
            return
        if safe_merge:
            self.sprand_check_finite(names)
        self.merged_adapters.extend(names)
        for _, weight, target in self.sprand_weights():
            target.merge(weight, target.known(self.merged_adapters))

    def sprand_check_finite(self, adapter_names: Sequence[str]) -> None:
        """Prove that every entry is finite with these adapters merged.

        Raises:
            ValueError: One is not, in PEFT's words.
        """
        for _, weight, target in self.sprand_weights():
            names = target.known(dict.fromkeys([*self.merged_adapters, *adapter_names]))
            if not names:
                continue
            with torch.no_grad():
                finite = torch.isfinite(target.entries(weight, names).values()).all()
            if not finite:
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: entries of "
                    f"{target.name} would not be finite; load the last good checkpoint"
                )

    def unmerge(self) -> None:
        """Put the base back into the weights, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for _, weight, target in self.sprand_weights():
            target.unmerge(weight)
        self.merged_adapters.clear()
        self.sprand_refresh()

    def sprand_leave(self) -> None:
        """Make the base layer an ordinary module again, with the merged adapters in its weights, or with its base."""
        for _, weight, target in self.sprand_weights():
            target.activate(weight, ())
        for site in self._sites.values():
            for module, _ in site.owners:
                unhost(module)
        self.sprand_targets.clear()

    def sprand_trains(self, adapter_name: str) -> bool:
        """Whether an adapter trains anything of this module."""
        return any(adapter_name in target.deltas for target in self.sprand_targets.values())

    def sprand_site(self, parameter: str) -> Site:
        """Where a parameter is in the base model."""
        site, first = site_of(self.sprand_targets[parameter].name, self.get_base_layer(), parameter), self._sites[parameter]
        return replace(site, owners=first.owners, shape=first.shape if sharding.is_of_fsdp1(site.weight) else site.shape)

    def sprand_base_of(self, parameter: str, adapter_name: str) -> Tensor | None:
        """The original entries `[nnz]` of an adapter; None where the base is quantized."""
        target = self.sprand_targets[parameter]
        weight = self.get_base_layer()._parameters[parameter]
        if is_whole(weight):
            return target.entries(weight, (adapter_name,)).base
        return target.bases._buffers.get(adapter_name)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The change that an adapter makes to `weight`, dense, float32."""
        target = self.sprand_targets["weight"]
        delta = target.deltas[adapter_name].detach()
        indices = target.indices[adapter_name].long()
        dense = torch.zeros(self.sprand_site("weight").shape, dtype=delta.dtype, device=delta.device)
        dense.view(-1)[indices] = delta
        return dense

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether all that an adapter trains here are whole columns of a linear weight, which are a LoRA to the bit."""
        for parameter, _, target in self.sprand_weights():
            if adapter_name not in target.deltas:
                continue
            site = self.sprand_site(parameter)
            if kind_of(site) not in (LINEAR, TRANSPOSED) or target.indices.pattern(adapter_name).columns is None:
                return False
        return True

    def _containers(self, parameter: str) -> tuple[nn.ModuleDict, Positions, BufferDict]:
        """The modules that hold a parameter's deltas, indices and bases, by adapter; made when they are first asked for."""
        suffix = "" if parameter == "weight" else f"_{parameter}"
        names = DELTA + suffix, INDICES + suffix, BASE + suffix
        if names[0] not in self._modules:
            for name, module in zip(names, (nn.ModuleDict(), Positions(), BufferDict(persistent=False)), strict=True):
                self.add_module(name, module)
            if suffix:
                self.adapter_layer_names = (*self.adapter_layer_names, names[0])
                self.other_param_names = (*self.other_param_names, *names[1:])
        deltas, indices, bases = (self._modules[name] for name in names)
        return deltas, indices, bases

    def _host(self, site: Site) -> None:
        target = self.sprand_targets[site.parameter]
        self._sites[site.parameter] = site
        for module, parameter in site.owners:
            host(module, parameter, target)

    def _read_base(self, site: Site, target: AdapterTarget, adapter_name: str) -> None:
        if not site.weight.is_meta:
            target.entries(site.weight, (adapter_name,))

    def _zeros(self, site: Site, count: int) -> Tensor:
        """A delta `[count]` beside the weight."""
        return torch.zeros(count, dtype=ops.accumulation_dtype(site.weight.dtype), device=site.weight.device)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for parameter, target in self.sprand_targets.items():
            delta = target.deltas.get(adapter_name)
            if delta is not None and not delta.is_meta:
                delta.data = delta.data.to(device or self.sprand_site(parameter).device)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or (name.startswith("_") and not callable(getattr(type(self.base_layer), name, None))):
                raise  # what tools keep of a module is not that of another; a model calls methods of its own
            if name in ("in_features", "out_features"):
                return _features(self.base_layer)[name == "out_features"]
            return getattr(self.base_layer, name)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """What `torch.nn.TransformerEncoderLayer` asks of its attention."""
        return self.base_layer._qkv_same_embed_dim

    def __repr__(self) -> str:
        return f"sprand.{super().__repr__()}"


class ContainerLayer(SprandLayer):
    """Wraps a `torch.nn.ParameterList` or `ParameterDict`, whose parameters are read as its items."""

    def __len__(self) -> int:
        return len(self.base_layer)

    def __getitem__(self, key: Any) -> Tensor:
        return self.base_layer[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.base_layer)

    def __contains__(self, key: Any) -> bool:
        return key in self.base_layer


def layer_class(module: nn.Module) -> type[SprandLayer]:
    """The layer that wraps an ordinary module."""
    return ContainerLayer if isinstance(module, nn.ParameterList | nn.ParameterDict) else SprandLayer


def adapter_targets(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SprandLayer, str, AdapterTarget]]:
    """Every parameter that an adapter trains: the name of its layer, the layer, the parameter's name there, and the target."""
    for key, layer in model.named_modules():
        if isinstance(layer, SprandLayer):
            for parameter, _, target in layer.sprand_weights():
                if adapter_name in target.deltas:
                    yield key, layer, parameter, target


def _features(module: nn.Module) -> tuple[int | None, int | None]:
    """The numbers of input and output features of a module of any kind, as PEFT counts them; None where it has no such thing."""
    for names in FEATURES:
        if all(hasattr(module, name) for name in names):
            return tuple(getattr(module, name) for name in names)
    width = getattr(module, "embed_dim", None)  # of attention
    return width, None if width is None else 3 * width


def _read_bases(layer: SprandLayer, _: Any) -> None:
    """Read the base under the indices that a checkpoint brought: a forward may see a weight that was cast, or be compiled."""
    if layer.quantization_backend is not None:
        return
    for _, weight, target in layer.sprand_weights():
        if weight is not None and not weight.is_meta and not sharding.is_partition(weight):
            target.read_base(weight)
