"""Tiny models of transformers whose files hold other names, or other tensors, than the models themselves."""

from __future__ import annotations

import torch

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
DECODER = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def gemma3(t):
    config = t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**DECODER), vision_config=t.SiglipVisionConfig(**VISION), mm_tokens_per_image=4,
        image_token_index=5,
    )  # fmt: skip
    return t.Gemma3ForConditionalGeneration(config)


def qwen2_vl(t):
    text = DECODER | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 8}
    return t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(text_config=text, vision_config=vision))


def mixtral(t):
    return t.MixtralForCausalLM(t.MixtralConfig(num_local_experts=3, **DECODER))


def qwen3_moe(t):
    return t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=20, tie_word_embeddings=True, **DECODER)
    )


def qwen3_vl_moe(t):
    """Its experts are stored transposed."""
    text = DECODER | {
        "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8, "out_hidden_size": 16,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return t.Qwen3VLMoeForConditionalGeneration(t.Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def dinov2(t):
    """Its two projections into a gated layer are stored as one tensor."""
    return t.Dinov2Model(t.Dinov2Config(use_swiglu_ffn=True, **VISION))


def vit(t):
    return t.ViTForImageClassification(t.ViTConfig(**VISION))


def clip(t):
    text = {key: value for key, value in TEXT.items() if key != "num_hidden_layers"} | {"num_hidden_layers": 1}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


KINDS = {made.__name__: made for made in (gemma3, qwen2_vl, mixtral, qwen3_moe, qwen3_vl_moe, dinov2, vit, clip)}


def saved(kind: str, folder, t):
    """A model of one kind as transformers loads it from the files that it has just written."""
    torch.manual_seed(0)
    made = KINDS[kind](t)
    made.save_pretrained(folder)
    return type(made).from_pretrained(folder)
