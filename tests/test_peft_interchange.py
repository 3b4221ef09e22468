"""Interchange with SHiRA, Super-Tuning and peft-sparta, and those methods on sprand's kernels."""

from __future__ import annotations

import copy

import pytest
import torch

import sprand
from models import assert_same_bits
from peft_models import TOKENS, adapted, base_weights, llama, logits, peft, saved, train, trainable
from sprand.cli import main
from sprand.peft import SprandConfig, accelerate, export_adapter, import_adapter

PeftModel = peft.PeftModel
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["shira", "supertuning"]


def other(kind: str, dtype: torch.dtype = torch.float32, steps: int = 3) -> torch.nn.Module:
    """A trained adapter of stock PEFT."""
    torch.manual_seed(3)
    config = {
        "shira": peft.ShiraConfig(r=2, random_seed=1, target_modules=["q_proj", "down_proj"]),
        "supertuning": peft.SupertuningConfig(sparsity=0.9, target_modules=["q_proj", "down_proj"]),
    }[kind]
    model = peft.get_peft_model(llama().to(dtype), config)
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), steps)
    return model.eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_is_loaded_by_stock_peft_with_equal_logits(tmp_path, kind, dtype):
    model = adapted(model=llama().to(dtype), density=0.04)
    model.save_pretrained(tmp_path / "ours")
    base = llama().to(dtype)
    export_adapter(tmp_path / "ours", tmp_path / kind, base, to=kind)
    assert_same_bits(dict(base.state_dict()), dict(llama().to(dtype).state_dict()))
    stock = PeftModel.from_pretrained(base, tmp_path / kind)
    assert type(stock.base_model).__module__.startswith("peft.tuners")
    assert torch.equal(logits(stock), logits(model))
    merged = stock.merge_and_unload()
    assert torch.equal(logits(merged), logits(model))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_method_is_imported_with_equal_logits(tmp_path, kind, dtype):
    stock = other(kind, dtype)
    stock.save_pretrained(tmp_path)
    ours = import_adapter(llama().to(dtype), tmp_path)
    assert torch.equal(logits(ours), logits(stock))
    train(ours, sprand.SparseAdamW(ours, lr=1e-2), 2)
    assert not torch.equal(logits(ours.eval()), logits(stock))
    second = import_adapter(adapted(model=llama().to(dtype)), tmp_path, "second")
    assert torch.equal(logits(second), logits(stock))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_sprand_export_writes_what_stock_peft_loads(tmp_path, kind, dtype, capsys):
    llama().to(dtype).save_pretrained(tmp_path / "base")
    model = sprand.apply(llama().to(dtype), density=0.04, modules_to_save=["lm_head"])
    train(model, sprand.SparseAdamW(model, lr=1e-2))
    sprand.save(model.eval(), tmp_path / "ours")
    arguments = ["export", tmp_path / "ours", "--to", kind, "--base", tmp_path / "base", "-o", tmp_path / kind]
    assert main.run([*map(str, arguments)]) == 0
    assert f"{kind}/adapter_model.safetensors" in capsys.readouterr().out
    stock = PeftModel.from_pretrained(llama().to(dtype), tmp_path / kind)
    assert type(stock.base_model).__module__.startswith("peft.tuners")
    assert torch.equal(logits(stock), logits(model))
    assert torch.equal(logits(stock.merge_and_unload()), logits(model))


def test_sprand_export_to_peft_of_what_it_cannot_hold(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "base")
    model = sprand.apply(llama(), density=0.04, target_parameters=["embed_tokens.weight"])
    sprand.save(model, tmp_path / "embedding")
    export = lambda *more: main.run([*map(str, ["export", tmp_path / "embedding", "-o", tmp_path / "out", "--to", *more])])  # noqa: E731
    assert export("shira", "--base", tmp_path / "base") == 2
    assert "embed_tokens.weight is no weight of a plain linear layer, and shira trains nothing else" in capsys.readouterr().err
    assert export("supertuning") == 2
    assert "give the base checkpoint (--base)" in capsys.readouterr().err
    (tmp_path / "base" / "config.json").unlink()
    assert export("shira", "--base", tmp_path / "base") == 2
    assert "expected a folder of transformers, whose config.json names the architecture" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_an_adapter_of_sprand_save_is_exported_on_a_model_at_hand(tmp_path):
    model = sprand.apply(llama().bfloat16(), density=0.04, seed=5)
    train(model, sprand.SparseAdamW(model, lr=1e-2))
    sprand.save(model.eval(), tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "theirs", llama().bfloat16(), to="supertuning")
    assert torch.equal(logits(PeftModel.from_pretrained(llama().bfloat16(), tmp_path / "theirs")), logits(model))


def test_super_tuning_of_16_bit_weights_goes_where_a_change_crosses_zero(tmp_path):
    model = peft.get_peft_model(llama().bfloat16(), SprandConfig(density=0.04, target_modules=["q_proj"]))
    torch.manual_seed(0)
    for p in trainable(model):
        p.data.normal_(0, 0.05)
    model.save_pretrained(tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "theirs", llama().bfloat16(), to="supertuning")
    assert torch.equal(logits(PeftModel.from_pretrained(llama().bfloat16(), tmp_path / "theirs")), logits(model))


