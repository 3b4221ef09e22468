"""The exact sparse difference of two checkpoints, as an adapter: what was tuned, proven entry by entry to come out again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.architecture import of_head
from ..adapters.file import AdapterFile
from ..adapters.frozen import Frozen
from ..adapters.trained import Trained
from ..kernels import ops, topk
from ..kernels.ops import patched
from ..selection import pattern
from ..selection.config import GIVEN, SparseConfig
from .conversion import loading_of
from .names import resolve
from .shards import TRAINABLE, Checkpoint, Stored, open_checkpoint
from .stream import Progress

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """What two checkpoints differ in.

    Attributes:
        folder: the adapter.
        changed: how many entries differ.
        kept: how many of them the adapter holds.
        values: how many of those as frozen values, because no delta gives them exactly.
        tensors: how many tensors they are in, of `compared`.
        compared: tensors that both have.
        added: tensors that only the tuned checkpoint has, or in another shape; kept whole.
        missing: tensors that only the base has.
    """

    folder: Path
    changed: int
    kept: int
    values: int
    tensors: int
    compared: int
    added: tuple[str, ...]
    missing: tuple[str, ...]


def diff(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    density: float | None = None,
    progress: Progress = lambda count: None,
) -> Difference:
    """Write what one checkpoint changes in another as an adapter, a tensor at a time.

    Every entry that differs, in any bit, is kept as the float32 delta that gives the tuned value when it is added to the base
    value and rounded, and that is proven. The few for which there is none (a value far smaller than the change that led to it,
    or a zero that changed its sign) are kept as frozen values. So merging the adapter into the base gives the tuned checkpoint.

    Args:
        base: folder of the base checkpoint, or one safetensors file.
        tuned: the other one, with tensors of the same names, or with one prefix before all of them.
        path: folder of the adapter; one that is there is replaced. Its parameters have the names of the tuned checkpoint.
        density: keep this fraction of the entries of each tensor at most, those with the largest changes; by default all.
        progress: called with the number of bytes that are done.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: Nothing differs, dtypes differ, or a tuned value is not finite. Nothing is written then.
        OSError: The adapter cannot be written.
    """
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density: expected a fraction in (0, 1], got {density}")
    one, two = open_checkpoint(base), open_checkpoint(tuned)
    names = _names(one, two)
    trained: dict[str, Trained] = {}
    changed = values = kept = 0
    for name, other in names.items():
        differing = _differing(one, two, name, other, progress)
        changed += differing.count
        largest = differing.largest(density)
        if largest.count:
            trained[other] = largest.trained()
            kept += largest.count
            values += int((~largest.exact).sum())
    added = {name: two.read(name).view(two.tensors[name].shape) for name in two.tensors if name not in names.values()}
    missing = tuple(name for name in one.tensors if name not in names and name not in added)
    if not trained and not added:
        raise ValueError(f"{tuned} holds the same values as {base}; there is no difference to keep")
    for name, value in added.items():
        if value.dtype not in TRAINABLE:
            raise ValueError(f"{name} is only in {tuned}, as {two.tensors[name].code}; expected F64, F32, F16 or BF16")
    config = SparseConfig(strategy=GIVEN, target_modules=None, target_parameters=tuple(trained) or None)
    base_model = one.config.get("_name_or_path") or one.folder.name
    selection = {"strategy": "diff", "density": density}
    architecture = {"classes": {}, "config": of_head(two.config)} if added and two.config else None
    folder = AdapterFile.made(path, config, trained, added, base_model, selection, architecture).store()
    return Difference(folder, changed, kept, values, len(trained), len(names), tuple(added), missing)


def exact_deltas(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    """The deltas by which patching gives the tuned values, bit for bit.

    Args:
        base: `[n]`, a floating dtype.
        tuned: `[n]`, the same dtype.

    Returns:
        Deltas `[n]` in float32 (float64 for float64), and where they are exact, bool `[n]`; elsewhere they are zero.
    """
    wide = ops.accumulation_dtype(base.dtype)
    deltas = tuned.to(wide) - base.to(wide)
    best = torch.where(torch.isfinite(deltas), deltas, 0)
    exact = same_bits(patched(base, best), tuned)
    for towards in (torch.inf, -torch.inf):
        if exact.all():
            break
        near = torch.nextafter(deltas, torch.full_like(deltas, towards))
        near = torch.where(torch.isfinite(near), near, 0)
        better = ~exact & same_bits(patched(base, near), tuned)
        best, exact = torch.where(better, near, best), exact | better
    return torch.where(exact, best, 0), exact


def same_bits(one: Tensor, two: Tensor) -> Tensor:
    """Where two tensors of one dtype hold the same bits; bool `[n]`."""
    return _integers(one) == _integers(two)


@dataclass(frozen=True, eq=False)
class _Differing:
    """The entries of one tensor that differ.

    Attributes:
        stored: the tensor.
        indices: `[n]`, flat, ascending.
        base, tuned: `[n]`, both values.
        deltas: `[n]`, see `exact_deltas`.
        exact: `[n]`, bool, where the delta gives the tuned value.
    """

    stored: Stored
    indices: Tensor
    base: Tensor
    tuned: Tensor
    deltas: Tensor
    exact: Tensor

    @property
    def count(self) -> int:
        """How many entries differ."""
        return self.indices.numel()

    def largest(self, density: float | None) -> _Differing:
        """The entries that changed most, at most a fraction of the tensor; all of them without one."""
        count = self.count if density is None else round(density * self.stored.numel)
        if count >= self.count:
            return self
        size = (self.tuned.double() - self.base.double()).abs().nan_to_num(nan=torch.inf)
        places = topk.largest(topk.order_keys(size), count)
        lists = self.indices, self.base, self.tuned, self.deltas, self.exact
        return _Differing(self.stored, *(values[places] for values in lists))

    def trained(self) -> Trained:
        """The entries as an adapter holds them: deltas, and frozen values where no delta is exact."""
        exact, indices = self.exact, self.indices.to(pattern.index_dtype(self.stored.numel))
        frozen = None if exact.all() else Frozen(indices[~exact], self.tuned[~exact], self.base[~exact])
        return Trained(self.stored.shape, self.deltas[exact], self.base[exact], indices[exact], frozen)


def _names(one: Checkpoint, two: Checkpoint) -> dict[str, str]:
    """For each tensor of one checkpoint that the other has too, in the same shape, its name there.

    Raises:
        ValueError: No tensor is in both, or one is in another dtype.
    """
    names = {name: name for name in one.tensors if name in two.tensors}
    if len(names) < min(len(one.tensors), len(two.tensors)):
        names = {name: other for name, other in _renamed(one, two).items() if other not in names} | names
    names = names or _behind_a_prefix(one, two)
    alike = {}
    for name, other in names.items():
        here, there = one.tensors[name], two.tensors[other]
        if here.shape != there.shape:
            continue
        if here.code != there.code:
            raise ValueError(f"{name} is {here.code} in {one.folder} and {there.code} in {two.folder}; save both in one dtype")
        alike[name] = other
    if not alike:
        raise ValueError(
            f"{one.folder} and {two.folder} have nothing in common, no tensor of one name (or with one prefix before all names) "
            "and shape; give a checkpoint and one that was trained from it"
        )
    return alike


def _behind_a_prefix(one: Checkpoint, two: Checkpoint) -> dict[str, str]:
    """For each tensor of one checkpoint its name in the other, where all names there have one prefix more or less; or nothing."""
    try:
        places, _ = resolve(two, {name: stored.shape for name, stored in one.tensors.items()})
    except ValueError:
        return {}
    return {name: place.tensors[0] for name, place in places.items()}


def _renamed(one: Checkpoint, two: Checkpoint) -> dict[str, str]:
    """The tensors of one checkpoint that transformers loads as it loads others of the other, by what they are called in each."""
    kinds = [{"": kind} for kind in two.config.get("architectures") or ()]
    loadings = [loading_of(checkpoint, (), kinds) for checkpoint in (one, two)]
    if None in loadings:
        return {}
    names = {}
    for name in loadings[1].shapes:
        here, there = (loading.place(name) for loading in loadings)
        if here is not None and there is not None and here.is_whole and there.is_whole:
            names[here.tensors[0]] = there.tensors[0]
    return names


def _differing(one: Checkpoint, two: Checkpoint, name: str, other: str, progress: Progress) -> _Differing:
    """The entries of a tensor that differ in any bit.

    Raises:
        ValueError: The tensor differs and is of a dtype that is not trained, or a tuned value is not finite.
    """
    stored = one.tensors[name]
    indices, base, tuned = map(torch.cat, zip(*_parts(one, two, name, other, progress), strict=True))
    if not indices.numel():
        return _Differing(stored, indices, base, tuned, torch.empty(0), torch.empty(0, dtype=torch.bool))
    if stored.dtype not in TRAINABLE:
        raise ValueError(f"{name} is {stored.code} and differs; expected changes in F64, F32, F16 or BF16 tensors only")
    if not torch.isfinite(tuned).all():
        raise ValueError(f"{two.folder}: {other} holds values that are no finite numbers; take another copy of it")
    return _Differing(stored, indices, base, tuned, *exact_deltas(base, tuned))


def _parts(
    one: Checkpoint, two: Checkpoint, name: str, other: str, progress: Progress
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Part by part: positions where two tensors differ in any bit, and both values there; first an empty part."""
    nothing = torch.empty(0, dtype=one.tensors[name].dtype or torch.uint8)
    yield torch.empty(0, dtype=torch.int64), nothing, nothing
    for (before, first), (after, _) in zip(one.chunks(name), two.chunks(other), strict=True):
        progress(before.nbytes)
        if torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
            continue
        places = (~same_bits(before, after)).nonzero().flatten()
        yield places + first, before[places], after[places]


def _integers(values: Tensor) -> Tensor:
    return values.view(INTEGERS[values.element_size()])
