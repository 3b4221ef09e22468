"""`sprand plan`: what training a model will need, from the headers of its files alone."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

from ..checkpoint.plan import Need, Weight, linear, plan
from ..checkpoint.shards import open_checkpoint
from . import CliError
from .files import failing_in_words, from_hub
from .table import print_table

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "plan",
        help="what training a model will need in memory",
        description="What training will need, from the headers of the checkpoint's files alone: sprand beside LoRA and full "
        "fine-tuning with AdamW. Nothing is loaded; of a model on the Hub only the headers are fetched.",
        epilog="sprand: delta, gradient and two moments in float32, index, and base value of each entry. LoRA: four float32 of "
        "each of its values. Full: gradients in the weights' dtype, two float32 moments, a float32 copy of 16-bit weights. "
        "Activations are a rough estimate, the same for all; what the GPU's kernels and libraries take comes on top.",
        examples="""
            sprand plan gpt2
            sprand plan meta-llama/Llama-3.1-8B --memory 24GB --tokens 8192
        """,
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, a .safetensors file, or a name on the Hub")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--density", type=float, nargs="+", metavar="X", help="shares of the linear weights (0.001 0.01 0.05)")
    amount.add_argument("--memory", type=_bytes, metavar="24GB", help="find the largest density that fits")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="tokens of a batch (default 2048)")
    parser.add_argument("--checkpointing", action="store_true", help="activations are computed again in backward")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print what training needs.

    Raises:
        CliError: there is no such model, it has no linear weights, or the memory is too small.
    """
    if options.tokens < 1:
        raise CliError(f"--tokens: expected at least 1, got {options.tokens}.")
    with failing_in_words():
        weights = _weights(options.model)
        densities = options.density or (() if options.memory is not None else (0.001, 0.01, 0.05))
        needs = plan(
            weights, densities=densities, memory=options.memory, tokens=options.tokens, checkpointing=options.checkpointing
        )
    targets, total = sum(weight.numel for weight in linear(weights)), sum(weight.numel for weight in weights)
    if options.json:
        rows = [asdict(need) | {"total": need.total} for need in needs]
        print(json.dumps({"parameters": total, "linear": targets, "tokens": options.tokens, "methods": rows}, indent=2))
        return 0
    print(f"{total:,} parameters, {targets:,} of them in linear layers (output head not counted); {options.tokens:,} tokens\n")
    rows = [("method", "trained", "weights", "values", "grads", "moments", "indices", "base", "activations", "total", "file")]
    rows += [_row(need) for need in needs]
    print_table(rows)
    return 0


def _row(need: Need) -> tuple[str, ...]:
    sizes = (
        need.weights,
        need.values,
        need.grads,
        need.moments,
        need.indices,
        need.base,
        need.activations,
        need.total,
        need.file,
    )
    return need.method, f"{need.trained:,}", *map(_size, sizes)


def _size(count: int) -> str:
    if not count:
        return "-"
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    try:
        return int(float(found.group(1)) * UNITS[found.group(2).upper()])
    except (AttributeError, KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a size, for example 24GB, got {text!r}") from None


def _weights(name: str) -> list[Weight]:
    """The tensors of a folder or file, or of a model on the Hub, whose headers its client reads alone."""
    if Path(name).expanduser().exists():
        tensors = open_checkpoint(Path(name).expanduser()).tensors.values()
        return [Weight(stored.name, stored.shape, stored.code) for stored in tensors]
    metadata = from_hub(name, lambda hub: hub.get_safetensors_metadata(name))
    files = metadata.files_metadata.values()
    return [Weight(key, tuple(info.shape), info.dtype) for file in files for key, info in file.tensors.items()]
