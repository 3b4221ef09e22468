"""The chosen entries of one weight: their tensors, how they are written into it, and when a write can be left out."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..kernels import native, ops
from ..kernels.schedule import Schedule
from ..kernels.tuning import schedule_for
from .sharding import is_dtensor
from .units import Pattern


class Candidates(Protocol):
    """Looks for entries to grow: sees the gradient of a whole weight in backward, in the form in which a layer has it."""

    def add_linear(self, grad_output: Tensor, input: Tensor) -> None:
        """The gradient is `grad_output.T @ input`: `[T, out]` and `[T, in]`."""

    def add_embedding(self, grad_output: Tensor, tokens: Tensor, vocabulary: int, padding_idx: int | None) -> None:
        """The gradient of row `v` is the sum of `grad_output[t]`, `[T, features]`, over the tokens `[T]` that are `v`."""

    def add_dense(self, grad: Tensor) -> None:
        """The gradient itself, contiguous, of the weight's shape."""


class WatchedParameter(nn.Parameter):
    """A parameter that counts how often its `data` was asked for: a change in place through that moves no version."""

    asked = 0

    @property
    def data(self) -> Tensor:
        """The values, as of any parameter."""
        self.asked += 1
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        nn.Parameter.data.__set__(self, value)

    @classmethod
    def watch(cls, parameter: nn.Parameter) -> None:
        """Let an ordinary parameter be a watched one."""
        if type(parameter) is nn.Parameter:
            parameter.__class__ = cls


