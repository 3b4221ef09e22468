"""GGUF files, the form of llama.cpp, as a checkpoint folder: weights unpacked, configuration, tokenizer and chat template."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.folder import NewFolder
from .. import CliError, require
from ..files import failing_in_words, reason_of

MAGIC = b"GGUF"
ORIGIN = "unpacked_from.json"
DTYPES = {0: torch.float32, 1: torch.float16}  # by general.file_type; packed weights become bfloat16


def file_of(name: str) -> Path | None:
    """The GGUF file that a name of a model means: a file, or the one in a folder without config.json; None for other names.

    Raises:
        CliError: The file is of another form, or the folder holds several.
    """
    path = Path(name).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return path
        raise CliError(f"--model {name}: expected a folder, a GGUF file or a name on the Hub, got a file of another form.")
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CliError(f"--model {name}: expected one GGUF file there, got {len(files)}; name one, {files[0]} say.")
    return files[0] if files else None


def as_folder(name: str, folder: Path) -> str:
    """A model's name; where it means a GGUF file, `folder` instead, into which the file is unpacked unless that was done before.

    The folder appears whole or not at all.

    Raises:
        CliError: The file cannot be read, or the folder holds something else.
    """
    file = file_of(name)
    if file is None:
        return name
    origin = {"file": str(file.resolve()), "bytes": file.stat().st_size, "changed": file.stat().st_mtime_ns}
    note = folder / ORIGIN
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == origin:
        return str(folder)
    if note.is_file():
        shutil.rmtree(folder)
    with failing_in_words():
        made = NewFolder(folder, origin)
        model, tokenizer = _read(file)
        place = made.begin()
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        (place / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")
        made.finish()
    logging.getLogger("sprand").info(f"{file.name} is unpacked to {folder} ({str(model.dtype).removeprefix('torch.')})")
    return str(folder)


def _read(file: Path) -> tuple[Any, Any]:
    transformers = require("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    reader = require("gguf").GGUFReader
    require("accelerate")
    packed = getattr(transformers, "GgufConfig", None)  # without it, transformers always unpacks
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    place, name = file.parent, file.name
    try:
        kind = reader(file).get_field("general.file_type")
        dtype = DTYPES.get(kind.contents() if kind else None, torch.bfloat16)
        with contextlib.redirect_stderr(io.StringIO()):  # its bar knows no terminal
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=name)
            model = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=dtype, **options)
    except (OSError, ValueError, LookupError, ImportError) as error:
        raise CliError(f"--model {file}: cannot be read as GGUF: {reason_of(error)}.") from None
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)  # or it could be neither trained nor saved
    return model, tokenizer
