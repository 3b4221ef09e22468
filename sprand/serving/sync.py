"""The sending side of weight sync: which entries a model trains, said once, and their values after each step."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adapters.architecture import architecture_of
from ..adapters.fingerprint import fingerprints
from ..adapters.in_full import buffers_of, changed
from ..adapters.state import state_of
from ..checkpoint.conversion import Place
from ..checkpoint.names import resolve
from ..checkpoint.patches import TensorPatch
from ..checkpoint.shards import open_checkpoint
from ..kernels import ops
from ..kernels.dtypes import dtype_name
from ..layers import offload, sharding
from ..layers.module import targets_by_delta
from ..layers.sites import Site, named_parameters, sites_of
from ..selection import pattern
from .messages import Layout, Piece


@dataclass
class _Cut:
    """The part of what the model trains of one weight that goes to one tensor of the copy.

    Attributes:
        piece: the tensor of the copy.
        indices: `[nnz]`, flat positions in it, on the CPU; None for one that is sent whole.
        target: name of the weight.
        own: which of its entries these are, in the order of the tensor.
    """

    piece: Piece
    indices: Tensor | None
    target: str
    own: slice | Tensor

    def of(self, target: TensorPatch) -> tuple[Tensor, Tensor]:
        """Values and base of these entries, flat."""
        return target.values.flatten()[self.own], target.base.flatten()[self.own]


class DeltaSync:
    """Lets an inference copy follow a training model: positions once, then the trained values alone.

    The transport is the user's: messages are tensors of bytes, for `torch.distributed`, a file or a socket.

        sync = DeltaSync(model)
        send(sync.indices())  # once
        for batch in batches:
            train(model, batch)
            send(sync.values())  # absolute, in the weights' dtypes: a message may be left out

    A step of RL changes few of the weights that it trains by as much as bfloat16 can tell. With `visible_only` a message holds
    the entries whose weight changed since the last one, each with its gap to the one before in a byte: about 3 bytes for each,
    and the receiver writes no others. Such messages have to come all, and in their order; after one was lost, send
    `values(whole=True)`.

    Of an FSDP2 or ZeRO-3 model every rank calls `indices` and `values`: the deltas are gathered.

    Args:
        model: of `sprand.apply` or `sprand.load`, or a PEFT model with one `SprandConfig` adapter active.
        checkpoint: folder of the checkpoint whose tensor names are sent instead of the model's; fused experts are sent as the
            checkpoint's single ones.
        visible_only: send what changed since the last message alone; it is kept for that, in the weights' dtypes.

    Attributes:
        version: of the last values; 0 after `indices`.
        sent_bytes: of the last values message.
        sent_entries: how many entries were in it.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The model trains nothing, or a PEFT model trains whole modules as well, or a quantized base.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: str | os.PathLike[str] | None = None,
        visible_only: bool = False,
    ) -> None:
        self.model, self.version, self.visible_only = model, 0, visible_only
        self.sent_bytes = self.sent_entries = 0
        self._last: list[Tensor | None] = []
        self._checkpoint = None if checkpoint is None else open_checkpoint(checkpoint)
        self._layout: Layout | None = None
        self._cuts: list[_Cut] = []
        self._known: dict[str, Tensor | None] = {}
        self._read()

    def indices(self) -> Tensor:
        """The index message: names, shapes, dtypes and positions. Versions begin anew.

        Returns:
            `[index_bytes]`, uint8, on the CPU.

        Raises:
            ValueError: A parameter is not in the checkpoint.
        """
        targets = self._read()
        places = self._places(targets)
        cuts = [cut for target in targets for cut in _cuts(target, places[target.name], self._tensors(target, places))]
        _refuse_shared(cuts)
        cuts.sort(key=lambda cut: -cut.piece.torch_dtype.itemsize)
        known = {cut.piece.name: cut.indices for cut in cuts if cut.indices is not None}
        self._cuts, self._layout = cuts, Layout(tuple(cut.piece for cut in cuts), known)
        self._known = {target.name: None if target.indices is None else target.indices.clone() for target in targets}
        self._digest, self.version = self._layout.digest(), 0
        if (
            self.visible_only
        ):  # a receiver holds the base at positions that were proven, and anything in tensors that are sent whole
            bases = (base for _, base in self._parts())
            self._last = [base.clone() if cut.indices is not None else None for cut, base in zip(cuts, bases, strict=True)]
        message = self._layout.encoded()
        self._index_bytes = message.numel()
        return message

    def values(self, whole: bool = False) -> Tensor:
        """The next values message: what the weights hold at the sent positions.

        Args:
            whole: with `visible_only`, send all of them nevertheless: to a receiver that missed a message, or reverted.

        Returns:
            `[sent_bytes]`, uint8, on the model's device; `values_bytes` are those of all.

        Raises:
            RuntimeError: `indices` was not called, or the model trains other entries since (a redrawn mask, another adapter).
            ValueError: A value is not finite.
        """
        parts = [part for part, _ in self._parts()]
        if not bool(torch.stack([torch.isfinite(part).all().to(parts[0].device) for part in parts]).all()):
            raise ValueError("values: trained values are not finite; load the last good checkpoint")
        self.version += 1
        if not self.visible_only or whole:
            message = self._layout.values(self._digest, self.version, parts)
            self.sent_entries = sum(part.numel() for part in parts)
        else:
            message, self.sent_entries = self._layout.changes(self._digest, self.version, parts, self._last)
        if self.visible_only:
            self._last = [part.clone() for part in parts]
        self.sent_bytes = message.numel()
        return message

    def patches(self) -> Iterator[TensorPatch]:
        """The same as sparse patches of tensors, for `sprand.integrations.vllm.sparse_patches` and the like.

        Raises:
            RuntimeError: `indices` was not called, or the model trains other entries since.
        """
        for piece, (values, base) in zip(self._layout.pieces if self._layout else (), self._parts(), strict=True):
            indices = self._layout.indices.get(piece.name)
            if indices is None:
                indices = torch.arange(piece.nnz, dtype=pattern.index_dtype(piece.nnz))
            yield TensorPatch(piece.name, piece.shape, piece.torch_dtype, indices.to(values.device), values, base)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index message."""
        self._sent()
        return self._index_bytes

    @property
    def values_bytes(self) -> int:
        """Bytes of one values message."""
        return self._sent().values_nbytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of all weights, which a sync without positions sends."""
        own = ("sprand_delta", "sprand_indices", "sprand_base")
        return sum(
            math.prod(sharding.shape_of(p)) * p.dtype.itemsize
            for name, p in self.model.named_parameters()
            if not any(word in name for word in own)
        )

    def _sent(self) -> Layout:
        if self._layout is None:
            raise RuntimeError("call indices() first, and send what it gives")
        return self._layout

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """Values and base of each piece, flat."""
        self._sent()
        targets = {target.name: target for target in self._read()}
        if targets.keys() != self._known.keys() or not all(map(self._is_known, targets.values())):
            raise RuntimeError("the model trains other entries than were sent; call indices() again, and send what it gives")
        return [cut.of(targets[cut.target]) for cut in self._cuts]

    def _is_known(self, target: TensorPatch) -> bool:
        """Whether these entries are those that were sent."""
        sent = self._known[target.name]
        if sent is None or target.indices is None:
            return sent is target.indices
        return torch.equal(sent, target.indices)

    def _places(self, targets: list[TensorPatch]) -> dict[str, Place]:
        """Where the entries of each parameter are in the copy."""
        if self._checkpoint is None:
            return {target.name: Place((target.name,)) for target in targets}
        peft = hasattr(self.model, "peft_config") and hasattr(self.model, "get_base_model")
        said = architecture_of(self.model.get_base_model() if peft else self.model, with_head=False)
        shapes = {target.name: target.shape for target in targets}
        places, _ = resolve(self._checkpoint, shapes, classes=[said["classes"]] if said else [])
        return places

    def _tensors(self, target: TensorPatch, places: Mapping[str, Place]) -> list[tuple[str, tuple[int, ...]]]:
        """The tensors of the copy that hold a parameter, with their shapes."""
        if self._checkpoint is None:
            return [(target.name, target.shape)]
        return [(part, self._checkpoint.tensors[part].shape) for part in places[target.name].tensors]

    def _read(self) -> list[TensorPatch]:
        """What the model trains now, tensor by tensor."""
        sharding.refuse_fsdp1(self.model, "DeltaSync")
        offload.refuse(self.model, "DeltaSync")
        with torch.no_grad():
            sharding.reshard(self.model)
            return _of_peft(self.model) if hasattr(self.model, "peft_config") else _of_applied(self.model)


