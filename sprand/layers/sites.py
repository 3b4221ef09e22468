"""Sites: the weights of a model by name, each once, with every module that holds it and the entries that train there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import sharding
from .entries import Entries
from .units import Units

Owner = tuple[nn.Module, str]

INPUTS_FIRST = nn.modules.conv._ConvTransposeNd
INPUTS_SECOND = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # by torch.compile, checkpoint_wrapper, FSDP1


@dataclass
class Site:
    """A weight of a model.

    Attributes:
        name: the weight's name in the model; the first one where several modules share it.
        owners: every module that holds it, with its name there.
        shape: the shape of the whole weight, also where it is sharded or stored packed.
        device: where its entries are kept.
        backend: how a weight that is stored packed is read; None for an ordinary one.
    """

    name: str
    owners: list[Owner]
    shape: tuple[int, ...]
    device: torch.device
    backend: Any = None

    @property
    def module(self) -> nn.Module:
        """The first module that holds the weight."""
        return self.owners[0][0]

    @property
    def parameter(self) -> str:
        """The weight's name in that module."""
        return self.owners[0][1]

    @property
    def module_name(self) -> str:
        """The name of the module in the model."""
        return self.name.rpartition(".")[0]

    @property
    def weight(self) -> Tensor | None:
        """The weight itself; a packed one may have no parameter of that name."""
        return self.module._parameters.get(self.parameter)

    @property
    def numel(self) -> int:
        """How many entries the whole weight has."""
        return math.prod(self.shape)

    @property
    def column_axis(self) -> int | None:
        """The dimension that counts the inputs of the weight's layer: what layout `"columns"` chooses along.

        It is 1 for linear layers (packed ones as well), convolutions (of groups: in the weight as it is stored), and embeddings,
        whose features these are; 0 for Hugging Face's `Conv1D` and for transposed convolutions, which store inputs first. None,
        for all else, means that entries are chosen one by one.
        """
        if self.parameter != "weight" or len(self.shape) < 2 or not self.numel:
            return None
        if is_conv1d(type(self.module)) or isinstance(self.module, INPUTS_FIRST):
            return 0
        return 1 if self.backend is not None or isinstance(self.module, INPUTS_SECOND) else None

    @property
    def units(self) -> Units:
        """The weight's columns."""
        return Units.of(self.shape, self.column_axis)

    @property
    def entries(self) -> Entries:
        """The trained entries of the weight."""
        return self.module.sparse_entries(self.parameter)

    @property
    def deltas(self) -> list[nn.Parameter]:
        """The deltas of the weight that train; nothing else of its entries is read."""
        return [delta for delta, parameter in self.module.sparse_deltas() if parameter == self.parameter]

    def share(self, other: Site) -> None:
        """Let the owners of another site of the same weight be owners of this one."""
        known = {(id(module), parameter) for module, parameter in self.owners}
        self.owners += [owner for owner in other.owners if (id(owner[0]), owner[1]) not in known]


def is_conv1d(cls: type[nn.Module]) -> bool:
    """Whether this is Hugging Face's `Conv1D`, a linear layer whose weight is `[in, out]`."""
    return any(base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils" for base in cls.__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, of PyTorch or of Hugging Face."""
    return isinstance(module, nn.Linear) or is_conv1d(type(module))


def site_of(name: str, module: nn.Module, parameter: str) -> Site:
    """The site of an ordinary parameter."""
    weight = module._parameters[parameter]
    return Site(name, [(module, parameter)], tuple(sharding.shape_of(weight)), weight.device)


def sites_of(model: nn.Module) -> list[Site]:
    """Every weight with trained entries, in the order of the model, tied ones once; also of a PEFT model."""
    sparse = ((prefix, module) for prefix, module in named_modules(model) if hasattr(type(module), "sparse_sites"))
    return distinct(collected(site for prefix, module in sparse for site in module.sparse_sites(prefix)))


def weights_of(model: nn.Module) -> dict[str, Site]:
    """Every parameter of a model, by each name that it has there; a tied one is one site, under its first name."""
    return collected(site for prefix, module in named_modules(model) for site in own_sites(prefix, module))


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by every name that they have; a wrapper has the name of the module in it, and comes first."""
    return ((plain_name(name), module) for name, module in model.named_modules(remove_duplicate=False))


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model by their names without wrappers."""
    return ((plain_name(name), p) for name, p in model.named_parameters(remove_duplicate=remove_duplicate))


def plain_name(name: str) -> str:
    """A name in a model as it is without the wrappers of `WRAPPED` in it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def own_sites(prefix: str, module: nn.Module) -> Iterator[Site]:
    """The parameters of a module itself, by their names in a model that calls it `prefix`.

    Raises:
        ValueError: The module is TorchScript and has parameters.
    """
    if isinstance(module, torch.jit.ScriptModule) and len(module._parameters):
        raise ValueError(
            f"{prefix or 'the model'} is TorchScript, whose code reads weights where no entries can train; give the model in "
            "Python, and script or trace what sprand.merge makes of it"
        )
    for parameter, weight in module._parameters.items():
        if weight is not None:
            yield site_of(joined(prefix, parameter), module, parameter)


def collected(sites: Iterable[Site]) -> dict[str, Site]:
    """Sites by each name; those of one weight become one, under the first name."""
    named: dict[str, Site] = {}
    first: dict[int, Site] = {}
    for site in sites:
        key = id(site.module if site.weight is None else site.weight)
        named[site.name] = shared = first.setdefault(key, site)
        if shared is not site:
            shared.share(site)
    return named


def distinct(named: Mapping[str, Site]) -> list[Site]:
    """Each site once, in the order of the model."""
    return [site for name, site in named.items() if site.name == name]


def joined(prefix: str, name: str) -> str:
    """A name inside of a module, as the model calls it."""
    return f"{prefix}.{name}" if prefix else name
