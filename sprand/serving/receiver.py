"""The receiving side of weight sync: a plain model that takes the values of a training one, in place and to the bit."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.fingerprint import check_base
from ..adapters.frozen import Frozen
from ..adapters.state import known_state, whole_tensors
from ..kernels import ops
from ..layers import sharding
from .gate import ANY, Gate
from .guard import guard, unguard
from .messages import CHANGES, INDICES, Layout, Piece, as_bytes, changes_of, decoded, kind_of, values_of, version_of
from .writes import check_writable, set_entries


@dataclass(eq=False)
class _Known:
    """The positions that were received, on the devices of their weights, and what the base holds there."""

    layout: Layout
    digest: bytes
    indices: dict[str, Tensor]
    base: dict[str, Tensor]
    whole: dict[str, Tensor]


@dataclass(eq=False)
class _Update:
    """What the weights are to hold: other positions (at their base), or values at the known ones, or at `only` some of them."""

    known: _Known
    version: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    only: dict[str, Tensor] | None = None


class DeltaReceiver:
    """Applies the messages of a `DeltaSync` to a plain model of the same base; no update happens under a running forward.

    The model keeps its class, modules and parameters; a forward waits while values are written.

    Args:
        model: holds the base weights of the training model, in the same dtype, whole.

    Raises:
        ValueError: The model trains entries itself, is sharded, or is in a pool or another receiver.
    """

    def __init__(self, model: nn.Module) -> None:
        if known_state(model) is not None:
            raise ValueError("DeltaReceiver: this model trains entries; call sprand.unmerge(model) first")
        sharding.refuse(model, "DeltaReceiver", "use it in a process that holds the whole model")
        self.model = model
        self._parameters = whole_tensors(model)
        self._known: _Known | None = None
        self._version = 0
        self._mutex = threading.Lock()
        self._gate = Gate(self._change, {p.device for p in model.parameters()})
        self._guarded = guard(model, self._gate, "DeltaReceiver")

    @property
    def version(self) -> int:
        """Of the values that the weights hold; 0 for the base."""
        return self._version

    def receive(self, message: Tensor | bytes) -> int:
        """Take a message: positions, at which the weights hold the base then, or values, which they hold then.

        Args:
            message: from `DeltaSync.indices` or `DeltaSync.values`: a uint8 tensor on any device, or its bytes.

        Returns:
            The version of the values that the weights hold.

        Raises:
            ValueError: The message is truncated, damaged, of other positions or another base, or not newer than what the weights
                hold. The model is as it was then.
        """
        message = as_bytes(message)
        with self._mutex, torch.no_grad():
            update = self._positions(message) if kind_of(message) == INDICES else self._values(message)
            with self._gate.hold(update):
                return self._version

    def revert(self) -> None:
        """Put the base back, bit for bit; values of a newer version may follow."""
        with self._mutex, torch.no_grad(), self._gate.hold(None):
            pass

    def close(self) -> None:
        """Leave the model with the weights that it holds, and give it its own forward back."""
        with self._mutex, self._gate.hold(ANY):
            unguard(self._guarded)

    def _positions(self, message: Tensor) -> _Update:
        layout, digest = decoded(message)
        known = _Known(layout, digest, {}, {}, {})
        for piece in layout.pieces:
            p = self._parameter_of(piece)
            if piece.fingerprint is None:
                before = None if self._known is None else self._known.whole.get(piece.name)
                known.whole[piece.name] = p.data.clone() if before is None else before
                continue
            indices = layout.indices[piece.name].to(p.device, copy=True)
            base = self._base(piece.name, p, indices)
            check_base("the training model's message", piece.name, base, piece.fingerprint)
            known.indices[piece.name], known.base[piece.name] = indices, base
        check_writable("the training model", self._parameters, [piece.name for piece in layout.pieces])
        return _Update(known)

    def _parameter_of(self, piece: Piece) -> nn.Parameter:
        """The parameter that a piece is for.

        Raises:
            ValueError: The model has none of this name, shape and dtype.
        """
        p = self._parameters.get(piece.name)
        if p is None or tuple(p.shape) != piece.shape or p.dtype != piece.torch_dtype:
            here = "none of that name" if p is None else f"{list(p.shape)} of {p.dtype}"
            raise ValueError(
                f"receive: the training model has {piece.name} {list(piece.shape)} of torch.{piece.dtype}, and this one "
                f"has {here}; build both from the same checkpoint, in one dtype"
            )
        return p

    def _base(self, name: str, weight: nn.Parameter, indices: Tensor) -> Tensor:
        held = ops.gather(weight.data.contiguous(), indices)
        if self._known is None or name not in self._known.indices:
            return held
        before = self._known.base[name]
        return Frozen(self._known.indices[name], before, before).pristine(indices, held)

    def _values(self, message: Tensor) -> _Update:
        if self._known is None:
            raise ValueError("receive: got values before positions; send DeltaSync.indices() first")
        digest, version = version_of(message)
        if digest != self._known.digest:
            raise ValueError("receive: these values are for other positions; send DeltaSync.indices() again, then its values")
        if version <= self._version:
            raise ValueError(f"receive: got values of version {version} after those of version {self._version}")
        if kind_of(message) == CHANGES:
            return self._changes(message, version)
        received = values_of(message, self._known.layout)
        values = {name: value.to(self._parameters[name].device) for name, value in received.items()}
        return _Update(self._known, version, values)

    def _changes(self, message: Tensor, version: int) -> _Update:
        if version != self._version + 1:
            raise ValueError(
                f"receive: got the changes of version {version} after version {self._version}, and those between are missing; "
                "call values(whole=True) of the DeltaSync, and send what it gives"
            )
        changed = changes_of(message, self._known.layout)
        devices = {name: self._parameters[name].device for name in changed}
        only = {name: own.to(devices[name]) for name, (own, _) in changed.items()}
        return _Update(self._known, version, {name: values.to(devices[name]) for name, (_, values) in changed.items()}, only)

    def _change(self, update: _Update | None) -> None:
        """Write; after an error in the middle the weights hold the base."""
        try:
            if update is None or update.known is not self._known:
                self._restore()
            if update is not None and update.values:
                self._write(update)
        except BaseException:
            self._restore()
            self._version, self._gate.state = 0, None
            raise
        if update is not None:
            self._known = update.known
        self._version, self._gate.state = (0, None) if update is None else (update.version, update)

    def _write(self, update: _Update) -> None:
        known, only = update.known, update.only
        indices = known.indices if only is None else {name: own[only[name]] for name, own in known.indices.items()}
        set_entries(self._parameters, indices, {name: update.values[name] for name in indices})
        for name in known.whole:
            flat = self._parameters[name].data.view(-1)
            if only is None:
                flat.copy_(update.values[name])
            else:
                flat[only[name]] = update.values[name]

    def _restore(self) -> None:
        if self._known is not None:
            set_entries(self._parameters, self._known.indices, self._known.base)
            for name, value in self._known.whole.items():
                self._parameters[name].data.copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a DeltaReceiver holds locks of this process; make another one from a copy of the model")