def _cuts(target: TensorPatch, place: Place, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> Iterator[_Cut]:
    """What each of the tensors that hold a weight gets of it; they follow each other in what its place says of its entries."""
    sizes = [math.prod(shape) for _, shape in tensors]
    begins = list(itertools.accumulate(sizes, initial=0))
    whole = target.indices is None
    if whole and place.rows is None:
        positions, order, limits = None, None, begins
    else:
        entries = torch.arange(begins[-1], device=target.values.device) if whole else target.indices
        positions, order = _sorted(place.positions(entries))
        limits = torch.searchsorted(positions.long(), torch.tensor(begins, device=positions.device)).tolist()
    for number, (name, shape) in enumerate(tensors):
        low, high = limits[number : number + 2]
        own = slice(low, high) if order is None else order[low:high]
        indices = proof = None
        if not whole:
            indices = (positions[low:high] - begins[number]).to(pattern.index_dtype(sizes[number])).cpu()
            proof = fingerprints(target.base[own])
        piece = Piece(name, tuple(shape), dtype_name(target.values.dtype), high - low, proof)
        yield _Cut(piece, indices, target.name, own)


def _sorted(positions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positions in ascending order, and that order, None where they had it."""
    if bool((positions[1:] > positions[:-1]).all()):
        return positions, None
    return positions.sort()


def _refuse_shared(cuts: Sequence[_Cut]) -> None:
    """Prove that each tensor of the copy holds entries of one parameter.

    Raises:
        ValueError: One holds several.
    """
    firsts: dict[str, str] = {}
    for cut in cuts:
        first = firsts.setdefault(cut.piece.name, cut.target)
        if first != cut.target:
            raise ValueError(
                f"DeltaSync: {first} and {cut.target} are one tensor of the checkpoint, {cut.piece.name}; leave out checkpoint=, "
                "and give the copy the names of the model"
            )


def _of_applied(model: nn.Module) -> list[TensorPatch]:
    """The trained and frozen entries of the active adapter, the parameters that it trains in full, and changed statistics."""
    state = state_of(model)
    if state.current is None:
        raise ValueError("DeltaSync: no adapter is active; call sprand.switch(model, name) first")
    patches = []
    for patch in map(_patch, sites_of(model)):
        if patch.name in state.current.frozen:
            union = state.current.frozen[patch.name].extended(patch.indices, patch.values, patch.base)
            patch = replace(patch, indices=union.indices, values=union.values, base=union.base)
        patches.append(patch)
    parameters = dict(named_parameters(model, remove_duplicate=False))
    for name in (name for name in state.current.saved if name in parameters):
        whole = sharding.whole(parameters[name])
        patches.append(TensorPatch(name, tuple(whole.shape), whole.dtype, None, whole, state.base_saved[name]))
    for name, buffer in changed(buffers_of(model), state.base_buffers).items():
        if buffer.is_floating_point() and name in state.base_buffers:
            patches.append(TensorPatch(name, tuple(buffer.shape), buffer.dtype, None, buffer, state.base_buffers[name]))
    return patches


def _of_peft(model: nn.Module) -> list[TensorPatch]:
    """The trained entries of the active adapter of a PEFT model, by the names of its base model."""
    sites = sites_of(model)
    if not sites:
        raise ValueError("DeltaSync: expected a PEFT model with an active SprandConfig adapter, found none")
    packed = [site for site in sites if site.backend is not None]
    if packed:
        raise ValueError(
            f"DeltaSync: {packed[0].name} is stored quantized, and the values that it stands for are in no tensor of the copy; "
            "train a base in 16 or 32 bits"
        )
    deltas = targets_by_delta()
    whole = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in deltas]
    if whole:
        raise ValueError(
            f"DeltaSync: this PEFT model trains whole modules as well ({whole[0]}), which no positions describe; train it with "
            "sprand.apply(model, modules_to_save=[...])"
        )
    return [_patch(site) for site in sites]


def _patch(site: Site) -> TensorPatch:
    entries = site.entries
    delta = sharding.whole(entries.delta.detach()).to(ops.accumulation_dtype(entries.base.dtype))
    values = ops.patched(entries.base, delta, entries.scale)
    return TensorPatch(site.name, site.shape, values.dtype, entries.indices, values, entries.base)
