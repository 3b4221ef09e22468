"""How vLLM is started for a folder of LoRA, and what in it vLLM does not serve."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.file import CONFIG_FILE, WEIGHTS_FILE
from ..adapters.layout import PREFIX
from ..files.described import header_of, parse, read_json
from .names import OUTPUTS

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks of vllm/config/lora.py
VLLM_IN_FULL = ("classifier", "score")  # which vLLM takes of an adapter as they are, for classification
HEADS = tuple(name.removesuffix(".weight") for name in OUTPUTS)


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM serves a LoRA.

    Attributes:
        rank: the largest rank in it.
        max_lora_rank: the smallest that vLLM can be started with for it; None where it takes none as large.
        command: which starts it; None where vLLM refuses the adapter.
        unserved: a sentence for everything that vLLM refuses, or serves for some models only.
    """

    rank: int
    max_lora_rank: int | None
    command: str | None
    unserved: tuple[str, ...]


def vllm_options(folder: str | os.PathLike[str], base: str | None = None, name: str | None = None) -> VllmOptions:
    """How to start vLLM for an adapter that PEFT's LoRA, or `sprand export --to lora`, wrote.

    Args:
        folder: of the adapter.
        base: what vLLM is to load; by default what the adapter calls its base.
        name: by which requests ask for the adapter; by default that of the folder.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: The adapter is damaged, or of another method.
    """
    place = Path(folder)
    if not (place / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"no LoRA at {place}: expected {CONFIG_FILE} there, as sprand export --to lora writes it")
    settings = read_json(place / CONFIG_FILE)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{place} is of type {settings.get('peft_type')}, expected LORA; sprand export --to lora makes one")
    rank = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
    fitting = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    factors = _factors(place)
    refused = _refused(settings, factors, rank, fitting)
    command = None
    if not refused:
        model = base or settings.get("base_model_name_or_path") or "BASE"
        module = f"{name or place.resolve().name}={place}"
        options = ["--enable-lora", "--max-lora-rank", str(fitting), "--lora-modules", module]
        command = shlex.join(["vllm", "serve", model, *options])
    return VllmOptions(rank, fitting, command, (*refused, *_for_some_models(factors)))


def _refused(settings: dict[str, Any], factors: dict[str, int], rank: int, fitting: int | None) -> list[str]:
    """What vLLM refuses the adapter for."""
    instead = "merge it (sprand merge), or switch patches in a live engine (sprand export --to vllm-patch)"
    refused = []
    if fitting is None:
        refused.append(
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this adapter has {rank}: train fewer columns of such weights, or "
            + instead
        )
    in_full = [name for name in settings.get("modules_to_save") or () if name not in VLLM_IN_FULL]
    if in_full:
        refused.append(f"vLLM takes no adapter with modules trained in full ({', '.join(in_full)}): {instead}")
    if settings.get("use_dora") or settings.get("bias", "none") != "none":
        refused.append(f"vLLM takes no adapter with DoRA or trained biases: {instead}")
    convolutions = [name for name, dimensions in factors.items() if dimensions > 2]
    if convolutions:
        refused.append(f"vLLM has no LoRA for convolutions ({', '.join(convolutions)}): {instead}")
    return refused


def _for_some_models(factors: dict[str, int]) -> list[str]:
    """What vLLM serves for models only whose class lists it as an embedding module."""
    names = [name for name, dimensions in factors.items() if not dimensions or name.rpartition(".")[2] in HEADS]
    return [f"vLLM serves a LoRA of {', '.join(names)} for models only whose embedding_modules list it"] if names else []


def _factors(place: Path) -> dict[str, int]:
    """How many dimensions the factors of each module have; 0 for embeddings."""
    file = place / WEIGHTS_FILE
    try:
        tensors = parse(header_of(file))
        linear = {name: len(tensors[name]["shape"]) for name in tensors if ".lora_A." in name}
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}); take another copy of the adapter") from error
    embeddings = [name for name in tensors if name.endswith(".lora_embedding_A")]
    found = {name.removeprefix(PREFIX).rpartition(".lora_A.")[0]: dimensions for name, dimensions in linear.items()}
    return found | {name.removeprefix(PREFIX).removesuffix(".lora_embedding_A"): 0 for name in embeddings}
