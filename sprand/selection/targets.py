"""Targets: which parameters of a model a configuration means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .config import SparseConfig

HEADS = ("score", "classifier")  # how Hugging Face names classification heads
OUTPUT_HEADS = ("lm_head", "embed_out", "output_projection", *HEADS)

# MultiheadAttention reads the weight of this layer without calling it.
READ_NOT_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear


@dataclass
class Place:
    """A targeted parameter of the model: every module that holds it (several where weights are tied)."""

    name: str
    parameter: nn.Parameter
    owners: list[tuple[nn.Module, str]]


def find_targets(model: nn.Module, config: SparseConfig) -> list[Place]:
    """The parameters that a configuration targets, in the order of the model, tied ones once.

    Raises:
        ValueError: nothing matches, or a name in the configuration matches nothing.
    """
    if isinstance(config.strategy, Mapping):
        wanted = set(config.strategy)
        unknown = sorted(wanted - {name for name, _ in model.named_parameters(remove_duplicate=False)})
        if unknown:
            raise ValueError(
                f"strategy: the model has no parameter {unknown[0]!r}; {closest(unknown[0], _parameter_names(model))}"
            )
        return places_of(model, wanted)
    wanted = {f"{name}.weight" if name else "weight" for name in _matching_modules(model, config)}
    if config.target_parameters:
        wanted |= _match_all("target_parameters", config.target_parameters, _parameter_names(model))
    if not wanted:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no module of this model; "
            f"{_module_hint(model, config.target_modules)}"
        )
    return places_of(model, wanted)


def saved_parameters(model: nn.Module, config: SparseConfig) -> dict[str, nn.Parameter]:
    """The parameters of the modules that train in full, by name."""
    if config.modules_to_save is None:
        return {}
    names = [name for name, _ in model.named_modules() if name]
    if config.modules_to_save == "auto":
        chosen = {name for name in names if name.rpartition(".")[2] in HEADS}
    else:
        wanted = (config.modules_to_save,) if isinstance(config.modules_to_save, str) else config.modules_to_save
        chosen = _match_all("modules_to_save", wanted, names)
    return {name: p for name, p in model.named_parameters() if any(name.startswith(f"{module}.") for module in chosen)}


def _matching_modules(model: nn.Module, config: SparseConfig) -> list[str]:
    if config.target_modules is None:
        return []
    linear = _linear_names(model)
    if config.target_modules == "all-linear":
        names = [name for name in linear if not _is_output_head(model, name)]
    else:
        weighted = [name for name, module in model.named_modules() if isinstance(module._parameters.get("weight"), Tensor)]
        if isinstance(config.target_modules, str):
            names = [name for name in weighted if re.fullmatch(config.target_modules, name)]
        else:
            for wanted in config.target_modules:
                if not any(_is_suffix(wanted, name) for name in weighted):
                    raise ValueError(f"target_modules: {wanted!r} matches no module with a weight; {_module_hint(model, wanted)}")
            names = [name for name in weighted if any(_is_suffix(wanted, name) for wanted in config.target_modules)]
    if config.exclude_modules is None:
        return names
    if isinstance(config.exclude_modules, str):
        return [name for name in names if not re.fullmatch(config.exclude_modules, name)]
    return [name for name in names if not any(_is_suffix(wanted, name) for wanted in config.exclude_modules)]


def _linear_names(model: nn.Module) -> list[str]:
    """Linear layers that are called; MultiheadAttention reads the weight of its `out_proj` without calling it."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and not isinstance(module, READ_NOT_CALLED)
    ]


def _is_output_head(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return module is output or (bool(name) and name.rpartition(".")[2] in OUTPUT_HEADS)


def places_of(model: nn.Module, names: set[str]) -> list[Place]:
    """The parameters of these names, with every module that holds them, in the order of the model."""
    places: dict[int, Place] = {}
    chosen: set[int] = set()
    for prefix, module in model.named_modules():
        for parameter, value in module._parameters.items():
            if value is None:
                continue
            name = f"{prefix}.{parameter}" if prefix else parameter
            place = places.setdefault(id(value), Place(name, value, []))
            place.owners.append((module, parameter))
            if name in names:
                chosen.add(id(value))
                if isinstance(module, READ_NOT_CALLED):
                    raise ValueError(
                        f"{name}: torch.nn.MultiheadAttention reads this weight without calling its layer, so it cannot be "
                        "trained sparsely; target the attention's in_proj_weight by target_parameters instead"
                    )
    return [place for key, place in places.items() if key in chosen]


def _parameter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def _match_all(field_name: str, wanted: Sequence[str], names: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for pattern_ in wanted:
        found = {name for name in names if _is_suffix(pattern_, name)}
        if not found:
            raise ValueError(f"{field_name}: {pattern_!r} matches nothing in this model; {closest(pattern_, names)}")
        chosen |= found
    return chosen


def _is_suffix(wanted: str, name: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _module_hint(model: nn.Module, wanted: Any) -> str:
    linear = _linear_names(model)
    if linear and wanted != "all-linear":
        return f'{closest(str(wanted), linear)}, or "all-linear"'
    weighted = [name for name, module in model.named_modules() if name and isinstance(module._parameters.get("weight"), Tensor)]
    names = f"modules with a weight ({', '.join(weighted[:5])}) in target_modules, or " if weighted else ""
    return f"it has no linear layer{' but its output head' if linear else ''}; name {names}parameters in target_parameters"


def closest(wanted: str, names: Sequence[str]) -> str:
    last = (name.rpartition(".")[2] for name in names)
    known = dict.fromkeys([*(part for part in last if not part.isdigit()), *names])
    near = difflib.get_close_matches(wanted, known, n=5, cutoff=0.0)
    return f"the closest names are {', '.join(near)}" if near else "it has none of that kind"
