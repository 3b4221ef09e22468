"""How an adapter lies in its files: PEFT's names of tensors and of the fields beside them, and those of sprand 0.1.0."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from ..files.forms import OBJECT, TEXT, WHOLE, list_of, optional, record, simple
from ..layers.sites import joined
from ..selection.config import AS_GIVEN, GIVEN, SparseConfig
from ..selection.mask import check_selection
from ..selection.old_runs import are_runs, draw_runs
from ..selection.pattern import PATTERN_VERSION, RANDOM_STRATEGIES
from ..version import __version__
from .architecture import check_architecture
from .fingerprint import check_targets, in_full, line_of

PEFT_TYPE, PREFIX = "SPRAND", "base_model.model."
FORMAT_VERSION, WITHOUT_COLUMNS = 5, 4  # of whole columns, and of entries alone, which older readers know
OWN_NAMES = 2  # up to 3 the header had fields of its own, up to 2 the tensors had names of their own
VERSIONS = {"format_version": FORMAT_VERSION, "pattern_version": PATTERN_VERSION, "sprand_version": __version__}
FIRST_VERSIONS = {"format_version": OWN_NAMES, "pattern_version": 1, "sprand_version": "0.1.0"}  # of PEFT's door at first
SEALED = "sealed"  # of the versions: whether the header of the file must hold the description as well
DRAW = "sprand_draw"  # the tensor that says how entries were drawn, to those who are given tensors alone
UNITS = ("rows", "columns")  # by the axis that counts them, `[c]`, in place of indices
KINDS = ("delta", "indices", *UNITS, "frozen_indices", "frozen_values")
IN_WRAPPERS = (".base_layer.", ".original_module.", ".modules_to_save.")
SHARED = ("density", "budget", "exclude_modules", "modules_to_save", "strategy", "layout", "seed")  # with SprandConfig
UNSAID = AS_GIVEN | dict.fromkeys(("exclude_modules", "modules_to_save"))  # what a field says that is left out

check_versions = record({"format_version": WHOLE, "pattern_version": WHOLE, "sprand_version": TEXT})
_FLAG = simple("true or false", lambda value: isinstance(value, bool))
_check_config = record(
    {"base_model": optional(TEXT), "config": OBJECT},
    {"selection": optional(check_selection), "architecture": optional(check_architecture)},
)
_check_settings = record({"indices_saved": _FLAG}, {"sparse_config": optional(OBJECT)})


def written_versions(targets: Mapping[str, Any]) -> dict[str, Any]:
    """The versions that an adapter of these targets is written with: the oldest format that holds it."""
    columns = any("axis" in target for target in targets.values())
    return VERSIONS | {"format_version": FORMAT_VERSION if columns else WITHOUT_COLUMNS}


def versions_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The versions in a configuration that PEFT wrote.

    Raises:
        ValueError: The versions are damaged, or sprand.save wrote the configuration.
    """
    versions = settings.get("versions") or FIRST_VERSIONS
    check_versions("its versions", versions)
    if versions.get(SEALED):
        raise ValueError("the header of its file has lost the description that sprand.save wrote there")
    return {name: versions[name] for name in VERSIONS}


def refuse_newer(what: str | Path, versions: Mapping[str, Any]) -> None:
    """Prove that an adapter has a format, and was drawn by a draw, that this sprand knows.

    Raises:
        ValueError: The adapter was written by another sprand.
    """
    if versions["format_version"] > FORMAT_VERSION or versions["pattern_version"] != PATTERN_VERSION:
        raise ValueError(
            f"{what} has format {versions['format_version']} and pattern {versions['pattern_version']} (of sprand "
            f"{versions['sprand_version']}); this sprand {__version__} reads format {FORMAT_VERSION} and pattern "
            f"{PATTERN_VERSION}"
        )