def test_peft_sparta_adapters_are_imported(tmp_path):
    peft_sparta = pytest.importorskip("peft_sparta", reason="it writes the adapter that is imported")
    torch.manual_seed(0)
    theirs = peft_sparta.SpaRTA(llama(), sparsity=0.95, frozen_modules=["embed_tokens", "lm_head", "self_attn.q"])
    train(theirs, torch.optim.AdamW(trainable(theirs), lr=1e-2))
    theirs.save(str(tmp_path), merged=False)
    theirs.eval()
    ours = import_adapter(llama(), tmp_path)
    assert torch.equal(logits(ours), logits(theirs.model))


def test_an_adapter_of_sprand_save_is_imported(tmp_path):
    model = sprand.apply(llama(), density=0.1, seed=2)
    train(model, sprand.SparseAdamW(model, lr=1e-2))
    sprand.save(model, tmp_path)
    assert torch.equal(logits(import_adapter(llama(), tmp_path)), logits(model))
    with pytest.raises(ValueError, match="another base"):
        import_adapter(llama(seed=4), tmp_path)


def test_modules_trained_in_full_go_both_ways(tmp_path):
    model = adapted(density=0.04, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "shira", llama(), to="shira")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "shira")), logits(model))
    assert torch.equal(logits(import_adapter(llama(), tmp_path / "shira")), logits(model))


def test_what_cannot_be_exchanged_says_why(tmp_path):
    saved(tmp_path / "embedding", target_parameters=["embed_tokens.weight"])
    with pytest.raises(ValueError, match="embed_tokens.weight is no weight of a plain linear layer"):
        export_adapter(tmp_path / "embedding", tmp_path / "out", llama(), to="shira")
    with pytest.raises(ValueError, match="to: expected one of lora, shira, supertuning, got 'dora'"):
        export_adapter(tmp_path / "embedding", tmp_path / "out", llama(), to="dora")
    saved(tmp_path / "dense", density=1.0, target_modules=["k_proj"])
    with pytest.raises(ValueError, match=r"SHiRA keeps r \(in \+ out\) entries"):
        export_adapter(tmp_path / "dense", tmp_path / "out", llama(), to="shira")
    with pytest.raises(ValueError, match="another base"):
        export_adapter(tmp_path / "dense", tmp_path / "out", llama(seed=3), to="supertuning")
    ia3 = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(llama(), ia3).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="got IA3"):
        import_adapter(llama(), tmp_path / "ia3")
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        import_adapter(llama(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a model with SHiRA or Super-Tuning layers .*, got none"):
        accelerate(llama())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_accelerated_shira_model_has_equal_outputs(dtype):
    stock = other("shira", dtype)
    fast = accelerate(copy.deepcopy(stock))
    assert torch.equal(logits(fast), logits(stock))
    with fast.disable_adapter(), stock.disable_adapter():
        assert torch.equal(logits(fast), logits(stock))
    assert torch.equal(logits(fast.merge_and_unload()), logits(stock))


@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerated_model_trains_alike_and_saves_what_stock_peft_loads(tmp_path, kind):
    stock = other(kind, steps=0)
    fast = accelerate(copy.deepcopy(stock))
    expected = train(stock, torch.optim.AdamW(trainable(stock), lr=1e-2), 5)
    assert torch.allclose(
        torch.tensor(train(fast, torch.optim.AdamW(trainable(fast), lr=1e-2), 5)), torch.tensor(expected), rtol=1e-5
    )
    fast.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(fast))
    base = base_weights(llama())
    for _ in range(3):
        fast.merge_adapter()
        fast.unmerge_adapter()
    assert_same_bits({name: value for name, value in base_weights(fast.unload()).items()}, base)
    assert type(fast.get_base_model().model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_an_accelerated_model_takes_the_fused_optimizer_and_keeps_no_dense_copy():
    shapes: dict[str, set] = {}
    for name, model in {"stock": other("shira", steps=0), "fast": accelerate(other("shira", steps=0))}.items():
        own, kept = {p.data_ptr() for p in model.parameters()}, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            model(input_ids=TOKENS, labels=TOKENS)
        shapes[name] = {tuple(sorted(t.shape)) for t in kept if t.layout == torch.strided and t.data_ptr() not in own}
    assert (32, 48) in shapes["stock"] and (32, 48) not in shapes["fast"]
    fast = accelerate(other("shira", steps=0))
    assert len(sprand.layers.module.targets_by_delta()) >= 4
    losses = train(fast, sprand.SparseAdamW(fast, lr=1e-2), 4)
    assert losses[-1] < losses[0]


def test_an_accelerated_model_switches_and_loads_adapters(tmp_path):
    first, second = other("shira"), other("shira", steps=6)
    second.save_pretrained(tmp_path)
    fast = accelerate(first)
    before = logits(fast)
    fast.load_adapter(tmp_path, "second")
    fast.set_adapter("second")
    assert torch.equal(logits(fast), logits(second))
    fast.set_adapter("default")
    assert torch.equal(logits(fast), before)
    fast.delete_adapter("second")
    assert torch.equal(logits(fast), before)


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0])
def test_a_scale_set_after_a_fused_step_is_used_by_the_next_training_forward(factor):
    fast = accelerate(other("shira"))
    train(fast, sprand.SparseAdamW(fast, lr=1e-2), 2)
    stepped = fast(input_ids=TOKENS).logits
    for layer in fast.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", factor)
    training = fast(input_ids=TOKENS).logits
    assert training.requires_grad
    assert torch.equal(training, logits(fast))
    assert not torch.equal(training, stepped)
