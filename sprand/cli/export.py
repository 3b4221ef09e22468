"""`sprand export`: an adapter in the form of another program."""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import asdict
from typing import Any

import torch

from ..checkpoint.export import FORMS, export
from ..checkpoint.lora_servers import VllmOptions, vllm_options
from . import require
from .files import failing_in_words, folder_of
from .parser import add_json, add_out

OF_PEFT = {
    "lora": "PEFT's LoRA, which vLLM and others serve, of adapters that train whole columns",
    "shira": "PEFT's SHiRA, 12 bytes per entry",
    "supertuning": "PEFT's Super-Tuning, 8 bytes per entry",
}  # known once sprand.peft is imported, which needs peft


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    known = {name: form.help for name, form in FORMS.items() if name not in OF_PEFT} | OF_PEFT
    forms = "; ".join(f"{name}: {what}" for name, what in known.items())
    parser = commands.add_parser(
        "export",
        help="an adapter in the form of another program",
        description=f"Forms: {forms}.",
        examples="""
            sprand export adapter --to lora -o lora --base base
            sprand export adapter --to vllm-patch -o patch --base base
        """,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("--to", required=True, choices=known, help="the form")
    add_out(parser, "DIR", "folder of what is written")
    parser.add_argument("--base", metavar="BASE", help="base checkpoint: a folder, a .safetensors file, or a name on the Hub")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of a LoRA; bfloat16 rounds, and says how many values")
    one_rank = "fill a LoRA with zeros to one rank for all layers, as SGLang and llama.cpp need it"
    parser.add_argument("--one-rank", action="store_true", help=one_rank)
    add_json(parser, "print the files written as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Write an adapter in the asked form, and say where.

    Raises:
        CliError: There is no adapter, the base is missing or another one, or the form cannot hold the adapter.
    """
    if options.to in OF_PEFT:
        require("peft")
        importlib.import_module("sprand.peft")
    with failing_in_words():
        base = folder_of(options.base) if options.base else None
        files = export(folder_of(options.adapter), options.to, options.out, base, **_options_of_form(options))
        vllm = vllm_options(options.out, options.base) if options.to == "lora" else None
    sizes = {file: file.stat().st_size for file in files}
    if options.json:
        written = [{"path": str(file), "bytes": size} for file, size in sizes.items()]
        said = {"out": str(options.out), "form": options.to, "files": written}
        print(json.dumps(said | ({"vllm": asdict(vllm)} if vllm else {}), indent=2))
        return 0
    for file, size in sizes.items():
        print(f"written: {file} ({size:,} bytes)")
    if vllm:
        _print(vllm)
    return 0


def _options_of_form(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of the form itself."""
    asked = {"one_rank": True} if options.one_rank else {}
    return asked | ({"dtype": getattr(torch, options.dtype)} if options.dtype else {})


def _print(vllm: VllmOptions) -> None:
    """Say how vLLM serves what was written."""
    for sentence in vllm.unserved:
        print(sentence)
    if vllm.command:
        print(f"serve it: {vllm.command}")
