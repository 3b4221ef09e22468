"""From the parameter names of an adapter to the tensors of a checkpoint: the same, transformers' own, or one changed prefix."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from . import conversion
from .conversion import INSTEAD, Classes, Loading, Place
from .shards import Checkpoint

OUTPUTS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
INPUTS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "embeddings.weight", "shared.weight")

Shapes = Mapping[str, Sequence[int]]
Places = dict[str, Place]


def resolve(
    checkpoint: Checkpoint, shapes: Shapes, others: Iterable[str] = (), classes: Iterable[Classes] = ()
) -> tuple[Places, Places]:
    """The tensors of a checkpoint that hold each parameter.

    Names that the checkpoint has are taken as they are. Where any is missing, transformers says what it makes of the tensors
    of the checkpoint, if it knows the model. For any other one prefix is put before all names, taken away, or changed above the
    layers, if exactly one such change finds them all.

    Args:
        checkpoint: where to look.
        shapes: shape of each parameter by name.
        others: further names, of tensors that the checkpoint need not have.
        classes: of the models that the names are of, see `conversion.loading_of`.

    Returns:
        For each parameter where its entries are. And for each of the others the same; of one that is not there the name that it
        gets when it is added.

    Raises:
        ValueError: A parameter is not there, has another shape, or could be several tensors.
    """
    others = list(others)
    places = _under(checkpoint, shapes, "", "")
    if places is not None and all(name in checkpoint.tensors for name in others):
        return places, {name: Place((name,)) for name in others}
    loading = conversion.loading_of(checkpoint, shapes or others, classes)
    if loading is not None:
        places = _as_loaded(checkpoint, loading, shapes)
        return places, {name: loading.place(name) or Place((loading.added(name),)) for name in others}
    if places is None:
        return _with_other_prefix(checkpoint, shapes, others)
    for name in others:
        _refuse_to_add(checkpoint, name)
    return places, {name: Place((name,)) for name in others}


def is_tied(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a model of this checkpoint has one weight for a parameter of this name and for another one."""
    return checkpoint.tied and name.endswith((*INPUTS, *OUTPUTS))


def twins(checkpoint: Checkpoint, name: str) -> list[str]:
    """Other tensors that a model with tied embeddings loads into the same weight as this one."""
    if not is_tied(checkpoint, name):
        return []
    stored = checkpoint.tensors[name]
    is_input = name.endswith(INPUTS) and not name.endswith(OUTPUTS)
    others = [other for other in checkpoint.tensors.values() if other.name.endswith(OUTPUTS if is_input else INPUTS)]
    alike = [other for other in others if (other.shape, other.code) == (stored.shape, stored.code)]
    return [other.name for other in alike if other.name != name]


def _as_loaded(checkpoint: Checkpoint, loading: Loading, shapes: Shapes) -> Places:
    """Where transformers finds each parameter.

    Raises:
        ValueError: The checkpoint lacks one, or has it in another shape.
    """
    places = {}
    for name, shape in shapes.items():
        place = loading.place(name)
        if place is None:
            raise ValueError(
                f"{checkpoint.folder} has no tensor for {name} {list(shape)}, which transformers starts from random values then; "
                'train such layers in full (modules_to_save="auto"), so that merging adds them, or give the checkpoint that was '
                "trained on"
            )
        stored = checkpoint.tensors[place.tensors[0]]
        there = stored.shape if place.is_whole else loading.shapes[name.removeprefix(loading.prefix)]
        if tuple(there) != tuple(shape):
            raise ValueError(_other_shape(checkpoint, name, there, shape))
        places[name] = place
    return places


def _refuse_to_add(checkpoint: Checkpoint, name: str) -> None:
    """Prove that a tensor which the checkpoint lacks is not there behind another prefix.

    Raises:
        ValueError: It may be.
    """
    for other in () if name in checkpoint.tensors else checkpoint.tensors:
        if name.endswith(f".{other}") or other.endswith(f".{name}"):
            raise ValueError(_ambiguous(checkpoint, name, "a new tensor", other))