class Written:
    """Remembers that a weight holds a delta, so that a write can be left out. All uses of the weight share it.

    Only `SparseAdamW` declares it, since it has just written the weight. It is true of that weight, that delta and that
    scale, while neither tensor has changed its version or its memory, and nobody has asked for the delta's `data`. A write of
    anything else ends it, and so do a forward without gradients (an evaluation always writes) and the next backward (any other
    optimizer, also one that moves no version, is followed by a write). A copy, also one that was pickled, remembers nothing.

    Attributes:
        awaited: the last function that was recorded with the weight, as long as its gradient may come.
    """

    __slots__ = ("_declared", "awaited")

    def __init__(self) -> None:
        self._declared: tuple[Any, ...] | None = None
        self.awaited: weakref.ref[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Written, ()

    @property
    def is_awaited(self) -> bool:
        """Whether the gradient of a recorded use is still to come."""
        awaited = self.awaited  # once: another thread may end it
        return awaited is not None and awaited() is not None

    def declare(self, weight: Tensor, delta: Tensor, scale: float) -> None:
        """The weight holds `base + scale * delta` now; of a delta that is not watched, nobody knows for how long."""
        if isinstance(delta, WatchedParameter):
            self._declared = weakref.ref(weight), weakref.ref(delta), _state_of(weight, delta, scale)

    def forget(self) -> None:
        """The weight may hold anything."""
        self._declared = None

    def holds(self, weight: Tensor, delta: Tensor, scale: float) -> bool:
        """Whether the weight is known to hold `base + scale * delta`."""
        declared = self._declared  # once: another thread may end it
        if declared is None:
            return False
        its_weight, its_delta, state = declared
        if its_weight() is not weight or its_delta() is not delta:
            return False
        return state == _state_of(weight, delta, scale)


def _state_of(weight: Tensor, delta: WatchedParameter, scale: float) -> tuple[Any, ...]:
    return weight.data_ptr(), weight._version, delta.data_ptr(), delta._version, delta.asked, scale


class Sealed:
    """Tells whether indices are what they were: others may change them in place, as an average over the buffers of a copy does.

    Args:
        indices: `[nnz]`, proven; on the meta device nothing is remembered.
    """

    def __init__(self, indices: Tensor | None = None) -> None:
        self._sums: list[int] | None = None  # and, first, the number of indices
        self._known: tuple[weakref.ref[Tensor], int] | None = None
        if indices is not None:
            self._remember(indices)

    def __reduce__(self) -> tuple[Any, ...]:
        return Sealed, (), {"_sums": self._sums, "_known": None}

    def holds(self, indices: Tensor) -> bool:
        """Whether these are the indices, or others on purpose; they are read where tensor or version is another one."""
        if self._sums is None or not _is_readable(indices):
            return True
        if self._known is not None and self._known[0]() is indices and self._known[1] == indices._version:
            return True
        if indices.numel() == self._sums[0] and _sums_of(indices) != self._sums:
            return False
        self._remember(indices)
        return True

    def _remember(self, indices: Tensor) -> None:
        if not _is_readable(indices) or indices.is_inference():
            self._sums = self._known = None
            return
        self._sums = _sums_of(indices)
        self._known = weakref.ref(indices), indices._version


def _is_readable(indices: Tensor) -> bool:
    return type(indices) is Tensor and not indices.is_meta


def _sums_of(indices: Tensor) -> list[int]:
    """What an average cannot leave as it is, since it rounds indices down; the number of indices first."""
    sums = torch.stack([indices.sum(dtype=torch.int64), indices[::2].sum(dtype=torch.int64)])
    return [indices.numel(), *sums.tolist()]


class Schedules:
    """How a GPU samples the gradient of a linear layer: one schedule for each dtype of operands, made when it is first used.

    Under autocast, and under the mixed precision of FSDP2, the operands' dtype is not that of the weight.
    """

    def __init__(self, indices: Tensor, out_features: int, in_features: int) -> None:
        self.indices, self.out_features, self.in_features = indices, out_features, in_features
        self._made: dict[torch.dtype, Schedule | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the schedules, which are of one kind of card: a copy makes those of the same dtypes anew, on its own."""
        return self.__dict__ | {"_made": dict.fromkeys(self._made)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_made": {}}
        for dtype in state["_made"] if self.indices.is_cuda else ():
            self.of(dtype)

    @classmethod
    def on_gpu(cls, weight: Tensor, pattern: Pattern) -> Schedules | None:
        """The schedules of single entries of a linear layer's weight; None where no GPU samples its gradient."""
        return cls(pattern.chosen, *weight.shape) if pattern.columns is None and is_sampled_on_gpu(weight) else None

    def of(self, dtype: torch.dtype) -> Schedule | None:
        """The schedule for operands of a dtype, or None where the kernel for any pattern serves.

        A graph that is being compiled can make none: it takes one that is there.
        """
        if dtype not in self._made and not torch.compiler.is_compiling():
            self._made[dtype] = schedule_for(self.indices, self.out_features, self.in_features, dtype)
        return self._made.get(dtype)


def is_sampled_on_gpu(weight: Tensor) -> bool:
    """Whether a GPU that the CUDA kernels serve holds the whole of a linear layer's weight."""
    return weight.is_cuda and native.problems["_C_cuda"] is None and weight.dim() == 2 and type(weight.data) is Tensor


@dataclass
class Entries:
    """The chosen entries of one weight.

    Attributes:
        delta: `[nnz]`, float32 (float64 for a float64 weight), the trained change.
        pattern: which entries these are.
        base: `[nnz]`, the original entries, in the weight's dtype.
        scale: factor on delta.
        written: shared by all uses of the weight, or None to write every time.
        schedules: how a GPU samples the gradient of single entries of a linear layer, or None.
        candidates: sees the gradient of the whole weight in backward, chunk by chunk, or None.
        scores: `[inputs]`, a leaf whose gradient backward adds the scores of a linear layer's inputs to, or None.
    """

    delta: Tensor
    pattern: Pattern
    base: Tensor
    scale: float = 1.0
    written: Written | None = None
    schedules: Schedules | None = None
    candidates: Candidates | None = None
    scores: Tensor | None = None

    @property
    def indices(self) -> Tensor:
        """The flat indices `[nnz]`; of whole columns they are made anew at each call."""
        return self.pattern.indices

    def on(self, device: torch.device) -> Entries:
        """The same entries on a device; their gradient comes back from there."""
        if self.delta.device == device:
            return self
        return Entries(self.delta.to(device), self.pattern.to(device), self.base.to(device), self.scale)

    def values(self) -> Tensor:
        """What the weight holds at the chosen entries, `[nnz]` in its dtype: cast(base + scale * delta)."""
        return ops.patched(self.base, self._change(), self.scale)

    def ensure(self, weight: Tensor) -> None:
        """Make the chosen entries of `weight` hold base + scale * delta, unless they are known to.

        Raises:
            ValueError: The weight is a DTensor, so this rank may hold a part of it only.
        """
        if is_dtensor(weight):
            raise ValueError(
                "expected a whole weight in a forward pass, got a DTensor: sprand does not train models under tensor "
                "parallelism; shard the model by torch.distributed.fsdp.fully_shard over one mesh dimension instead"
            )
        if self.written is None or not self.written.holds(weight, self.delta, self.scale):
            self.write(weight)

    def write(self, weight: Tensor) -> None:
        """Make the chosen entries of `weight` hold base + scale * delta.

        A weight of another dtype than base is one that FSDP2 cast for its mixed precision: the sum is rounded once, to it.
        """
        self._end_mark(weight)
        ops.patch_(self.pattern.view(weight.data), self.pattern.chosen, *self._change_of(weight))

    def input_grad(self, grad_output: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """What `ops.linear_input_grad` gives, `[T, in]`, of rows `[T, out]` and a whole weight."""
        return ops.linear_input_grad(grad_output, weight.data, self.pattern.chosen, *self._change_of(weight), transposed)

    def restore(self, weight: Tensor) -> None:
        """Make the chosen entries of `weight` hold base, bit for bit."""
        if self.written is not None:
            self.written.forget()
        ops.patch_(self.pattern.view(weight.data), self.pattern.chosen, self.base.to(weight.dtype), None)

    def _change_of(self, weight: Tensor) -> tuple[Tensor, Tensor | None, float]:
        """Base, delta and scale as the operators take them for a weight, which may have another dtype than base."""
        delta = self._change()
        if self.base.dtype == weight.dtype:
            return self.base, delta, self.scale
        change = self.scale * delta
        values = torch.where(change == 0, self.base, self.base + change)  # -0.0 + 0.0 would be 0.0
        return values.to(weight.dtype), None, 1.0

    def _change(self) -> Tensor:
        """The delta in the dtype that the operators add in.

        Raises:
            ValueError: It is on the meta device, and the weight is not.
        """
        if self.delta.is_meta and not self.base.is_meta:
            raise ValueError(
                "expected the trained values beside their weight, got them on the meta device: nothing was loaded into them, or "
                "accelerate has offloaded them (device_map, cpu_offload, disk_offload) and brings them for calls of their own "
                "module alone; merge the adapter before the model is offloaded"
            )
        return self.delta.detach().to(ops.accumulation_dtype(self.base.dtype))

    def _end_mark(self, weight: Tensor) -> None:
        """Forget that the weight held something else than what is written now."""
        if self.written is not None and not self.written.holds(weight, self.delta, self.scale):
            self.written.forget()


def write_all(weights: Sequence[Tensor], entries: Sequence[Entries], trained: bool) -> None:
    """`Entries.write` (or `restore`, where not `trained`) of many weights of one device, in one pass."""
    deltas = [e._change() for e in entries] if trained else None
    for weight, e in zip(weights, entries, strict=True):
        if trained:
            e._end_mark(weight)
        elif e.written is not None:
            e.written.forget()
    ops.patch_all_(
        [e.pattern.view(weight.data) for weight, e in zip(weights, entries, strict=True)],
        [e.pattern.chosen for e in entries],
        [e.base for e in entries],
        deltas,
        [e.scale for e in entries],
    )
