"""Quantized bases through PEFT: bitsandbytes NF4 and int8, and formats that can only be used as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sprand
from models import MLP, assert_same_bits, built
from peft_models import deltas, llama, logits, peft, positions, train, trainable
from sprand.peft import SprandConfig, export_adapter
from sprand.peft.quantized import QuantizedLayer
from sprand.serving import DeltaSync

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes quantizes the base")
FORMATS = ["nf4", "int8"]
WIDTH, INNER = 64, 128  # whole blocks of NF4 in every row, as bitsandbytes needs to pack them for a CPU


def dense_llama() -> nn.Module:
    return llama(hidden_size=WIDTH, intermediate_size=INNER).bfloat16()


def quantized(kind: str, nested: bool = True) -> nn.Module:
    """The tiny Llama with its linear layers quantized, the output head left alone."""
    model = dense_llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            if kind == "nf4":
                new = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
                )
                new.weight = bnb.nn.Params4bit(
                    module.weight.data, requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics=nested
                )
            else:
                new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new.to("cpu"))
    return model.eval()


def packed(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_floating_point()}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantized_base_trains_and_its_packed_weights_stay(kind):
    base = quantized(kind)
    before = packed(base)
    model = peft.get_peft_model(base, SprandConfig(density=0.1))
    assert any(isinstance(module, QuantizedLayer) for module in model.modules())
    losses = train(model, sprand.SparseAdamW(model, lr=1e-2), 6)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    reference = peft.get_peft_model(quantized(kind), SprandConfig(density=0.1))
    assert train(reference, torch.optim.AdamW(trainable(reference), lr=1e-2, fused=True), 6) == losses
    after = {name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in packed(model).items()}
    assert before and all(torch.equal(after[name], p) for name, p in before.items())


def plain_logits(model: nn.Module) -> torch.Tensor:
    """What bitsandbytes computes from the weights as they are stored: in training it packs none for the CPU."""
    result = logits(model.train())
    model.eval()
    return result


def test_zero_deltas_give_the_output_of_bitsandbytes():
    expected = plain_logits(quantized("nf4"))
    assert torch.equal(logits(peft.get_peft_model(quantized("nf4"), SprandConfig(density=0.1))), expected)


def layers_in_4_bits(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def with_rounded_scales(model: nn.Module) -> nn.Module:
    """What packing for a CPU leaves of the values: the scales of all blocks in bfloat16."""
    for layer in layers_in_4_bits(model):
        state = layer.weight.quant_state
        if state.nested:
            state.absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
            state.nested = False
        state.absmax = state.absmax.bfloat16().float()
    return model


@pytest.mark.parametrize("nested", [False, True])
def test_a_base_that_was_evaluated_before_it_is_wrapped_gives_the_output_of_its_weights(nested):
    base = quantized("nf4", nested)
    evaluated = bnb.functional.has_avx512bf16()
    before = logits(base) if evaluated else None
    for layer in layers_in_4_bits(base):
        if not evaluated:  # a CPU that packs nothing: as one does that packs
            state = layer.weight.quant_state
            layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, state)
        assert layer.weight.quant_state.packing_format_for_cpu
    model = peft.get_peft_model(base, SprandConfig(density=0.1)).eval()
    expected = plain_logits(with_rounded_scales(quantized("nf4", nested)))
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    if evaluated:
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0.02 * before.abs().max().item())
        assert torch.equal(logits(model.unload()), before)


@pytest.mark.parametrize("layout", ["unstructured", "columns"])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_gradient_is_that_of_the_dequantized_weight(kind, layout):
    model = peft.get_peft_model(quantized(kind), SprandConfig(density=0.2, target_modules=["down_proj"], layout=layout))
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    target = layer.sprand_targets["weight"]
    torch.manual_seed(0)
    delta, indices = target.deltas["default"], target.indices["default"]
    delta.data.normal_(0, 0.1)
    x = torch.randn(2, 5, INNER, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)
    out = layer(x)
    out.backward(grad)
    dense = layer.quantization_backend.get_base_weight(layer.get_base_layer()).clone()
    flat = dense.view(-1)
    flat[indices.long()] = (flat[indices.long()].float() + delta.detach()).to(dense.dtype)
    y = x.detach().requires_grad_()
    weight = dense.to(torch.bfloat16).requires_grad_()
    expected = nn.functional.linear(y, weight)
    expected.backward(grad)
    assert torch.equal(out, expected) and torch.equal(x.grad, y.grad)
    exact = (grad.reshape(-1, WIDTH).double().t() @ x.detach().reshape(-1, INNER).double()).flatten()[indices.long()]
    ours, torchs = (delta.grad.double() - exact).abs().max(), (weight.grad.flatten()[indices.long()].double() - exact).abs().max()
    assert ours <= 2 * torchs


@pytest.mark.parametrize("layout, features", [("unstructured", INNER), ("columns", round(0.1 * INNER))])
def test_what_backward_keeps_is_no_dense_weight(layout, features):
    model = peft.get_peft_model(quantized("nf4"), SprandConfig(density=0.1, target_modules=["down_proj"], layout=layout))
    layer, shapes = model.base_model.model.model.layers[0].mlp.down_proj, []
    x = torch.randn(3, INNER, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert (WIDTH, INNER) not in shapes and [shape for shape in shapes if shape[0] == 3] == [(3, features)]


@pytest.mark.parametrize("kind", FORMATS)
def test_deltas_that_others_cast_to_bfloat16_still_train(kind):
    model = peft.get_peft_model(quantized(kind), SprandConfig(density=0.1))
    for p in trainable(model):
        p.data = p.data.bfloat16()
    train(model, torch.optim.AdamW(trainable(model), lr=1e-3), 3)
    for delta in deltas(model).values():
        assert delta.dtype == torch.bfloat16 and (delta != 0).float().mean() > 0.9


def test_adapters_are_switched_disabled_and_added():
    base, model = plain_logits(quantized("nf4")), peft.get_peft_model(quantized("nf4"), SprandConfig(density=0.1, seed=1))
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 2)
    first = logits(model.eval())
    model.add_adapter("second", SprandConfig(density=0.1, seed=2))
    model.set_adapter("second")
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 2)
    second = logits(model.eval())
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(model), both)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first) and not torch.equal(first, second)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), first)


@pytest.mark.parametrize("kind", FORMATS)
def test_merging_is_refused_and_done_into_the_16_bit_base_instead(kind, tmp_path):
    model = peft.get_peft_model(quantized(kind), SprandConfig(density=0.1))
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 3)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="is quantized .*; merging would quantize it anew .* load the base model in 16 bits"):
            verb()
    trained = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(kind), tmp_path)
    assert torch.equal(logits(again), trained)
    dense = peft.PeftModel.from_pretrained(dense_llama(), tmp_path)
    assert_same_bits(positions(dense), positions(model))
    merged, base = dense.merge_and_unload(), dense_llama()
    for name, indices in positions(model).items():
        expected = base.get_parameter(name).detach().flatten().clone()
        expected[indices.long()] = (expected[indices.long()].float() + deltas(model)[name]).bfloat16()
        assert torch.equal(merged.get_parameter(name).detach().flatten(), expected)


def test_unload_gives_the_quantized_base_back():
    model = peft.get_peft_model(quantized("nf4"), SprandConfig(density=0.1)).unload()
    assert torch.equal(logits(model), logits(quantized("nf4")))
    assert type(model.model.layers[0].mlp.down_proj) is bnb.nn.Linear4bit


def test_both_doors_choose_the_same_entries_of_a_quantized_base():
    dense = sprand.apply(dense_llama(), density=0.1, seed=3)
    assert_same_bits(
        positions(peft.get_peft_model(quantized("nf4"), SprandConfig(density=0.1, seed=3))), dict(dense._sprand.current.indices)
    )


class Opaque(nn.Module):
    """A linear layer that does not show its weight, as kernels for GPTQ and AWQ do not."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.register_buffer("qweight", linear.weight.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.qweight)


