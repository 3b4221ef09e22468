"""Trains 2 % of the entries of a model whose base is stored in 4 bits (NF4), through PEFT, with a plain loop."""

import tempfile

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sprand
from sprand.peft import SprandConfig


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=128
    )
    return LlamaForCausalLM(config).bfloat16()


def in_4_bits(model: nn.Module) -> nn.Module:
    """What `from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_4bit=True))` does to a checkpoint."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            packed.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, packed.to("cpu"))
    return model


model = get_peft_model(in_4_bits(tiny_llama()), SprandConfig(density=0.02, seed=0))
model.print_trainable_parameters()
optimizer = sprand.SparseAdamW(model, lr=1e-2)
tokens = torch.randint(0, 64, (2, 16))
for step in range(20):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    merged = PeftModel.from_pretrained(tiny_llama(), folder).merge_and_unload()  # into the 16-bit base, never into 4 bits
with torch.no_grad():
    print(f"merged into 16 bits: loss {merged(input_ids=tokens, labels=tokens).loss.item():.3f}")
