"""Targets: which weights of a model a configuration means, those of which entries train and those that train in full."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layers.offload import check_at_hand
from ..layers.sites import Site, distinct, is_linear, joined, named_modules, weights_of
from .config import SparseConfig

HEADS = ("score", "classifier")  # how Hugging Face names classification heads
OUTPUT_HEADS = ("lm_head", "embed_out", "output_projection", *HEADS)
LOADED = "_is_hf_initialized"  # what transformers marks parameters with that it has loaded from a checkpoint


@dataclass(frozen=True)
class View:
    """A model as configurations see it.

    Attributes:
        model: the model itself.
        modules: its modules by name.
        weights: its weights by each name they have; a tied one is one site.
        output: the module that makes logits of hidden states; None if there is none, or the model does not say.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    weights: Mapping[str, Site]
    output: nn.Module | None

    def sites(self) -> list[Site]:
        """Every weight once, in the order of the model."""
        return distinct(self.weights)


@dataclass(frozen=True)
class Targets:
    """What a configuration trains of a model.

    Attributes:
        model: the model itself.
        sites: the weights of which entries train, in the order of the model.
        saved: the weights that train in full.
        numel: entries of all weights but those that train in full.
        masks: given masks or indices by the name of their site; None where entries are drawn or scored.
    """

    model: nn.Module
    sites: list[Site]
    saved: list[Site]
    numel: int
    masks: dict[str, Tensor] | None


def view_of(model: nn.Module) -> View:
    """A model as it is."""
    return View(model, dict(named_modules(model)), weights_of(model), output_of(model))


def output_of(model: nn.Module) -> nn.Module | None:
    """The module that a Hugging Face model names as its output embeddings."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def find_targets(view: View, config: SparseConfig, in_full: Collection[str] | None = None) -> Targets:
    """The weights that a configuration targets.

    Args:
        view: the model.
        config: what to train.
        in_full: names of the modules that train in full; by default those that `config.modules_to_save` names.

    Raises:
        ValueError: A name in the configuration matches nothing, nothing is left to choose entries of, or accelerate has offloaded
            a target.
    """
    masks = _masks(view, config) if isinstance(config.strategy, Mapping) else None
    names = _matching(view, config) if masks is None else set(masks)
    whole = _inside(view, _modules_in_full(view, config) if in_full is None else in_full)
    saved = [site for site in view.sites() if any(id(module) in whole for module, _ in site.owners)]
    apart = {site.name for site in saved}
    in_part = names - apart
    sites = [site for site in view.sites() if site.name in in_part]
    if names and not sites:
        raise ValueError(f"modules_to_save: it trains all targets in full, {', '.join(sorted(names)[:5])}; target more")
    for site in (*sites, *saved):
        check_at_hand(site)
    _warn_of_new(view, sites)
    numel = sum(site.numel for site in view.sites() if site.name not in apart)
    return Targets(view.model, sites, saved, numel, masks)


def new_layers(view: View) -> list[str]:
    """The layers of a model of transformers that its checkpoint lacks, which start from random values as a new head does.

    Not among them are output embeddings, which resizing makes anew, and modules that have others in them.
    """
    owners = {id(module) for site in _new_weights(view) for module, _ in site.owners}
    return [name for name, module in view.modules.items() if id(module) in owners and name and not list(module.children())]


def _new_weights(view: View) -> list[Site]:
    """The weights that transformers has not loaded, of a model of which it has loaded others."""
    sites = [site for site in view.sites() if site.backend is None and site.owners[0][0] is not view.output]
    new = [site for site in sites if not getattr(site.weight, LOADED, False)]
    return new if len(new) < len(sites) else []


def _warn_of_new(view: View, sites: Sequence[Site]) -> None:
    """Warn of targets that are not from the model's checkpoint: an adapter of their entries fits no other copy of it."""
    new = {site.name for site in _new_weights(view)}
    names = [site.name for site in sites if site.name in new]
    if names:
        warnings.warn(
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: not in the checkpoint that the model was loaded from, "
            "so these start from random values, which an adapter does not hold: it fits this copy of the model alone; train such "
            'layers in full: modules_to_save="auto", or name them there',
            stacklevel=4,
        )


def sites_named(model: nn.Module, names: Iterable[str]) -> dict[str, Site]:
    """The weights of these names, by name."""
    weights = weights_of(model)
    return {name: weights[name] for name in names}


def _masks(view: View, config: SparseConfig) -> dict[str, Tensor]:
    """The given masks or indices by the name of their site."""
    shapes = getattr(config.strategy, "shapes", {})
    masks = {}
    for name, mask in config.strategy.items():
        if name not in view.weights:
            raise ValueError(f"mask: the model has no parameter {name!r}; {closest(name, list(view.weights))}")
        site = view.weights[name]
        there = tuple(shapes.get(name, site.shape))
        if there != site.shape:
            raise ValueError(f"mask: {name} is {list(there)} there and {list(site.shape)} in this model")
        if site.name in masks:
            raise ValueError(f"mask: {name} is another name of {site.name} in this model; give one mask for both")
        masks[site.name] = mask
    return masks


def _matching(view: View, config: SparseConfig) -> set[str]:
    """The names of the sites that the configuration's words match."""
    names = [joined(module, "weight") for module in _matching_modules(view, config)]
    if config.target_parameters:
        names += _match_all("target_parameters", config.target_parameters, list(view.weights))
    if not names:
        hint = _module_hint(view, config.target_modules)
        raise ValueError(f"target_modules={config.target_modules!r} matches no module of this model; {hint}")
    return {view.weights[name].name for name in names}


