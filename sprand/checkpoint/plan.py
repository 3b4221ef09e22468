"""What training a model will need in memory, from the headers of its checkpoint: sprand beside LoRA and full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..layers.units import Units
from ..selection import pattern
from ..selection.choose import column_shares, fewest_entries
from .kept_inputs import Input, inputs_by_layer, kept_by_columns, kept_by_lora, kept_whole
from .names import INPUTS, OUTPUTS
from .shards import DTYPES, TRAINABLE

WIDE = 4  # bytes of a delta, its gradient, and each of its two moments: float32
PLANNED = ("unstructured", pattern.COLUMNS)
NOT_LINEAR = ("embed", "wte.", "wpe.", "norm", "score.", "classifier.", "position", "token_type", "conv", "shared.")


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint: name, shape, and dtype in the words of safetensors."""

    name: str
    shape: tuple[int, ...]
    code: str

    @property
    def numel(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)

    @property
    def is_trainable(self) -> bool:
        """Whether its dtype is one that training can change."""
        return DTYPES.get(self.code) in TRAINABLE

    @property
    def is_linear(self) -> bool:
        """Whether its name and shape are those of a linear layer's weight; embeddings, output heads and norms are none."""
        if len(self.shape) != 2 or not self.name.endswith("weight") or not self.is_trainable:
            return False
        other = self.name.endswith((*INPUTS, *OUTPUTS)) or any(part in self.name for part in NOT_LINEAR)
        return not other

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return DTYPES[self.code].itemsize if self.code in DTYPES else 1


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one way of training needs, in bytes.

    Attributes:
        method: its name.
        trained: trained scalars.
        weights: the model's own.
        values: of trained scalars kept beside the model: deltas, LoRA's matrices, float32 copies.
        grads, moments: of the trained scalars.
        indices, base: positions, and base values of the entries.
        activations: an estimate of what every method keeps for backward.
        inputs: of linear layers, kept for backward by this method.
        file: what is saved.
        columns: of layout `"columns"`, how many of each linear weight train, and of how many, by its name.
    """

    method: str
    trained: int
    weights: int
    values: int
    grads: int
    moments: int
    indices: int = 0
    base: int = 0
    activations: int
    inputs: int
    file: int
    columns: dict[str, tuple[int, int]] | None = None

    @property
    def total(self) -> int:
        """All that is in memory: everything but the file."""
        state = self.values + self.grads + self.moments + self.indices + self.base
        return self.weights + state + self.activations + self.inputs


def plan(
    weights: Sequence[Weight],
    *,
    densities: Iterable[float] = (),
    memory: int | None = None,
    ranks: Iterable[int] = (8, 16, 32, 64),
    tokens: int = 2048,
    checkpointing: bool = False,
    layout: str = "unstructured",
) -> list[Need]:
    """What training needs, method by method.

    For each trained entry sprand keeps a delta, its gradient and two moments in float32, an index of 4 bytes (8 in weights from
    2**31 entries; in columns one for each column), and the base value; LoRA four float32 values for each of its own; full
    fine-tuning a gradient in the weights' dtype, two float32 moments, and for 16-bit weights a float32 copy.

    What backward reads is kept. Of the inputs of linear layers that is every distinct one for single entries and full
    fine-tuning, the trained features of it for columns, and for LoRA what `kept_inputs.kept_by_lora` says. All else is estimated,
    and alike: what comes out of each linear layer and goes into those that read the same, or with checkpointing what enters each
    layer and all of one; and float32 logits with their gradient.

    Args:
        weights: of the checkpoint.
        densities: shares of the linear weights to train.
        memory: bytes there are; adds the largest density that fits.
        ranks: of LoRA.
        tokens: of a batch.
        checkpointing: activations are computed again in backward.
        layout: `"unstructured"` or `"columns"`, of which each weight trains whole ones, at least one.

    Raises:
        ValueError: There is no linear weight, a density is out of range or leaves no column to a weight, or the memory is too
            small for any entry.
    """
    if layout not in PLANNED:
        raise ValueError(f"layout: expected one of {', '.join(PLANNED)}, got {layout!r}")
    targets = [weight for weight in weights if weight.is_linear]
    if not targets:
        raise ValueError("the checkpoint has no weight that is known as a linear layer's by name and shape")
    bad = [density for density in densities if not 0 < density <= 1]
    if bad:
        raise ValueError(f"density: expected fractions in (0, 1], got {bad[0]}")
    units = columns_of(weights) if layout == pattern.COLUMNS else None
    held = sum(weight.numel * weight.itemsize for weight in weights)
    work = Work.of(weights, targets, tokens, checkpointing)
    needs = [_sparse(targets, density, held, work, units) for density in densities]
    if memory is not None:
        needs.append(_largest(targets, memory, held, work, units))
    needs += [_lora(targets, rank, held, work) for rank in ranks]
    return [*needs, _full(weights, held, work)]


@dataclass(frozen=True)
class Work:
    """What a step keeps for backward.

    Attributes:
        tokens: of a batch.
        checkpointing: activations are computed again in backward.
        activations: bytes that every method keeps.
        layers: the distinct inputs of linear layers, by layer.
    """

    tokens: int
    checkpointing: bool
    activations: int
    layers: list[list[Input]]

    @classmethod
    def of(cls, weights: Sequence[Weight], targets: Sequence[Weight], tokens: int, checkpointing: bool) -> Work:
        """The work of a model."""
        units = columns_of(weights)
        layers = inputs_by_layer((weight.name, units[weight.name].count, weight.itemsize) for weight in targets)
        return cls(tokens, checkpointing, tokens * _activations(weights, targets, layers, checkpointing), layers)

    def kept(self, bytes_of: Callable[[Iterable[Input]], int]) -> int:
        """Bytes of inputs that a method keeps: of all layers, or of the largest, which is computed again.

        Args:
            bytes_of: bytes a token that it keeps of the inputs of a layer.
        """
        return self.tokens * (max if self.checkpointing else sum)(map(bytes_of, self.layers))


def columns_of(weights: Sequence[Weight]) -> dict[str, Units]:
    """The columns of each linear weight by its name; a bias tells the side of the outputs of one that is stored transposed."""
    shapes = {weight.name: weight.shape for weight in weights}
    units = {}
    for name, shape in ((weight.name, weight.shape) for weight in weights if weight.is_linear):
        bias = shapes.get(f"{name.removesuffix('weight')}bias")
        units[name] = Units.of(shape, 0 if bias == shape[1:] and bias != shape[:1] else 1)
    return units


def least_density(weights: Sequence[Weight]) -> float:
    """From which density on every linear weight has at least one column; 0 where there is none."""
    units = columns_of(weights).values()
    return fewest_entries(units) / sum(unit.numel for unit in units) if units else 0.0


def _sparse(targets: Sequence[Weight], density: float, held: int, work: Work, units: dict[str, Units] | None = None) -> Need:
    counts, columns = {weight: round(density * weight.numel) for weight in targets}, None
    if units is not None:
        shares = column_shares(units, round(density * sum(weight.numel for weight in targets)))
        counts = dict(zip(targets, shares, strict=True))
        columns = {weight.name: (count // units[weight.name].size, units[weight.name].count) for weight, count in counts.items()}
    total, inputs = sum(counts.values()), work.kept(kept_whole)
    indices = [(count, weight.numel) for weight, count in counts.items()]
    if columns is not None:
        indices = columns.values()
        trained = {name: count for name, (count, _) in columns.items()}
        inputs = work.kept(lambda layer: kept_by_columns(layer, trained))
    percent = f"{density:.4%}".rstrip("%").rstrip("0").rstrip(".")
    return Need(
        method=f"sprand {percent} %{' in columns' if units is not None else ''}",
        columns=columns,
        weights=held,
        **_in_float32(total),
        indices=sum(count * pattern.index_dtype(of).itemsize for count, of in indices),
        base=sum(count * weight.itemsize for weight, count in counts.items()),
        activations=work.activations,
        inputs=inputs,
    )


def _lora(targets: Sequence[Weight], rank: int, held: int, work: Work) -> Need:
    return Need(
        method=f"LoRA r={rank}",
        weights=held,
        **_in_float32(rank * sum(sum(weight.shape) for weight in targets)),
        activations=work.activations,
        inputs=work.kept(lambda layer: kept_by_lora(layer, rank)),
    )


def _in_float32(count: int) -> dict[str, int]:
    """What so many trained scalars need where all that is kept of them is float32."""
    return {"trained": count, "values": count * WIDE, "grads": count * WIDE, "moments": 2 * count * WIDE, "file": count * WIDE}


def _full(weights: Sequence[Weight], held: int, work: Work) -> Need:
    trainable = [weight for weight in weights if weight.is_trainable]
    count = sum(weight.numel for weight in trainable)
    return Need(
        method="full fine-tuning",
        trained=count,
        weights=held,
        values=sum(weight.numel * WIDE for weight in trainable if weight.itemsize == 2),
        grads=sum(weight.numel * weight.itemsize for weight in trainable),
        moments=2 * count * WIDE,
        activations=work.activations,
        inputs=work.kept(kept_whole),
        file=held,
    )


def _largest(targets: Sequence[Weight], memory: int, held: int, work: Work, units: dict[str, Units] | None = None) -> Need:
    """The largest density, of three digits, whose need is within the memory."""
    everything = _sparse(targets, 1.0, held, work, units)
    activations = work.activations + (everything.inputs if units is None else 0)
    share = (memory - held - activations) / (everything.total - held - activations)
    if share <= 0:
        raise ValueError(
            f"memory: the model's own {held:,} bytes and {activations:,} bytes of activations do not fit into {memory:,}; give "
            "more memory, fewer --tokens, or --checkpointing"
        )
    share = min(1.0, share)
    step = 10.0 ** (math.floor(math.log10(share)) - 2)
    density = math.floor(share / step) * step
    while density > step and _sparse(targets, density, held, work, units).total > memory:
        density -= step
    return _sparse(targets, density, held, work, units)


def _activations(
    weights: Sequence[Weight], targets: Sequence[Weight], layers: Sequence[Sequence[Input]], checkpointing: bool
) -> int:
    """Bytes a token that every method keeps."""
    named = {weight.name: weight for weight in targets}
    of_layers = [[named[name] for one in layer for name in one.readers] for layer in layers]
    whole = [
        sum(sum(weight.shape) * weight.itemsize for weight in of_layer) - kept_whole(layer)
        for of_layer, layer in zip(of_layers, layers, strict=True)
    ]
    entering = [max(min(weight.shape) * weight.itemsize for weight in of_layer) for of_layer in of_layers]
    kept = sum(entering) + max(whole) if checkpointing else sum(whole)
    vocabulary = max((weight.shape[0] for weight in weights if weight.name.endswith((*OUTPUTS, *INPUTS))), default=0)
    return kept + 2 * WIDE * vocabulary
