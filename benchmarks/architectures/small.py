"""Every architecture of transformers, small: its classes, and a model made of its configuration with the sizes cut down."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from architectures.shrink import partial_config, small_config

LARGEST = 16_000_000  # parameters: a model is held in several copies


def configurations() -> Iterator[tuple[str, type]]:
    """Every architecture by name, with the class of its configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return ((name, CONFIG_MAPPING[name]) for name in sorted(CONFIG_MAPPING.keys()))


def classes(name: str) -> list[str]:
    """The names of the models that the auto classes have of an architecture."""
    from transformers.models.auto import modeling_auto

    found: dict[str, None] = {}
    for mapping in sorted(vars(modeling_auto)):
        if re.fullmatch(r"MODEL_(FOR_\w+_)?MAPPING_NAMES", mapping):
            value = getattr(modeling_auto, mapping).get(name, ())
            found |= dict.fromkeys((value,) if isinstance(value, str) else value)
    return list(found)


def largest_first(names: list[str], config_class: type) -> list[str]:
    """Models of an architecture, those with most parameters first: the whole of a model before its parts."""
    import transformers

    def count(name: str) -> tuple[bool, int]:
        try:
            cls = getattr(transformers, name)
            return hasattr(cls, "get_image_features"), parameter_count(cls, small_config(config_class))
        except Exception:  # of any kind: it is tried again, and said, when the model is built
            return False, 0

    return sorted(names, key=count, reverse=True)


def build(config_class: type, class_name: str) -> Callable[[], nn.Module]:
    """What makes a small model of random weights, the same every time, in eval mode.

    Raises:
        ValueError: It cannot be built; the message has what each attempt said.
    """
    import transformers

    cls, reasons = getattr(transformers, class_name), []
    for shrink in (small_config, partial_config, config_class):
        try:
            config = shrink(config_class) if shrink is not config_class else config_class()
            count = parameter_count(cls, config)
            if count > LARGEST:
                raise ValueError(f"{count / 1e6:.0f} million parameters")
            return copies(made(cls, config), lambda config=config: made(cls, config))
        except Exception as error:  # of any kind: it is what this attempt said
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
    raise ValueError(" | ".join(dict.fromkeys(reasons)))


def made(cls: type, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return alive(cls(copy.deepcopy(config)).float().eval())


def copies(model: nn.Module, again: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Copies of a model; where it cannot be copied, it is made again."""
    try:
        copy.deepcopy(model)
    except Exception:  # of any kind: tensors that are results cannot be copied, for one
        return again
    return lambda: copy.deepcopy(model)


def alive(model: nn.Module) -> nn.Module:
    """The model with noise on every weight, so that gates which start at zero let gradients pass."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return model


def parameter_count(cls: type, config: Any) -> int:
    """How many parameters a model of a configuration has, found without making them."""
    with torch.device("meta"), contextlib.suppress(NotImplementedError, RuntimeError):
        return sum(p.numel() for p in cls(config).parameters())
    return 0


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300]
