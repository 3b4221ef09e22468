"""The inputs that `sprand plan` says are kept for backward, beside those that autograd keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sprand
from peft_models import llama, peft
from saved_tensors import kept, own
from sprand.checkpoint.plan import Weight, plan

transformers = pytest.importorskip("transformers", reason="the models are of transformers")

CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}
TOKENS, RANK, DENSITY = (2, 12), 4, 0.1


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    config = transformers.BertConfig(**sizes, attn_implementation="eager")
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return transformers.GPT2Model(transformers.GPT2Config(**sizes, attn_implementation="eager")).eval()


MODELS = {"llama": lambda: llama(attn_implementation="eager"), "bert": bert, "gpt2": gpt2}


def saved(model: nn.Module) -> int:
    """Bytes that a forward keeps beside the weights, from embeddings that need a gradient on."""
    dtype = next(model.parameters()).dtype
    embedded = torch.randn(*TOKENS, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    return sum(kept(lambda: model(inputs_embeds=embedded)[0], *own(model), embedded).values())


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_counts_the_inputs_that_autograd_keeps(name, dtype):
    make = lambda: MODELS[name]().to(dtype).requires_grad_(False)  # noqa: E731
    weights = [Weight(called, tuple(p.shape), CODES[dtype]) for called, p in make().named_parameters()]
    frozen = saved(make())

    def planned(layout: str) -> dict[str, int]:
        needs = plan(weights, densities=[DENSITY], ranks=[RANK], tokens=TOKENS[0] * TOKENS[1], layout=layout)
        return {need.method.split()[0]: need.inputs for need in needs}

    for layout in ("unstructured", "columns"):
        model = sprand.apply(make(), density=DENSITY, layout=layout)
        assert saved(model) - frozen == planned(layout)["sprand"], layout
    config = peft.LoraConfig(r=RANK, target_modules="all-linear")
    assert saved(peft.get_peft_model(make(), config)) - frozen == planned("columns")["LoRA"]
    assert planned("columns")["sprand"] < planned("unstructured")["sprand"] / 3
