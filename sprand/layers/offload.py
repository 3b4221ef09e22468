"""Weights that accelerate keeps in host memory or on disk, and brings for one forward: they compute, and they do not train."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from .sites import Site, named_modules

INSTEAD = (
    "merge the adapter into the files of the checkpoint (sprand merge BASE ADAPTER OUT) and load that, or load the model without "
    "offload"
)


def is_offloaded(module: nn.Module) -> bool:
    """Whether this module's own parameters are on the meta device between forwards."""
    hook = module.__dict__.get("_hf_hook")
    return hook is not None and any(getattr(part, "offload", False) is True for part in (hook, *getattr(hook, "hooks", ())))


def check_at_hand(site: Site) -> None:
    """Prove that the weight of a site is where its entries can train.

    Raises:
        ValueError: A module that holds it is offloaded.
    """
    if any(is_offloaded(module) for module, _ in site.owners):
        raise ValueError(
            f"{site.name}: accelerate has offloaded this weight (device_map, cpu_offload, disk_offload), and its entries "
            f"cannot train; leave it out (exclude_modules), or load the model without offload. For inference {INSTEAD}"
        )


def refuse(model: nn.Module, what: str) -> None:
    """Refuse a model whose trained entries are offloaded.

    Raises:
        ValueError: It is one.
    """
    for name, module in named_modules(model):
        if hasattr(type(module), "sparse_sites") and is_offloaded(module):
            raise ValueError(
                f"{what}: accelerate has offloaded the trained entries of {name} (device_map, cpu_offload, disk_offload); call "
                f"{what} before the model is offloaded. For inference {INSTEAD}"
            )


def refuse_gradient(delta: Tensor) -> None:
    """Let a backward that comes to an offloaded delta, which is there for one forward, end in words."""
    if delta.requires_grad and not delta._backward_hooks:
        delta.register_hook(_refuse)


def _refuse(grad: Any) -> NoReturn:
    raise ValueError(
        "backward: accelerate has offloaded the entries that train here (device_map, cpu_offload, disk_offload), and their "
        "gradient would be lost; load the model without offload to train it"
    )
