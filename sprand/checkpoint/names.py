"""From the parameter names of an adapter to the tensors of a checkpoint: equal names, one changed prefix, or split experts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .shards import Checkpoint, Stored

OUTPUTS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
INPUTS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "embeddings.weight", "shared.weight")
FUSED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


Shapes = Mapping[str, Sequence[int]]
Tensors = dict[str, tuple[str, ...]]


def resolve(checkpoint: Checkpoint, shapes: Shapes, others: Iterable[str] = ()) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a checkpoint that hold each parameter.

    Names that the checkpoint has are taken as they are. Where some are missing, one prefix is put before all names, taken away,
    or changed (`model.`, `bert.`, `encoder.`), if exactly one such change finds them all. A 3-D parameter of fused experts is
    found in the per-expert matrices that transformers fuses when it loads.

    Args:
        checkpoint: where to look.
        shapes: shape of each parameter by name.
        others: further names, of tensors that the checkpoint need not have.

    Returns:
        For each parameter one tensor of its shape; or several, whose entries one after another are those of the parameter. And
        for each of the others its name in the checkpoint, with the same change of prefix.

    Raises:
        ValueError: A parameter is not there, has another shape, or could be several tensors.
    """
    places = _under(checkpoint, shapes, "", "")
    if places is not None:
        return places, {name: name for name in others}
    missing = next(name for name, shape in shapes.items() if not _tensors(checkpoint, name, shape))
    for before in _prefixes(missing):
        changes = _changes_of_prefix(checkpoint, shapes, before)
        if len(changes) > 1:
            first, second, *_ = (places[missing][0] for places in changes.values())
            raise ValueError(
                f"{missing} could be {first} or {second} of {checkpoint.folder}; rename the parameters of the adapter to those "
                "of the checkpoint, or give the checkpoint of the model that was trained"
            )
        if changes:
            ((after, places),) = changes.items()
            return places, {name: _changed(name, before, after) for name in others}
    raise ValueError(_reason(checkpoint, missing, shapes[missing]))


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


def _changes_of_prefix(checkpoint: Checkpoint, shapes: Shapes, before: str) -> dict[str, Tensors]:
    """Every prefix of the checkpoint that finds all parameters when it takes the place of another, with what it finds."""
    theirs = dict.fromkeys(prefix for name in checkpoint.tensors for prefix in _prefixes(name))
    places = {after: _under(checkpoint, shapes, before, after) for after in theirs if after != before}
    return {after: tensors for after, tensors in places.items() if tensors is not None}


def _under(checkpoint: Checkpoint, shapes: Shapes, before: str, after: str) -> Tensors | None:
    """All parameters with one prefix changed, or None if one of them is not found."""
    places = {}
    for name, shape in shapes.items():
        places[name] = _tensors(checkpoint, _changed(name, before, after), shape)
        if not places[name]:
            return None
    return places


def _changed(name: str, before: str, after: str) -> str:
    return after + name[len(before) :] if name.startswith(before) else name


def _tensors(checkpoint: Checkpoint, name: str, shape: Sequence[int]) -> tuple[str, ...]:
    stored = checkpoint.tensors.get(name)
    if stored is not None:
        return (name,) if stored.shape == tuple(shape) else ()
    if checkpoint.tied and name.endswith(OUTPUTS):
        inputs = [t.name for t in checkpoint.tensors.values() if t.name.endswith(INPUTS) and t.shape == tuple(shape)]
        return (inputs[0],) if len(inputs) == 1 else ()
    return _experts(checkpoint.tensors, name, shape)


def _experts(tensors: Mapping[str, Stored], name: str, shape: Sequence[int]) -> tuple[str, ...]:
    """The matrices of single experts that make up `[experts, rows, columns]`, in the order of its entries."""
    parent, _, leaf = name.rpartition(".")
    if len(shape) != 3 or leaf not in FUSED:
        return ()
    for place in dict.fromkeys((parent, parent.replace(".mlp.experts", ".block_sparse_moe.experts"))):
        for leaves in FUSED[leaf]:
            parts = tuple(f"{place}.{expert}.{part}.weight" for expert in range(shape[0]) for part in leaves)
            each = (shape[1] // len(leaves), shape[2])
            whole = shape[1] % len(leaves) == 0 and f"{place}.{shape[0]}.{leaves[0]}.weight" not in tensors
            if whole and all(part in tensors and tensors[part].shape == each for part in parts):
                return parts
    return ()


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
        return (
            f"{name} is {list(stored.shape)} in {checkpoint.folder} and {list(shape)} in the adapter; give the checkpoint "
            "that it was trained on"
        )
    if len(shape) == 3:
        return (
            f"{name} {list(shape)} holds fused experts, and {checkpoint.folder} has no tensor of that name nor single experts "
            "that make it up; load the model with transformers, then sprand.load, sprand.merge and save_pretrained"
        )
    near = ", ".join(_nearest(checkpoint.tensors, name))
    return (
        f"{checkpoint.folder} has no tensor for {name} {list(shape)} (nearest: {near}); give the checkpoint that it was "
        "trained on"
    )


def _nearest(tensors: Iterable[str], name: str) -> list[str]:
    """Three names that share the longest ending with this one."""
    return sorted(tensors, key=lambda other: (-_shared_parts(name, other), other))[:3]


def _shared_parts(one: str, two: str) -> int:
    """How many parts two names have in common, counted from their ends."""
    backwards = zip(reversed(one.split(".")), reversed(two.split(".")), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], backwards)))