def _matching_modules(view: View, config: SparseConfig) -> list[str]:
    wanted, weighted = config.target_modules, _with_weight(view)
    computed = [name for name in view.modules if joined(name, "weight") not in view.weights and _sources(view.modules[name])]
    for suffix in () if isinstance(wanted, str | None) else wanted:
        if not any(_is_suffix(suffix, name) for name in (*weighted, *computed)):
            _refuse(view, suffix)
    names = [name for name in (*weighted, *computed) if not _fits(config.exclude_modules, name)]
    if wanted == "all-linear":
        names = [name for name in names if _is_linear(view, name) and not _is_output_head(view, name)]
    else:
        names = [name for name in names if _fits(wanted, name)]
    for name in names:
        if name in computed:
            _refuse_computed(view, name)
    return names


def _fits(wanted: str | Sequence[str] | None, name: str) -> bool:
    """Whether a name is one of those that are wanted: by an expression, or by suffixes."""
    if isinstance(wanted, str):
        return bool(re.fullmatch(wanted, name))
    return any(_is_suffix(suffix, name) for suffix in wanted or ())


def _sources(module: nn.Module) -> list[str]:
    """The parameters that the `weight` of a module is computed from, by their names in it, of one that has no such parameter."""
    if parametrize.is_parametrized(module, "weight"):
        return [f"parametrizations.weight.{name}" for name in module.parametrizations["weight"]._parameters]
    if isinstance(module, nn.Linear) or isinstance(module.__dict__.get("weight"), Tensor):
        return [name for name in module._parameters if name != "bias"]
    return []


def _refuse_computed(view: View, name: str) -> None:
    """Say why a layer whose weight is computed from other parameters is no target, and what is."""
    sources = _sources(view.modules[name])
    listed = ", ".join(f"'{joined(name, source)}'" for source in sources)
    raise ValueError(
        f"target_modules: the weight of {name} ({type(view.modules[name]).__name__}) is computed anew in every forward, from "
        f"{', '.join(sources)} (it is pruned, normalized or parametrized), so entries of it cannot train; make it a parameter "
        f"again first (prune.remove, remove_weight_norm, remove_parametrizations), name what it is computed from, "
        f"target_parameters=[{listed}], or leave the layer out by exclude_modules"
    )


def _modules_in_full(view: View, config: SparseConfig) -> set[str]:
    wanted, names = config.modules_to_save, [name for name in view.modules if name]
    if wanted is None:
        return set()
    if wanted == "auto":
        return {name for name in names if name.rpartition(".")[2] in HEADS} | set(new_layers(view))
    return _match_all("modules_to_save", (wanted,) if isinstance(wanted, str) else wanted, names)


def _inside(view: View, names: Iterable[str]) -> set[int]:
    """The identities of these modules and of all modules in them."""
    return {id(module) for name in names if name in view.modules for module in view.modules[name].modules()}


def _with_weight(view: View) -> list[str]:
    return [name for name in view.modules if joined(name, "weight") in view.weights]


def _is_linear(view: View, name: str) -> bool:
    """Whether a module is a linear layer."""
    module, site = view.modules[name], view.weights.get(joined(name, "weight"))
    return is_linear(module) or (site is not None and site.backend is not None)


def _is_output_head(view: View, name: str) -> bool:
    return view.modules[name] is view.output or name.rpartition(".")[2] in OUTPUT_HEADS


def _refuse(view: View, suffix: str) -> None:
    """Say why a name in `target_modules` stands for no weight."""
    named = [name for name in view.modules if name and _is_suffix(suffix, name)]
    if not named:
        raise ValueError(f"target_modules: {suffix!r} matches no module of this model; {_module_hint(view, suffix)}")
    name, module = named[0], view.modules[named[0]]
    own = [parameter for parameter, value in module._parameters.items() if value is not None]
    if not own:
        raise ValueError(
            f"target_modules: {name} ({type(module).__name__}) has no weight of its own; name the layers inside of it instead"
        )
    listed = ", ".join(f"'{name.rpartition('.')[2]}.{parameter}'" for parameter in own)
    raise ValueError(
        f"target_modules: {name} ({type(module).__name__}) has no `weight`, it holds {', '.join(own)}; "
        f"name them as target_parameters=[{listed}] instead"
    )


def _match_all(field_name: str, wanted: Sequence[str], names: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for suffix in wanted:
        matching = {name for name in names if _is_suffix(suffix, name)}
        if not matching:
            raise ValueError(f"{field_name}: {suffix!r} matches nothing in this model; {closest(suffix, names)}")
        chosen |= matching
    return chosen


def _is_suffix(wanted: str, name: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _module_hint(view: View, wanted: Any) -> str:
    weighted = [name for name in _with_weight(view) if name]
    linear = [name for name in _with_weight(view) if _is_linear(view, name)]
    if linear and wanted != "all-linear":
        return f'{closest(str(wanted), linear)}, or "all-linear"'
    names = f"modules with a weight ({', '.join(weighted[:5])}) in target_modules, or " if weighted else ""
    return f"it has no linear layer{' but its output head' if linear else ''}; name {names}parameters in target_parameters"


def closest(wanted: str, names: Sequence[str]) -> str:
    """The names that come nearest to one that matches nothing, in words."""
    last = (name.rpartition(".")[2] for name in names)
    known = dict.fromkeys([*(part for part in last if not part.isdigit()), *names])
    near = difflib.get_close_matches(wanted, known, n=5, cutoff=0.0)
    return f"the closest names are {', '.join(near)}" if near else "it has none of that kind"