def key(kind: str, name: str) -> str:
    """The name of a tensor in the file.

    Args:
        kind: one of `KINDS`.
        name: of the parameter in the model.
    """
    module, _, parameter = name.rpartition(".")
    suffix = "" if parameter == "weight" else f"_{parameter}"
    end = ".weight" if kind == "delta" else ""
    return PREFIX + joined(module, f"sprand_{kind}{suffix}{end}")


def draw_of(strategy: str, layout: str, seed: int) -> Tensor:
    """What a file says of the draw of its entries, as the bytes of a text."""
    text = f"{strategy}, {layout}, seed {seed}, pattern {PATTERN_VERSION}"
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def said_of_draw(tensor: Tensor) -> str:
    """The text of `draw_of`."""
    return bytes(tensor.to(torch.uint8).flatten().tolist()).decode(errors="replace")


def head_key(name: str) -> str:
    """The name in the file of a parameter that was trained in full."""
    return PREFIX + name


def settings_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """What the files say of an adapter: the fields of `SprandConfig` by which PEFT loads it, without the versions.

    What PEFT reads otherwise than `SparseConfig` does (modules are named in full, the strategy is the one that a mask came
    from) or not at all is kept in `sparse_config`.
    """
    config, selection = description["config"], description.get("selection")
    given = config["strategy"] == GIVEN
    settings = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": description["base_model"],
        "inference_mode": True,
        **{name: config[name] for name in SHARED},
        "strategy": (selection or {}).get("strategy", GIVEN) if given else config["strategy"],
        "modules_to_save": modules_of(description["saved"]) or None,
        "untrained": description.get("untrained") or None,
        "indices_saved": given,
        "selection": selection,
        "architecture": description.get("architecture"),
        "targets": description["targets"],
    }
    read = _config_of(settings)
    return in_short(settings | {"sparse_config": {name: value for name, value in config.items() if value != read[name]}})