def _with_other_prefix(checkpoint: Checkpoint, shapes: Shapes, others: Sequence[str]) -> tuple[Places, Places]:
    """All parameters, with one prefix changed.

    Raises:
        ValueError: No change finds them, or several do.
    """
    missing = next(name for name, shape in shapes.items() if _place(checkpoint, name, shape) is None)
    for before in _prefixes(missing):
        changes = _changes_of_prefix(checkpoint, shapes, before)
        if len(changes) > 1:
            first, second, *_ = (places[missing].tensors[0] for places in changes.values())
            raise ValueError(_ambiguous(checkpoint, missing, first, second))
        if changes:
            ((after, places),) = changes.items()
            return places, {name: Place((_changed(name, before, after),)) for name in others}
    raise ValueError(_reason(checkpoint, missing, shapes[missing]))


def _changes_of_prefix(checkpoint: Checkpoint, shapes: Shapes, before: str) -> dict[str, Places]:
    """Every prefix of the checkpoint that finds all parameters when it takes the place of another, with what it finds.

    One that is neither put before all names nor taken away is changed where layers with numbers follow: any two modules have a
    `dense.weight`, but not all that is in a layer.
    """
    theirs = dict.fromkeys(prefix for name in checkpoint.tensors for prefix in _prefixes(name))
    if before and not any(name.startswith(before) and any(map(str.isdigit, name.split("."))) for name in shapes):
        theirs = {"": None}
    places = {after: _under(checkpoint, shapes, before, after) for after in theirs if after != before}
    return {after: found for after, found in places.items() if found is not None}


def _under(checkpoint: Checkpoint, shapes: Shapes, before: str, after: str) -> Places | None:
    """All parameters with one prefix changed, or None if one of them is not there."""
    places = {}
    for name, shape in shapes.items():
        place = _place(checkpoint, _changed(name, before, after), shape)
        if place is None:
            return None
        places[name] = place
    return places


def _changed(name: str, before: str, after: str) -> str:
    return after + name[len(before) :] if name.startswith(before) else name


def _place(checkpoint: Checkpoint, name: str, shape: Sequence[int]) -> Place | None:
    """The tensor of a name; of an output embedding that is not stored the input embedding that it is tied to."""
    stored = checkpoint.tensors.get(name)
    if stored is not None:
        return Place((name,)) if stored.shape == tuple(shape) else None
    if checkpoint.tied and name.endswith(OUTPUTS):
        inputs = [t.name for t in checkpoint.tensors.values() if t.name.endswith(INPUTS) and t.shape == tuple(shape)]
        return Place((inputs[0],)) if len(inputs) == 1 else None
    return None


def _prefixes(name: str) -> Iterator[str]:
    """The leading parts of a name that end before its first number, and leave two: `""`, `"model."`, `"model.layers."`."""
    parts = name.split(".")
    for count in range(max(1, len(parts) - 1)):
        if any(part.isdigit() for part in parts[:count]):
            return
        yield "".join(f"{part}." for part in parts[:count])


def _reason(checkpoint: Checkpoint, name: str, shape: Sequence[int]) -> str:
    stored = checkpoint.tensors.get(name)
    if stored is not None:
        return _other_shape(checkpoint, name, stored.shape, shape)
    near = ", ".join(sorted(checkpoint.tensors, key=lambda other: (-_shared_parts(name, other), other))[:3])
    if conversion.is_installed():
        instead = f"or {INSTEAD}"
    else:
        instead = "or install transformers, which knows under which names it stores a model's parameters"
    return (
        f"{checkpoint.folder} has no tensor for {name} {list(shape)} (nearest: {near}); give the checkpoint that it was "
        f"trained on, {instead}"
    )


def _ambiguous(checkpoint: Checkpoint, name: str, first: str, second: str) -> str:
    return (
        f"{name} could be {first} or {second} of {checkpoint.folder}; rename the parameters of the adapter to those of the "
        "checkpoint, or give the checkpoint of the model that was trained"
    )


def _other_shape(checkpoint: Checkpoint, name: str, there: Sequence[int], shape: Sequence[int]) -> str:
    return (
        f"{name} is {list(there)} in {checkpoint.folder} and {list(shape)} in the adapter; give the checkpoint that it was "
        "trained on"
    )


def _shared_parts(one: str, two: str) -> int:
    """How many parts two names have in common, counted from their ends."""
    backwards = zip(reversed(one.split(".")), reversed(two.split(".")), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], backwards)))
