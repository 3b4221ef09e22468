"""How an adapter lies in its files: PEFT's names of tensors and of the fields beside them, and those of sprand 0.1.0."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from torch import Tensor

from ..files.forms import OBJECT, SHAPE, TEXT, WHOLE, optional, record, simple, table_of
from ..kernels.dtypes import dtype_name
from ..layers.sites import joined
from ..selection.config import AS_GIVEN, GIVEN, SparseConfig
from ..selection.mask import check_selection
from ..selection.pattern import PATTERN_VERSION
from ..version import __version__
from .fingerprint import DTYPES

PEFT_TYPE, PREFIX = "SPRAND", "base_model.model."
FORMAT_VERSION, OWN_NAMES = 3, 2  # up to 2 sprand.save had names of its own
VERSIONS = {"format_version": FORMAT_VERSION, "pattern_version": PATTERN_VERSION, "sprand_version": __version__}
FIRST_VERSIONS = {"format_version": OWN_NAMES, "pattern_version": 1, "sprand_version": "0.1.0"}  # of PEFT's door at first
SEALED = "sealed"  # of the versions: whether the header of the file must hold the description as well
KINDS = ("delta", "indices", "frozen_indices", "frozen_values")
SHARED = (
    "density", "budget", "target_modules", "exclude_modules", "modules_to_save", "target_parameters", "strategy", "layout",
    "seed",
)  # fmt: skip

check_versions = record({"format_version": WHOLE, "pattern_version": WHOLE, "sprand_version": TEXT})
_FLAG = simple("true or false", lambda value: isinstance(value, bool))
_DTYPE = simple(f"one of {', '.join(DTYPES)}", lambda value: isinstance(value, str) and value in DTYPES)
_HASHES = table_of(TEXT)
_FROZEN = record({"nnz": WHOLE, "fingerprint": _HASHES})
_TARGET = record({"shape": SHAPE, "nnz": WHOLE, "fingerprint": _HASHES}, {"dtype": _DTYPE, "quantized": TEXT, "frozen": _FROZEN})


def check_target(place: str, value: Any) -> None:
    """The form of what an adapter says of one parameter: only a quantized base has no fingerprint."""
    _TARGET(place, value)
    parts = [value, value["frozen"]] if "frozen" in value else [value]
    if "quantized" not in value and not all(part["fingerprint"] for part in parts):
        raise ValueError(f"{place}.fingerprint: expected hashes by dtype, got none")


check_description = record(
    {
        "base_model": optional(TEXT),
        "config": OBJECT,
        "targets": table_of(check_target),
        "saved": table_of(record({"shape": SHAPE, "dtype": TEXT})),
        "sprand_version": TEXT,
    },
    {"selection": optional(check_selection), "copied_heads": _FLAG},
)
_check_settings = record(
    {"targets": table_of(check_target), "indices_saved": _FLAG},
    {
        "base_model_name_or_path": optional(TEXT),
        "selection": optional(check_selection),
        "sparse_config": optional(OBJECT),
        "versions": optional(check_versions),
    },
)


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


def head_key(name: str) -> str:
    """The name in the file of a parameter that was trained in full."""
    return PREFIX + name


def renamed(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of sprand 0.1.0 under the names of today."""
    names = {f"{kind}.{name}": key(kind, name) for name in description["targets"] for kind in KINDS}
    names |= {f"saved.{name}": head_key(name) for name in description["saved"]}
    return {names.get(name, name): value for name, value in tensors.items()}


def settings_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration by which PEFT loads an adapter: the fields of `SprandConfig` that say something.

    What PEFT reads otherwise than `SparseConfig` does (modules are named in full, the strategy is the one that a mask came
    from) or not at all is kept in `sparse_config`.
    """
    config, targets = description["config"], description["targets"]
    given, selection = config["strategy"] == GIVEN, description.get("selection")
    weights = [name for name in targets if name.endswith(".weight")]
    shared = {name: config[name] for name in SHARED} | {
        "strategy": (selection or {}).get("strategy", GIVEN) if given else config["strategy"],
        "target_modules": sorted(name.removesuffix(".weight") for name in weights),
        "target_parameters": sorted(targets.keys() - set(weights)) or None,
        "modules_to_save": modules_of(description["saved"]) or None,
    }
    defaults = SparseConfig().to_dict() | shared
    return {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": description["base_model"],
        "inference_mode": True,
        **shared,
        "indices_saved": given,
        "selection": selection,
        "sparse_config": {name: value for name, value in config.items() if value != defaults[name]},
        "versions": {name: description[name] for name in VERSIONS} | {SEALED: True},
        "targets": targets,
    }


def described_by(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What PEFT's configuration says of an adapter, as `sprand.save` describes one.

    Args:
        settings: the content of `adapter_config.json`.
        tensors: those of the file beside it.

    Raises:
        ValueError: The configuration is damaged, or the tensors are not those of its adapter.
    """
    _check_settings("its configuration", settings)
    if (settings.get("versions") or {}).get(SEALED):
        raise ValueError("the header of its file has lost the description that sprand.save wrote there")
    given, own = settings["indices_saved"], settings.get("sparse_config")
    config = SparseConfig().to_dict() | {name: settings[name] for name in SHARED if name in settings}
    config |= own if own is not None else AS_GIVEN if given else {}
    selection = settings.get("selection")
    if selection is None and config["strategy"] == GIVEN and settings.get("strategy", GIVEN) != GIVEN:
        selection = {"strategy": settings["strategy"]}
    return {
        **(settings.get("versions") or FIRST_VERSIONS),
        "base_model": settings.get("base_model_name_or_path"),
        "config": config,
        "selection": selection,
        "targets": settings["targets"],
        "saved": heads_of(_heads(settings["targets"], tensors)),
        "copied_heads": own is None,
    }


def heads_of(heads: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What an adapter says of the parameters that it trained in full."""
    return {name: {"shape": list(value.shape), "dtype": dtype_name(value.dtype)} for name, value in heads.items()}


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


def _heads(targets: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that belong to no target: parameters that PEFT trained in full. A wrapped layer's base is none."""
    own = {key(kind, name) for name in targets for kind in KINDS}
    heads = {}
    for name in tensors.keys() - own:
        if ".base_layer." in name:
            continue
        if not name.startswith(PREFIX) or ".sprand_" in name:
            raise ValueError(f"its tensor {name!r} is of no parameter that its configuration names")
        heads[name.removeprefix(PREFIX)] = tensors[name]
    return dict(sorted(heads.items()))
