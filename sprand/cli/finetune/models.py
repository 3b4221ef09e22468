"""Loads the model and tokenizer that a run starts from, from a directory or the Hub, and picks the device they go to."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sprand

from ...checkpoint.shards import Checkpoint, open_checkpoint
from ...kernels.dtypes import dtype_name
from ...selection.targets import new_layers, view_of
from .. import CliError, ranks, require
from ..files import reason_of

NO_LIMIT = 10**9
LEARNED_POSITIONS = ("position_embeddings", "embed_positions", "wpe")
HEADS = ("pooled_classifier", "classifier", "score", "classification_head")


class MeanPoolClassifier(nn.Module):
    """A sentence encoder with a linear head over the mean of its token vectors, as sentence embedding models are trained.

    `sprand merge` writes it into the encoder's checkpoint, from which `load` makes it again. The head has a name that no class
    of transformers has: one that pools otherwise would take it for its own.

    Args:
        encoder: a Hugging Face model that returns `last_hidden_state`.
        num_labels: number of classes.
    """

    def __init__(self, encoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        self.pooled_classifier = nn.Linear(encoder.config.hidden_size, num_labels)
        nn.init.normal_(self.pooled_classifier.weight, std=0.02)
        nn.init.zeros_(self.pooled_classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Logits [rows, num_labels] in float32, of token ids and mask [rows, tokens]."""
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        hidden = encoded.last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        tokens = weights.sum(1).clamp(min=1)
        pooled = (hidden * weights).sum(1) / tokens
        logits = self.pooled_classifier(pooled.to(self.pooled_classifier.weight.dtype))
        return logits.float()


