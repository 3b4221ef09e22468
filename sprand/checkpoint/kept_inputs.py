"""What backward keeps of the inputs of linear layers, by way of training, from the names and shapes of a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LORA_ITEM = 4  # PEFT's adapters are float32 over 16-bit weights
READ_ALIKE = (  # modules of one parent that read one tensor
    ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


@dataclass(frozen=True)
class Input:
    """What one or several linear layers read.

    Attributes:
        width: its features.
        itemsize: bytes of one.
        readers: names of the weights that it is multiplied with.
    """

    width: int
    itemsize: int
    readers: tuple[str, ...]


def inputs_by_layer(weights: Iterable[tuple[str, int, int]]) -> list[list[Input]]:
    """The distinct inputs of linear layers, in lists, one for each layer of the model.

    Args:
        weights: of each linear weight its name, how many inputs it has, and the bytes of an entry.
    """
    layers: dict[str, dict[tuple[str, object, int, int], list[str]]] = {}
    for name, width, itemsize in weights:
        *parents, module = name.rpartition(".")[0].split(".")
        alike = next((number for number, modules in enumerate(READ_ALIKE) if module in modules), module)
        number = next((part for part in parents if part.isdigit()), "")
        layers.setdefault(number, {}).setdefault((".".join(parents), alike, width, itemsize), []).append(name)
    return [
        [Input(width, itemsize, tuple(names)) for (_, _, width, itemsize), names in layer.items()] for layer in layers.values()
    ]


def kept_whole(inputs: Iterable[Input]) -> int:
    """Bytes a token: every input once."""
    return sum(one.width * one.itemsize for one in inputs)


def kept_by_columns(inputs: Iterable[Input], columns: Mapping[str, int]) -> int:
    """Bytes a token: of every input the features whose columns train, for each weight by itself.

    Args:
        inputs: of linear layers.
        columns: how many columns of each weight train.
    """
    return sum(columns[name] * one.itemsize for one in inputs for name in one.readers)


def kept_by_lora(inputs: Iterable[Input], rank: int) -> int:
    """Bytes a token: the input, and its product with `lora_A`.

    Over 16-bit weights PEFT's adapters are float32 by default: the input is cast for each layer by itself, and autograd keeps all
    of these.
    """
    total = 0
    for one in inputs:
        copies, item = (len(one.readers), LORA_ITEM) if one.itemsize < LORA_ITEM else (1, one.itemsize)
        total += copies * one.width * item + len(one.readers) * rank * item
    return total
