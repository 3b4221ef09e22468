"""Configurations of transformers with their sizes cut down, whatever their fields are called."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# The largest value of a number, by the first expression that matches the name of its field.
LIMITS = (
    (r"n_group|topk_group|num_expert_group", 1),
    (r"num_channels|in_channels|type_vocab_size|num_labels|.*(kernel|stride|scale|ratio|factor|groups?).*|.*_idx", math.inf),
    (r"window_size", 4),
    (r".*(window|index_topk|chunk_size|_block_size|block_size|local_attention|radius)", 8),
    (r".*vocab.*|num_embeddings|codebook_size|.*_buckets|num_codevectors_per_group", 128),
    (r".*(experts_per_tok|topk|top_k|moe_k|shared_experts?)", 2),
    (r".*experts?(_num)?", 4),
    (r"qk_(rope|nope)_head_dim|rotary_dim", 8),
    (r".*(head_dim|dim_head|d_kv|d_head|head_size|kv_channels)", 16),
    (r".*(kv_heads|key_value_heads)", 2),
    (r"mamba_(n|num)_heads", 8),
    (r".*(heads|n_head)", 4),
    (r".*(layers|n_layers?|depth|num_blocks|repeats)|n_layer", 2),
    (r"moe_.*intermediate_size|.*experts?_.*size", 48),
    (r".*(intermediate_size|ffn_dim|mlp_dim|d_ff|ff_dim|d_inner|linear_units|feedforward_dim|ffn_hidden_size|dff|dim_ff)", 96),
    (r".*_rank|.*(state_size|d_state)", 8),
    (
        r"patch_size|.*mel_bins|model_in_dim|mel_dim|num_frames|temporal_patch_size|image_size|.*sample_rate|sampling_rate",
        math.inf,
    ),
    (r".*(positions?|position_embeddings|n_ctx|max_seq_len|max_length|length)", 128),
    (r"mm_tokens_per_image|vision_soft_tokens_per_image|n_tokens_per_image", 4),
    (r".*(queries|query_tokens|proposals|latents|bins|codebooks|points)", 16),
    (r".*(size|per_layer_input|dim|dims|channels|d_model|n_embd|width|hidden|units)", 64),
)
WIDTHS = r"(?!stage_|stem_)(.*_)?(hidden_sizes|dims?|channels|channel_list|embed_dims?|embed_dim_per_stage|embed_dims)|tdnn_dim"
DEPTHS = r".*(depths?|blocks_per_stage|block_repeats|num_blocks|numb_of_layers|block_sizes|attn_blocks)"
NUMBERS = r".*(index|indexes|indices|idxs|_layers|_ids)"
TOKENS = r".*(token_id|token_index|_start_id|_end_id|_bos_id|_eos_id|_pad_id|eos_token_id|image_patch_id|im_newline_id)"


MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
HEAD = {"head_dim": 16}

# What an architecture needs beside that.
NEEDED = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "glm4v_moe_text": {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"index_topk": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "wav2vec2-bert": {"vocab_size": 64},
    "wav2vec2-conformer": {"vocab_size": 64},
    **{name: MROPE for name in ("glm4v_text", "glm_ocr_text", "glm_image_text")},
    **{name: MROPE for name in ("qwen2_vl_text", "qwen2_5_vl_text")},
    **{name: HEAD for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")},
}


def small_config(config_class: type) -> Any:
    """The configuration with every size cut down."""
    return Shrinking(LIMITS).of(config_class())


def partial_config(config_class: type) -> Any:
    """The configuration with fewer layers and a small vocabulary, and widths as they are."""
    kept = [(pattern, limit) for pattern, limit in LIMITS if re.search("vocab|layers|experts|positions", pattern)]
    return Shrinking(kept).of(config_class())


class Shrinking:
    """Makes configurations anew with smaller sizes; the ids of special tokens stay distinct.

    Args:
        limits: the largest value of a number, by expressions for names; with all of them widths are cut, too.
    """

    def __init__(self, limits: Sequence[tuple[str, float]]) -> None:
        self.limits, self.widths = limits, limits is LIMITS
        self.tokens: dict[int, int] = {}

    def of(self, config: Any) -> Any:
        """A configuration of the same class, made anew from smaller values."""
        own, plain = vars(config), vars(type(config)())
        layers = layers_to_keep(own)
        known = {field.name for field in dataclasses.fields(config)} | {"image_size"}
        fields: dict[str, Any] = {}
        for name, value in own.items():
            if name in known and is_config(value):
                fields[name] = self.of(value)
            elif name in known and name[0] != "_":
                smaller = self.field(name, own, layers)
                if smaller != plain.get(name):
                    fields[name] = smaller  # all else follows from these
        return type(config)(**fields | NEEDED.get(config.model_type, {}))

    def field(self, name: str, own: Mapping[str, Any], layers: Sequence[int]) -> Any:
        """The smaller value of one field, which may depend on others."""
        value = own[name]
        if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            return self.rope(value, own)
        if is_per_layer(name, own) and layers:
            return [self.value(name, value[number]) for number in layers]
        if name == "num_hidden_layers" and layers:
            return len(layers)
        if name == "num_key_value_heads" and value == own.get("num_attention_heads"):
            return self.value("num_attention_heads", value)
        if name == "embed_dim" and isinstance(own.get("num_heads"), (list, tuple)) and isinstance(value, int) and self.widths:
            return 8 * own["num_heads"][0]
        if name == "image_size" and isinstance(value, int) and self.widths:
            patch = own.get("patch_size")
            return min(value, 4 * patch if isinstance(patch, int) and patch >= 8 else 64)
        return self.value(name, value)

    def value(self, name: str, value: Any) -> Any:
        """The smaller value of a number or of a list of numbers; all else as it is."""
        if isinstance(value, int) and not isinstance(value, bool):
            return self.token(value) if re.fullmatch(TOKENS, name) else min(value, self.limit(name))
        if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            return type(value)(self.numbers(name, value))
        return value

    def numbers(self, name: str, values: Sequence[int]) -> Sequence[int]:
        """Smaller numbers: ids, depths of stages, numbers of layers, or widths."""
        if re.fullmatch(TOKENS + "s?", name):
            return [self.token(value) for value in values]
        if re.fullmatch(DEPTHS, name):
            return [min(value, 2) for value in values]
        if re.fullmatch(NUMBERS, name):
            return sorted({min(value, 1) for value in values})
        if self.widths and name in ("conv_dim", "image_size"):
            return [min(value, 32 if name == "conv_dim" else 64) for value in values]
        if self.widths and re.fullmatch(WIDTHS, name) and min(values) >= 32:
            return [max(8, value // 4) for value in values]
        return values

    def limit(self, name: str) -> float:
        return next((limit for pattern, limit in self.limits if re.fullmatch(pattern, name)), math.inf)

    def token(self, value: int) -> int:
        """Ids that are small stay; others come after them, in the order of their first use."""
        return value if value < 100 else self.tokens.setdefault(value, 100 + len(self.tokens))

    def rope(self, value: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Sections of a head's rotation that fit into the smaller head."""
        sections = value.get("mrope_section")
        if not self.widths or not sections:
            return {key: (self.rope(item, own) if isinstance(item, dict) else item) for key, item in value.items()}
        latent = own.get("qk_rope_head_dim")
        head = latent or own.get("head_dim") or own["hidden_size"] // own["num_attention_heads"]
        total = sum(sections) * (8 if latent else 16) // head
        shares = [max(1, total * part // sum(sections)) for part in sections]
        shares[0] += total - sum(shares)
        return value | {"mrope_section": shares}


def is_config(value: Any) -> bool:
    """Whether a field holds a configuration of a part."""
    return hasattr(value, "model_type") and hasattr(value, "to_dict")


def is_per_layer(name: str, own: Mapping[str, Any]) -> bool:
    """Whether a field has one item for each layer."""
    value = own[name]
    return isinstance(value, (list, tuple)) and name[0] != "_" and len(value) == own.get("num_hidden_layers")


def layers_to_keep(own: Mapping[str, Any]) -> list[int]:
    """The numbers of the layers to keep: one of each kind, where lists say of what kind each is; else none."""
    lists = [own[name] for name in own if is_per_layer(name, own)]
    if not lists or len(lists[0]) < 2:
        return []
    kinds = [repr(kind) for kind in zip(*lists, strict=True)]
    first = [number for number, kind in enumerate(kinds) if kinds.index(kind) == number]
    others = [number for number in range(len(kinds)) if number not in first]
    return sorted((first + others)[: max(2, min(8, len(first)))])
