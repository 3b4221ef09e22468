"""LoRA of columns and PaCA adapters as adapters of sprand, and the LoRA that cannot be one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sprand
from columns_as_lora import PREFIX, assert_equal, merged, own, trained
from peft_models import llama, logits, peft, train
from sprand.peft import export_adapter, import_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

DTYPES = [torch.float32, torch.bfloat16]


def lora_of_columns(model: nn.Module, **fields) -> peft.PeftModel:
    """A LoRA of stock PEFT whose `lora_A` chooses inputs, as someone may have frozen it."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"]} | fields))
    torch.manual_seed(1)
    for name, p in wrapped.named_parameters():
        if "lora_A" in name:
            p.data.zero_()
            p.data[torch.arange(len(p)), torch.randperm(p.shape[1])[: len(p)]] = 1
        elif "lora_B" in name:
            p.data.normal_(0, 0.05)
    return wrapped.eval()


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 4},
        {"lora_alpha": 7},
        {"lora_alpha": 16, "use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    ],
    ids=["scale of 1", "another scale", "rsLoRA", "patterns"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lora_of_columns_is_imported_exactly(tmp_path, dtype, fields):
    stock = lora_of_columns(llama().to(dtype), **fields)
    stock.save_pretrained(tmp_path)
    ours = import_adapter(llama().to(dtype), tmp_path)
    assert_equal(own(ours), dict(stock.merge_and_unload().state_dict()))


def test_a_padded_lora_with_modules_trained_in_full_comes_back(tmp_path):
    model = trained(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "lora", llama(), to="lora", one_rank=True)
    ours = import_adapter(llama(), tmp_path / "lora")
    assert torch.equal(logits(ours), logits(model))
    losses = train(ours.train(), sprand.SparseAdamW(ours, lr=1e-2), 3)
    assert losses[-1] < losses[0]


def test_another_lora_is_refused(tmp_path):
    def refused(why: str, **fields) -> None:
        lora_of_columns(llama(), **fields).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=why):
            import_adapter(llama(), tmp_path)

    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"q_proj mixes inputs \(32 of them in one row of lora_A\).*model.merge_and_unload"):
        import_adapter(llama(), tmp_path / "dense")
    refused(r"changes more than the product of its factors \(use_dora\)", use_dora=True)
    refused(r"changes more than the product of its factors \(bias\)", bias="all")
    lora_of_columns(llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: value[:3] if "lora_A" in name else value for name, value in tensors.items()}, file)
    with pytest.raises(ValueError, match="is damaged: expected two factors of one rank"):
        import_adapter(llama(), tmp_path)
    save_file({name: value[:, :9].contiguous() if "lora_A" in name else value for name, value in tensors.items()}, file)
    with pytest.raises(ValueError, match="was made for another model"):
        import_adapter(llama(), tmp_path)


def paca(folder: Path, model: nn.Module, alpha: int = 4, **settings) -> dict[str, torch.Tensor]:
    """A folder as PEFT's PaCA writes it, and the weights that it makes of a model by its formula."""
    torch.manual_seed(2)
    tensors, expected = {}, dict(model.state_dict())
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            delta, chosen = 0.05 * torch.randn(module.out_features, 4), torch.randperm(module.in_features)[:4].sort().values
            tensors |= {f"{PREFIX}{name}.paca_delta": delta, f"{PREFIX}{name}.paca_indices": chosen}
            weight = expected[f"{name}.weight"] = module.weight.detach().clone()
            weight[:, chosen] = (weight[:, chosen].float() + alpha / 4 * delta).to(weight.dtype)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "PACA", "r": 4, "paca_alpha": alpha, "target_modules": ["q_proj", "down_proj"], "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(said | settings))
    return expected


@pytest.mark.parametrize("alpha", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_paca_adapter_is_imported_exactly(tmp_path, dtype, alpha):
    expected = paca(tmp_path, llama().to(dtype), alpha)
    ours = import_adapter(llama().to(dtype), tmp_path)
    ours.save_pretrained(tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "lora", llama().to(dtype), to="lora")
    assert_equal(own(ours), expected)
    assert_equal(merged(tmp_path / "lora", dtype), expected)


def test_a_damaged_paca_adapter_is_refused(tmp_path):
    paca(tmp_path, llama(), r=5)
    with pytest.raises(ValueError, match="is damaged: expected 5 columns of 32 values for model.layers.0.mlp.down_proj.weight"):
        import_adapter(llama(), tmp_path)
    paca(tmp_path, llama())
    with pytest.raises(ValueError, match="expected columns below 24; the adapter is for another model"):
        import_adapter(llama(intermediate_size=24), tmp_path)
