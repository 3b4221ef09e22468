"""Sharded models (FSDP2, ZeRO-3, tensor parallel): how to tell them, and how entries reach a weight of which a rank holds a part.

A weight of FSDP2 is whole while a layer computes, and is patched there as any other; between uses a rank holds rows of it.
Deltas are sharded as any parameter, indices and base are whole on every rank. Nothing here is imported unless a model is
sharded: a tensor of FSDP2 or of tensor parallelism is known by its device mesh, one of ZeRO-3 by what DeepSpeed adds to it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import ops

KINDS = {
    "fsdp2": "fully_shard (FSDP2)", "fsdp1": "FullyShardedDataParallel (FSDP1)", "zero3": "DeepSpeed ZeRO-3",
    "dtensor": "tensor parallelism (DTensor)",
}  # fmt: skip


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a `torch.distributed.tensor.DTensor`."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "device_mesh")


def is_partition(tensor: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter in parts now, so that `tensor` itself is empty."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part only."""
    return is_dtensor(tensor) or is_partition(tensor) or is_of_fsdp1(tensor)


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module itself."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def is_gathered(module: nn.Module) -> bool:
    """Whether `fully_shard`, called on this module or on one around it, gathers its parameters anew for backward."""
    return module.__dict__.get("_is_fsdp_managed_module", False)


def is_of_zero3(parameter: Tensor) -> bool:
    """Whether ZeRO-3 gathers this parameter for each use, and anew for backward."""
    return hasattr(parameter, "ds_id")


def is_of_fsdp1(parameter: Tensor) -> bool:
    """Whether FSDP1 took this parameter into a flat one, so that between uses it is a part of itself."""
    return getattr(parameter, "_fsdp_flattened", False)


def kind_of(model: nn.Module) -> str | None:
    """A key of `KINDS` for a model whose parameters are sharded, also while some of them are gathered; None for others."""
    parameters = list(model.parameters())
    if any(map(is_fsdp, model.modules())):
        return "fsdp2"
    if any(map(is_of_fsdp1, parameters)):
        return "fsdp1"
    if any(map(is_of_zero3, parameters)):
        return "zero3"
    return "dtensor" if any(map(is_dtensor, parameters)) else None


def refuse_wrapper(model: nn.Module, what: str) -> None:
    """Refuse a wrapper that gives every parameter another name, and may know only those that trained when it was made.

    Raises:
        ValueError: This is `DistributedDataParallel` or `DataParallel`, not the model in it.
    """
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"{what}: expected the model itself, got its {type(model).__name__} wrapper; give {what} the model, and wrap it "
            "afterwards"
        )


def refuse(model: nn.Module, what: str, instead: str) -> None:
    """Refuse a sharded model.

    Raises:
        ValueError: The model is sharded, or a wrapper; the message says what to do instead.
    """
    refuse_wrapper(model, what)
    kind = kind_of(model)
    if kind is not None:
        raise ValueError(f"{what}: expected a model whose parameters are whole, got one sharded by {KINDS[kind]}; {instead}")


def refuse_fsdp1(model: nn.Module, what: str) -> None:
    """Refuse a model of FSDP1, which may keep a weight as the last forward left it.

    Raises:
        ValueError: The model is one.
    """
    if kind_of(model) == "fsdp1":
        raise ValueError(f"{what}: {KINDS['fsdp1']} cannot do this; shard the model by fully_shard (FSDP2) instead")


@contextlib.contextmanager
def gathered(model: nn.Module, what: str) -> Iterator[None]:
    """The parameters of an FSDP1 model whole, inside of a `with` block that every rank enters; others stay as they are.

    Raises:
        ValueError: This is the model inside of the wrapper, which cannot be gathered by itself.
    """
    if kind_of(model) != "fsdp1":
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not isinstance(model, FullyShardedDataParallel):
        raise ValueError(f"{what}: expected the FullyShardedDataParallel wrapper itself (FSDP1), got the model in it")
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        yield


def refuse_parts(model: nn.Module) -> None:
    """Refuse a model in which no positions can be drawn, since its weights are not whole; the caller may gather those of ZeRO-3.

    Raises:
        ValueError: The model is sharded.
    """
    if kind_of(model) != "zero3":
        refuse(model, "apply", "apply first, then call fully_shard (tensor parallelism is not supported)")
    elif any(map(is_partition, model.parameters())):
        raise ValueError(
            "apply: expected whole parameters, got some that ZeRO-3 holds in parts; call it inside of "
            "`with deepspeed.zero.GatheredParameters(list(model.parameters()))`, or before the model is sharded"
        )


