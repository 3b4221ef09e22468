"""What training changes in full: parameters that train whole, and buffers such as a batch norm's statistics; with their base."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..layers import sharding
from ..layers.sites import named_parameters, sites_of
from .state import Adapter, State, whole_tensors

optimizers: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()  # that have made a step
PACKED = 2**16  # a buffer of more integers than this is a packed weight, which no training changes


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that training may change: those that a model saves, each once, but no packed weights and nothing of sprand."""
    parameters = {id(p) for p in model.parameters()}
    buffers: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in whole_tensors(model).items():
        packed = not tensor.is_floating_point() and tensor.numel() > PACKED
        if id(tensor) not in parameters and "sprand_" not in name and not packed and not tensor.is_meta:
            buffers.setdefault(id(tensor), (name, tensor))
    return dict(buffers.values())


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors by name, in memory of their own."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def put_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write values into buffers, and return copies of what they held. One that is not in the model any more is left out."""
    tensors = whole_tensors(model) if values else {}
    there = {name: tensors[name] for name in values if name in tensors}
    before = copies(there)
    for name, buffer in there.items():
        if buffer.shape == values[name].shape and buffer.is_contiguous():
            buffer.data.copy_(values[name])
        else:
            buffer.data = values[name].to(buffer, copy=True)
    return before


def take_base(model: nn.Module, state: State, given: Mapping[str, Tensor]) -> None:
    """Let the buffers and heads of a plain state that is about to be loaded be those to come back to: it is a new base."""
    heads = {name: p for name, p in named_parameters(model) if name in state.base_saved}
    for base, tensors in ((state.base_buffers, buffers_of(model)), (state.base_saved, heads)):
        for name, tensor in tensors.items():
            if name in given and given[name].shape == tensor.shape and not sharding.is_sharded(tensor):
                base[name] = given[name].detach().to(tensor, copy=True)


def collect_buffers(model: nn.Module, state: State) -> None:
    """Let the active adapter know the buffers as its training has left them."""
    if state.current is not None and state.base_buffers:
        state.current.buffers = copies(buffers_of(model))


def changed(values: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the values that are not, bit for bit, what the base has."""
    return {name: value for name, value in values.items() if name not in base or not _same_bits(value, base[name])}


def unfrozen(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that train beside the entries, and do not belong to the adapter: someone called `requires_grad_`."""
    sites = sites_of(model)
    known = {id(site.weight) for site in sites} | {id(delta) for site in sites for delta in site.deltas}
    known |= {id(p) for name, p in named_parameters(model, remove_duplicate=False) if name in adapter.saved}
    for name, p in named_parameters(model):
        if p.requires_grad and id(p) not in known:
            yield name, p


def take_unfrozen(model: nn.Module, state: State) -> None:
    """Let parameters that were unfrozen by hand belong to the active adapter; what they hold now is their base."""
    follow_rows(model, state)
    adapter = state.current
    if adapter is None or state.mixed is not None:
        return
    for name, p in list(unfrozen(model, adapter)):
        if p.is_meta or sharding.is_partition(p):
            continue
        state.base_saved.setdefault(name, p.data.clone())
        adapter.saved[name] = p.data


def follow_rows(model: nn.Module, state: State) -> None:
    """Where parameters that train in full have more or fewer rows than before, let their base and all adapters have them, too."""
    for name, p in named_parameters(model) if state.base_saved else ():
        base = state.base_saved.get(name)
        if base is None or base.shape == p.shape or base.shape[1:] != p.shape[1:] or sharding.is_sharded(p):
            continue
        state.base_saved[name] = with_rows(base, p.data)
        fit_moments(p, base.shape)
        for adapter in state.adapters.values():
            if name in adapter.saved:
                adapter.saved[name] = with_rows(adapter.saved[name], p.data)


def fit_moments(parameter: nn.Parameter, before: torch.Size) -> None:
    """Let what optimizers keep of a parameter, which was of the shape `before`, have its rows, with zeros in new ones."""
    for optimizer in list(optimizers):
        kept = optimizer.state.get(parameter, {})
        for key, value in kept.items():
            if isinstance(value, Tensor) and value.dim() and value.shape == before:
                kept[key] = with_rows(value, value.new_zeros(parameter.shape))


def with_rows(values: Tensor, full: Tensor) -> Tensor:
    """`full` with the rows of `values` where it has them."""
    result, rows = full.clone(), min(len(values), len(full))
    result[:rows] = values[:rows].to(result)
    return result


def refuse_unknown(model: nn.Module, adapter: Adapter) -> None:
    """Prove that all that trains belongs to the adapter.

    Raises:
        ValueError: A parameter was unfrozen by hand, and no step of an optimizer has told what it was before.
    """
    names = [name for name, _ in unfrozen(model, adapter)]
    if names:
        raise ValueError(
            f"save: {first_of(names)} trains in full beside the adapter, and what it was before is not known, since no "
            "torch.optim optimizer has made a step from there; name its module in modules_to_save of sprand.apply, or freeze it "
            "(requires_grad_(False)) if it has not changed"
        )


def first_of(names: Sequence[str]) -> str:
    """The first name, and how many others there are, in words."""
    return f"{names[0]} (and {len(names) - 1} more)" if len(names) > 1 else names[0]


def _same_bits(value: Tensor, base: Tensor) -> bool:
    if value.shape != base.shape:
        return False
    pair = value, base.to(value.dtype)
    value, base = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in pair)
    return torch.equal(value, base)
