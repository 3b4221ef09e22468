"""What an adapter says of a model of transformers: its classes, which decide its names in files, and what its head means."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..files.forms import TEXT, WHOLE, list_of, optional, record, table_of
from ..layers.sites import joined, plain_name

OF_HEAD = {
    "architectures": list_of(TEXT),
    "id2label": table_of(TEXT),
    "label2id": table_of(WHOLE),
    "problem_type": optional(TEXT),
    "pad_token_id": optional(WHOLE),
}  # of config.json
check_architecture = record({"classes": table_of(TEXT)}, {"config": record(OF_HEAD)})


def architecture_of(model: nn.Module, with_head: bool) -> dict[str, Any] | None:
    """The classes of transformers that a model is made of, and what its configuration says of a head.

    Args:
        model: the model; one of transformers, or one that holds such.
        with_head: whether a head of it is trained in full.

    Returns:
        None where no part of the model is of transformers. Else `classes`, by the names of the parts (the model itself is `""`),
        and of a model with a head and a configuration of transformers `config`, the fields that `config.json` has to have for
        it; a class that is not of transformers stands there under its own name.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    classes = {} if modeling is None else dict(_classes("", model, modeling.PreTrainedModel))
    if not classes:
        return None
    config = getattr(model, "config", None)
    if not with_head or not isinstance(config, modeling.PreTrainedConfig):
        return {"classes": classes}
    said = {name: getattr(config, name, None) for name in OF_HEAD} | {"architectures": [classes.get("", type(model).__name__)]}
    return {"classes": classes, "config": of_head(said)}


def of_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of a head, all of it: as `config.json` has it, and with what it leaves out by default."""
    labels = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
    return {
        "architectures": config.get("architectures") or [],
        "id2label": {str(number): str(label) for number, label in labels.items()},
        "label2id": dict(config.get("label2id") or {str(label): int(number) for number, label in labels.items()}),
        "problem_type": config.get("problem_type"),
        "pad_token_id": config.get("pad_token_id"),
    }


def _classes(name: str, module: nn.Module, kind: type) -> Iterator[tuple[str, str]]:
    """The outermost parts of a module that are models of transformers' own classes."""
    if isinstance(module, kind):
        own = (cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models."))
        yield from ((name, cls) for cls in list(own)[:1])
        return
    for child, inner in module.named_children():
        yield from _classes(plain_name(joined(name, child)), inner, kind)