@pytest.mark.parametrize("layout", ["unstructured", "columns"])
def test_a_format_that_cannot_be_dequantized_gains_a_sparse_product(monkeypatch, layout):
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    from sprand.peft import plan

    found = plan.resolve_quantization_backend
    monkeypatch.setattr(
        plan,
        "resolve_quantization_backend",
        lambda module, **kw: ForwardOnlyQuantizationBackend("gptq") if isinstance(module, Opaque) else found(module, **kw),
    )
    opaque, dense = built(MLP), built(MLP)
    opaque.second = Opaque(opaque.second)
    fields = {"density": 0.2, "target_modules": ["second"], "layout": layout}
    ours, reference = peft.get_peft_model(opaque, SprandConfig(**fields)), peft.get_peft_model(dense, SprandConfig(**fields))
    assert_same_bits(positions(ours), positions(reference))
    x = torch.randn(7, 16)
    for model in (ours, reference):
        (p,) = trainable(model)
        p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), reference(x))
    torch.testing.assert_close(trainable(ours)[0].grad, trainable(reference)[0].grad)
    assert sprand.suggest_lr(ours, rms=0.1) == sprand.suggest_lr(reference, rms=0.1)
    with pytest.raises(ValueError, match=r"expected a weight that can be read, got second.weight, packed by gptq; give rms"):
        sprand.suggest_lr(ours)
    assert sprand.visible_share(ours) == sprand.visible_share(reference) == 1
    with pytest.raises(ValueError, match="is quantized .gptq."):
        ours.merge_adapter()


def test_the_values_of_a_packed_weight_are_not_sent():
    model = peft.get_peft_model(quantized("nf4"), SprandConfig(density=0.2, target_modules=["down_proj"]))
    with pytest.raises(ValueError, match=r"down_proj.weight is stored quantized.*; train a base in 16 or 32 bits"):
        DeltaSync(model)


def test_columns_trained_over_a_quantized_base_are_a_lora_of_the_trained_values(tmp_path):
    model = peft.get_peft_model(quantized("nf4"), SprandConfig(layout="columns", density=0.05))
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    model.eval().save_pretrained(tmp_path / "ours")
    peft.save_as_lora(tmp_path / "converted", model, 1.0)
    export_adapter(tmp_path / "ours", tmp_path / "exported", quantized("nf4"), to="lora")
    for folder in ("converted", "exported"):
        stock = peft.PeftModel.from_pretrained(quantized("nf4"), tmp_path / folder)
        for name, delta in deltas(model).items():
            columns = torch.cat([b for key, b in stock.state_dict().items() if f"{name.removesuffix('weight')}lora_B" in key])
            assert torch.equal(columns.flatten(), delta)
        assert torch.allclose(logits(stock), logits(model), atol=0.02)  # the product is added in bfloat16
