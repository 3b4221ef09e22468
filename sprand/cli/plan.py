"""`sprand plan`: what training a model will need, from the headers of its files alone."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from ..checkpoint.plan import PLANNED, Need, Weight, least_density, plan
from ..checkpoint.shards import open_checkpoint
from . import CliError
from .files import failing_in_words, from_hub
from .parser import add_json
from .table import UNITS, print_table, size_text

BYTES = UNITS | {"": 1, "B": 1, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DENSITIES = (0.001, 0.01, 0.05)
STATE = ("values", "grads", "moments", "indices", "base")


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "plan",
        help="what training a model will need in memory",
        description="What training will need, from the headers of the checkpoint's files alone: sprand beside LoRA and full "
        "fine-tuning with AdamW. Nothing is loaded; of a model on the Hub only the headers are fetched.",
        epilog="sprand: delta, gradient and two moments in float32, index, and base value of each entry. LoRA: four float32 of "
        "each of its values. Full: gradients in the weights' dtype, two float32 moments, a float32 copy of 16-bit weights. "
        "Inputs of linear layers that backward reads are kept: every distinct one; for columns what they read of it; for LoRA "
        "over 16-bit weights a float32 copy for each layer. Other activations are a rough estimate, the same for all; what the "
        "GPU's kernels and libraries take comes on top. "
        "Linear layers are those without the output head.",
        examples="""
            sprand plan openai-community/gpt2
            sprand plan meta-llama/Llama-3.1-8B --memory 24GB --tokens 8192
            sprand plan openai-community/gpt2 --layout columns --density 0.01
        """,
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, a .safetensors file, or a name on the Hub")
    shares = " ".join(map(str, DENSITIES))
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--density", type=float, nargs="+", metavar="X", help=f"shares of the linear weights ({shares})")
    amount.add_argument("--memory", type=_bytes, metavar="24GB", help="find the largest density that fits")
    parser.add_argument("--layout", choices=PLANNED, default=PLANNED[0], help="entries one by one (default), or whole columns")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="tokens of a batch (default 2048)")
    parser.add_argument("--checkpointing", action="store_true", help="activations are computed again in backward")
    add_json(parser, "print it as JSON, each part by itself")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print what training needs.

    Raises:
        CliError: There is no such model, it has no linear weights, or the memory is too small.
    """
    if options.tokens < 1:
        raise CliError(f"--tokens: expected at least 1, got {options.tokens}.")
    with failing_in_words():
        weights = _weights(options.model)
        densities = options.density or (_densities(weights, options.layout) if options.memory is None else ())
        needs = plan(
            weights, densities=densities, memory=options.memory, tokens=options.tokens, checkpointing=options.checkpointing,
            layout=options.layout,
        )  # fmt: skip
    targets = sum(weight.numel for weight in weights if weight.is_linear)
    total = sum(weight.numel for weight in weights)
    if options.json:
        rows = [asdict(need) | {"total": need.total} for need in needs]
        print(json.dumps({"parameters": total, "linear": targets, "tokens": options.tokens, "methods": rows}, indent=2))
        return 0
    weights, activations = size_text(needs[0].weights), size_text(needs[0].activations)
    print(f"{total:,} parameters, {targets:,} of them in linear layers")
    print(f"all hold {weights} of weights and about {activations} of activations ({options.tokens:,} tokens)\n")
    print_table([("method", "trained", "state", "inputs", "total", "file"), *map(_row, needs)])
    print("\nstate: values, gradients, moments, indices, and base values of entries")
    print("inputs: of linear layers, kept for backward")
    in_columns = [need for need in needs if need.columns is not None]
    if in_columns:
        print("\ncolumns of each weight that train\n")
        print_table([("weight", "columns", *(need.method.split()[1] + " %" for need in in_columns)), *_of_columns(in_columns)])
    return 0


def _densities(weights: Sequence[Weight], layout: str) -> Sequence[float]:
    """The densities that are shown where none is asked for: of columns none below the least that there is."""
    if layout == PLANNED[0]:
        return DENSITIES
    least = least_density(weights)
    return sorted({max(least, density) for density in DENSITIES})


def _of_columns(needs: Sequence[Need]) -> Iterator[tuple[str, ...]]:
    """A row for the weights of one name in all layers: how many columns they have, and how many of them train."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, (_, count) in needs[0].columns.items():
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), count), []).append(name)
    for (name, count), members in groups.items():
        cells = []
        for need in needs:
            numbers = sorted({need.columns[member][0] for member in members})
            cells.append(f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}")
        yield name, f"{count:,}", *cells


def _row(need: Need) -> tuple[str, ...]:
    state = sum(getattr(need, part) for part in STATE)
    return need.method, f"{need.trained:,}", *map(size_text, (state, need.inputs, need.total, need.file))


def _bytes(text: str) -> int:
    size = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    try:
        return int(float(size[1]) * BYTES[size[2].upper()])
    except (TypeError, KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a size, for example 24GB, got {text!r}") from None


def _weights(name: str) -> list[Weight]:
    """The tensors of a folder or file, or of a model on the Hub, whose headers its client reads alone."""
    if Path(name).expanduser().exists():
        tensors = open_checkpoint(Path(name).expanduser()).tensors.values()
        return [Weight(stored.name, stored.shape, stored.code) for stored in tensors]
    metadata = from_hub(name, lambda hub: hub.get_safetensors_metadata(name))
    files = metadata.files_metadata.values()
    return [Weight(key, tuple(info.shape), info.dtype) for file in files for key, info in file.tensors.items()]