def reshard(model: nn.Module) -> None:
    """Let every parameter of an FSDP2 model be its shard, in its own dtype, also where a forward left it gathered."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()


@contextlib.contextmanager
def first_rank(model: nn.Module) -> Iterator[bool]:
    """Whether this process is to write a file; of a sharded model only the first does, and the others wait for it.

    Raises:
        RuntimeError: The first rank failed; raised on the ranks that wait for it.
    """
    if kind_of(model) is None:
        yield True
        return
    done = [False]
    try:
        yield torch.distributed.get_rank() == 0
        done = [True]
    finally:
        torch.distributed.broadcast_object_list(done, src=0)
    if not done[0]:
        raise RuntimeError("the first rank could not write; its own error says why")


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return torch.Size(parameter.ds_shape) if is_partition(parameter) else parameter.shape


def whole(parameter: Tensor) -> Tensor:
    """The whole parameter, detached; for a sharded one every rank must call this.

    Returns:
        The tensor itself where it is whole, a new one elsewhere.
    """
    if is_partition(parameter):
        parameter.all_gather()  # DeepSpeed's own methods, which it adds to each parameter
        result = parameter.detach().clone()
        parameter.partition()
        return result
    return parameter.detach().full_tensor() if is_dtensor(parameter) else parameter.detach()


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """The shard of a whole tensor that belongs to this rank, placed as `like`, a DTensor; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    value = value.to(device=like.to_local().device, dtype=like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def put(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Give a parameter other memory (a DTensor: other values), and return what it had.

    Args:
        parameter: any; not one that ZeRO-3 holds in parts.
        value: of its shape, whole; or what `put` returned.
    """
    if is_dtensor(parameter):
        before = parameter.data.clone()
        parameter.data.copy_(value if is_dtensor(value) else part_of(value, parameter))
        return before
    before = parameter.data
    parameter.data = value.data.to(device=parameter.device, dtype=parameter.dtype)
    return before


def patch_(weight: Tensor, indices: Tensor, base: Tensor, delta: Tensor | None, scale: float = 1.0) -> None:
    """`ops.patch_` of a weight that may be a DTensor: each rank writes the entries that it holds.

    Args:
        weight: contiguous, any shape; changed in place.
        indices: `[nnz]`, flat positions in the whole weight, sorted.
        base: `[nnz]`, dtype of `weight`.
        delta: `[nnz]`, or None: base is put back.
        scale: factor on `delta`.

    Raises:
        ValueError: The weight is sharded along more than one dimension.
    """
    if not is_dtensor(weight):
        ops.patch_(weight.data, indices, base, delta, scale)
        return
    part = _slice_of(weight)
    if part is not None:
        indices, here = part.positions(indices)
        base, delta = base[here], None if delta is None else delta[here]
    ops.patch_(weight.detach().to_local(), indices, base, delta, scale)


@dataclass(frozen=True)
class _Slice:
    """The part of a weight that a rank holds: consecutive rows along one dimension.

    Attributes:
        first: the first of these rows.
        rows: how many there are.
        all_rows: how many the whole weight has.
        row_numel: entries between a row and the next one: the product of the sizes of the dimensions after.
    """

    first: int
    rows: int
    all_rows: int
    row_numel: int

    def positions(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Flat positions in the slice, of those entries of the whole weight that lie in it; and which entries these are."""
        row = indices // self.row_numel % self.all_rows - self.first
        is_here = (row >= 0) & (row < self.rows)
        here = is_here.nonzero().flatten()
        indices = indices[here]
        block = indices // (self.all_rows * self.row_numel)
        offset = indices % self.row_numel
        return (block * self.rows + row[here]) * self.row_numel + offset, here


def _slice_of(weight: Tensor) -> _Slice | None:
    """The part of a DTensor that this rank holds; None where it holds the whole."""
    sharded = [axis for axis, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if not sharded:
        return None
    axis = sharded[0]
    placement, ranks = weight.placements[axis], weight.device_mesh.size(axis)
    if len(sharded) > 1 or not placement.is_shard():
        raise ValueError(
            f"expected a weight sharded along at most one dimension, got {weight.placements} for {list(weight.shape)}"
        )
    all_rows = weight.shape[placement.dim]
    first = weight.device_mesh.get_local_rank(axis) * math.ceil(all_rows / ranks)
    row_numel = math.prod(weight.shape[placement.dim + 1 :])
    return _Slice(first, weight.to_local().shape[placement.dim], all_rows, row_numel)