def in_short(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration with a text for each target, and without what says nothing or follows from the targets."""
    targets = settings["targets"]
    left_out = ("target_modules", "target_parameters", "targets")
    said = {name: value for name, value in settings.items() if value is not None and name not in left_out}
    return said | {"targets": {name: line_of(target) for name, target in targets.items()}}


def targeted(targets: Iterable[str]) -> dict[str, list[str] | None]:
    """What PEFT calls parameters that are targeted: modules for their weights, and all others by their names."""
    names = sorted(targets)
    weights = [name for name in names if name.endswith(".weight")]
    others = [name for name in names if not name.endswith(".weight")]
    return {"target_modules": [name.removesuffix(".weight") for name in weights], "target_parameters": others or None}


def opened(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of an adapter and its tensors, in the form and under the names of today.

    Args:
        said: what its file says, or the configuration beside one that PEFT wrote, with versions and checksum.
        tensors: those of the file.

    Raises:
        ValueError: What it says is damaged, or the tensors are not those of its adapter.
    """
    targets, names = in_full(said.get("targets")), {}
    check_targets("its targets", targets)
    if "peft_type" in said:
        config = _described_by({**said, "targets": targets})
    else:  # sprand.save, up to format 3
        config = {name: said.get(name) for name in ("base_model", "config", "selection")}
        if said["format_version"] <= OWN_NAMES:
            names = {f"{kind}.{name}": key(kind, name) for name in targets for kind in KINDS}
            names |= {name: head_key(name[6:]) for name in tensors if name.startswith("saved.")}
    _check_config("its description", config)
    _check_draw(config["config"], tensors.get(PREFIX + DRAW))
    optional(list_of(TEXT))("its untrained", said.get("untrained"))
    tensors = {names.get(name, name): value for name, value in tensors.items() if name != PREFIX + DRAW}
    if _drawn_in_runs(config["config"]):
        tensors |= _indices_of_runs(config["config"], targets, tensors)
        config |= {"config": config["config"] | AS_GIVEN, "selection": selection_of_runs(config["config"])}
    versions = {name: said[name] for name in (*VERSIONS, "checksum")}
    untrained = said.get("untrained") or []
    heads = [name for name in _heads(targets, tensors) if name not in untrained]
    return {**versions, **config, "targets": targets, "saved": heads, "untrained": untrained}, tensors


def _check_draw(config: Mapping[str, Any], draw: Tensor | None) -> None:
    """Prove that a description is that of the tensors, where they say by which draw their entries were chosen."""
    if draw is None or config.get("strategy") == GIVEN:
        return
    said = said_of_draw(draw_of(*(config.get(name) for name in ("strategy", "layout", "seed"))))
    if said_of_draw(draw) != said:
        raise ValueError(f"its tensors are of the draw {said_of_draw(draw)}, and it says {said}")


def _drawn_in_runs(config: Mapping[str, Any]) -> bool:
    return are_runs(config.get("layout")) and config.get("strategy") in RANDOM_STRATEGIES


def _indices_of_runs(config: Mapping[str, Any], targets: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The indices of entries that were drawn in runs, by their names in a file that holds them."""
    seed = SparseConfig.from_dict({**config, "layout": "unstructured"}).seed
    indices = {}
    for name, target in targets.items():
        delta = tensors.get(key("delta", name))
        if delta is None or list(delta.shape) != [target["nnz"]]:
            raise ValueError(f"expected {target['nnz']} values for {name}, got {None if delta is None else list(delta.shape)}")
        drawn = draw_runs(config["strategy"], name, target["shape"], target["nnz"], seed, config["layout"])
        indices[key("indices", name)] = drawn
    return indices


def selection_of_runs(config: Mapping[str, Any]) -> dict[str, Any]:
    """How entries were chosen that were drawn in runs, as the record of a given mask."""
    return {name: config[name] for name in ("strategy", "density", "budget", "layout", "seed") if config.get(name) is not None}


def _described_by(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the entries of an adapter were chosen, by the fields of `SprandConfig`."""
    _check_settings("its configuration", settings)
    given, own = settings["indices_saved"], settings.get("sparse_config")
    config = _config_of(settings) | (own if own is not None else AS_GIVEN if given else {})
    selection = settings.get("selection")
    if selection is None and config["strategy"] == GIVEN and settings.get("strategy", GIVEN) != GIVEN:
        selection = {"strategy": settings["strategy"]}
    return {
        "base_model": settings.get("base_model_name_or_path"),
        "config": config,
        "selection": selection,
        "architecture": settings.get("architecture"),
        "copied_heads": own is None,
    }


def _config_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `SparseConfig` that PEFT has, too."""
    return UNSAID | targeted(settings["targets"]) | {name: settings[name] for name in SHARED if name in settings}


def modules_of(parameters: Iterable[str]) -> list[str]:
    """The modules of parameters by name, without those inside of another."""
    modules = sorted({name.rpartition(".")[0] for name in parameters} - {""})
    return [name for name in modules if not any(name.startswith(f"{other}.") for other in modules)]


def portable(name: str | None) -> str | None:
    """What a base is called in a file: a folder by the last part of its path, a name on the Hub as it is."""
    if not name:
        return None
    is_path = os.path.isabs(name) or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1
    if not is_path and not os.path.isdir(name):
        return name
    path = os.path.abspath(os.path.expanduser(name))
    return PureWindowsPath(path).name or None  # which takes both kinds of slashes


def _heads(targets: Iterable[str], tensors: Iterable[str]) -> list[str]:
    """The tensors that belong to no target: parameters that were trained in full.

    What is in a wrapper of PEFT is none: it writes embeddings as they are there a second time (`save_embedding_layers`).
    """
    own = {key(kind, name) for name in targets for kind in KINDS}
    others = sorted(name for name in tensors if name not in own and not any(part in name for part in IN_WRAPPERS))
    for name in others:
        if not name.startswith(PREFIX) or ".sprand_" in name:
            raise ValueError(f"its tensor {name!r} is of no parameter that it names")
    return [name.removeprefix(PREFIX) for name in others]