def load(
    name: str, task: str, num_labels: int, dtype: str, pooling: str, seed: int, bits: int | None = None, device: Any = None
) -> tuple[nn.Module, Any]:
    """The model, a new head of seeded random weights included, and its tokenizer, whose `model_max_length` is that of the model.

    Args:
        name: a directory in the Hugging Face layout, or the name of a model on the Hub.
        task: "classification", "multi-label", "regression" or "causal-lm".
        num_labels: number of classes; none for a number.
        dtype: of the pre-trained weights, such as "bfloat16"; or "auto": as they are stored, but float16, whose gradients vanish
            unless the loss is scaled, as float32. A new head is float32 always.
        pooling: "mean", "model" (what the architecture does itself), or "auto": mean where the model says it was trained so.
        seed: of the new head.
        bits: 4 packs the weights of linear layers to NF4 by bitsandbytes, 8 to int8; they are computed in the dtype.
        device: where the model goes; by default it stays where it was loaded.

    Raises:
        CliError: There is no such model, it lacks what the task needs, or bitsandbytes is missing.
    """
    transformers = require("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    require("transformers.integrations.deepspeed").unset_hf_deepspeed_config()  # ZeRO-3 shards what trains, not each model loaded
    is_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise CliError(f"--model: no directory {name}; expected one in the Hugging Face layout, or a name on the Hub.")
    torch.manual_seed(seed)
    options = {"dtype": getattr(torch, (stored_dtype(name) if dtype == "auto" else dtype) or "", "auto")}
    if bits:
        options |= _packed(bits, options["dtype"], device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if task == "causal-lm":
            _prove_causal(transformers, name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
        elif pooling == "mean" or (pooling == "auto" and _is_mean_pooled(name)):
            model = MeanPoolClassifier(_encoder(transformers, name, options), max(1, num_labels))
        else:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=max(1, num_labels), ignore_mismatched_sizes=True, **options
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        place = "in that directory" if Path(name).is_dir() else "here or on the Hub (offline?)"
        raise CliError(f"--model {name}: no model for {task} could be loaded {place}: {reason_of(error)}.") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = positions_of(model)
    if dtype == "auto" and dtype_of(model) == "float16" and not is_packed(model):
        model.float()
    if task != "causal-lm":
        _widen_heads(model, _stored(name))
    return model if device is None or is_packed(model) else model.to(device), tokenizer


def _packed(bits: int, dtype: Any, device: Any) -> dict[str, Any]:
    """What transformers is told to pack weights by bitsandbytes; heads that start anew stay as they are."""
    require("bitsandbytes")
    dtype = torch.bfloat16 if dtype in ("auto", torch.float16) else dtype
    kinds = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}, 8: {"load_in_8bit": True}}
    config = require("transformers").BitsAndBytesConfig(**kinds[bits], llm_int8_skip_modules=["lm_head", *HEADS])
    return {"dtype": dtype, "quantization_config": config, "device_map": {"": device or "cpu"}}


def is_packed(model: nn.Module) -> bool:
    """Whether a model, or the one in its wrapper, has weights that are stored packed."""
    return any(getattr(module, "is_quantized", False) for module in (model, getattr(model, "encoder", None)))


def attached(model: nn.Module, adapter: Path) -> nn.Module:
    """A model with an adapter: the model itself, or where its weights are packed a PEFT model around it.

    Raises:
        ValueError: The adapter is of another model.
        FileNotFoundError: There is none.
    """
    if is_packed(model):
        require("sprand.peft")  # knows the form
        return require("peft").PeftModel.from_pretrained(model, adapter)
    sprand.load(model, adapter)
    return model


def dtype_of(model: nn.Module) -> str:
    """The dtype of a model's pre-trained weights, of which its first parameter is one."""
    return dtype_name(next(model.parameters()).dtype)


def stored_dtype(name: str | Path) -> str | None:
    """The dtype of most weights in the safetensors files of a folder; None where there are none, or they are packed."""
    stored = _stored(name)
    sizes: Counter[torch.dtype | None] = Counter()
    for tensor in stored.tensors.values() if stored else ():
        sizes[tensor.dtype] += tensor.end - tensor.begin
    dtype = max(sizes, key=sizes.get, default=None)
    return dtype_name(dtype) if dtype is not None and dtype.is_floating_point else None


def _stored(name: str | Path) -> Checkpoint | None:
    """The safetensors files of a folder, or of a model of the Hub that is here; None where there are none."""
    try:
        config = require("transformers.utils").cached_file(str(name), "config.json")
        return open_checkpoint(Path(config).parent) if config else None
    except (OSError, ValueError):
        return None


def _widen_heads(model: nn.Module, stored: Checkpoint | None) -> None:
    """Let heads that are not stored in 16 bits be float32, as training in full needs, with the values that are stored of them."""
    tensors = stored.tensors if stored else {}
    for head in head_names(model):
        module = model.get_submodule(head)
        parameters = {f"{head}.{name}": p for name, p in module.named_parameters()}
        if any(name in tensors and tensors[name].dtype != torch.float32 for name in parameters):
            continue
        module.float().register_forward_pre_hook(_as_weights)
        for name, p in parameters.items():
            if name in tensors and tensors[name].shape == tuple(p.shape):
                p.data.copy_(stored.read(name).view_as(p))


def _as_weights(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of a head in the dtype of its weights."""
    return tuple(value.to(next(module.parameters()).dtype) for value in inputs)


def positions_of(model: nn.Module) -> int:
    """How many tokens a row may have, by the configuration and by the table of learned positions; a huge number for no limit."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(LEARNED_POSITIONS):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            limits.append(module.num_embeddings - reserved)
    return min(limits)


def say_labels(model: nn.Module, labels: Sequence[str], task: str) -> None:
    """Write the names of classes into a model's configuration, from where they go into the checkpoint that it is merged into."""
    if task == "regression":
        model.config.problem_type = task
    if labels:
        model.config.id2label, model.config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
        model.config.problem_type = f"{'multi' if task == 'multi-label' else 'single'}_label_classification"


def task_of(name: str) -> str:
    """What a model was made for, by its configuration: "causal-lm", or else "classification".

    Raises:
        CliError: There is no such model.
    """
    return "causal-lm" if _generates(_config(name)) else "classification"


def use_of(name: str) -> tuple[str, tuple[str, ...]]:
    """What a model can do as it is: "causal-lm", "regression", or "classification" or "multi-label" and the names of its classes.

    Raises:
        CliError: There is no such model, or it can do neither.
    """
    config = _config(name)
    if _generates(config):
        return "causal-lm", ()
    classes = [kind for kind in config.architectures or () if kind.endswith("ForSequenceClassification")]
    if not classes and not _is_merged(config):
        made = ", ".join(config.architectures or ["no class"])
        raise CliError(f"{name}: expected a language model or a text classifier, its config.json says {made}.")
    if config.problem_type == "regression":
        return "regression", ()
    task = "multi-label" if config.problem_type == "multi_label_classification" else "classification"
    return task, tuple(str(config.id2label[i]) for i in range(config.num_labels))


def pick_device(name: str) -> torch.device:
    """The device of an option: "auto" takes a GPU if there is one, of several processes each its own.

    Raises:
        CliError: This torch does not have the device.
    """
    if name == "auto":
        return torch.device("cuda", ranks.gpu()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CliError(f"--device {name}: {str(error).splitlines()[0]}.") from None
    return device


def head_names(model: nn.Module) -> list[str]:
    """The modules that start from random weights, and so train in full under every method: a head, and what is new below it."""
    heads = [name for name, _ in model.named_children() if name in HEADS]
    return heads + [name for name in new_layers(view_of(model)) if name.partition(".")[0] not in heads]


def beside_text(model: nn.Module) -> str | None:
    """A pattern of the modules that no text goes through, a tower for pictures or sounds; None where all are of text."""
    config = getattr(model, "config", None)
    if not hasattr(model, "get_decoder") or config.get_text_config() is config:
        return None
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return rf"(?!{re.escape(name)}\.).*" if name else None


def fused_experts(model: nn.Module) -> list[str]:
    """What `--target-parameters` may name of the experts of a model that holds those of a layer in one tensor."""
    names = [name.split(".")[-2:] for name, p in model.named_parameters() if p.dim() == 3]
    return sorted({".".join(name) for name in names if name[0] == "experts"})


def _prove_causal(transformers: Any, name: str) -> None:
    """Refuse an encoder, which sees the words that it is asked to predict, and one with a decoder, whose text is another.

    Raises:
        CliError: The model is one.
    """
    config = transformers.AutoConfig.from_pretrained(name)
    auto = transformers.models.auto.modeling_auto
    if config.is_encoder_decoder and config.model_type not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CliError(
            f"--model {name}: this model ({config.model_type}) has an encoder and a decoder; expected one that goes on with a "
            "text, such as Llama or Qwen."
        )
    is_masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if is_masked and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False)):
        raise CliError(
            f"--model {name}: this is an encoder ({config.model_type}), which sees the words that it would learn to predict. "
            "Take a model that generates text, or data with labels (--task classification)."
        )


def _encoder(transformers: Any, name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return transformers.AutoModel.from_pretrained(name, add_pooling_layer=False, **options)
    except TypeError:
        return transformers.AutoModel.from_pretrained(name, **options)


def _config(name: str) -> Any:
    try:
        return require("transformers").AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise CliError(f"{name}: no configuration of a model could be loaded: {reason_of(error)}.") from None


def _generates(config: Any) -> bool:
    known = require("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    made = {*(config.architectures or ())}
    return known.get(config.model_type) in made or any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in made)


def _is_merged(config: Any) -> bool:
    return MeanPoolClassifier.__name__ in (config.architectures or ())


def _is_mean_pooled(name: str) -> bool:
    """Whether a directory or Hub model carries the pooling of a sentence embedding model, and it is the mean, or is merged."""
    if _is_merged(require("transformers").AutoConfig.from_pretrained(name)):
        return True
    file = Path(name) / "1_Pooling" / "config.json"
    if not Path(name).is_dir():
        from transformers.utils import cached_file

        cached = cached_file(name, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
        file = Path(cached) if cached else file
    return file.is_file() and bool(json.loads(file.read_text()).get("pooling_mode_mean_tokens"))
