"""Whole columns through PEFT's door: several adapters, Hugging Face's `Conv1D`, and a base of four bits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sprand
from models import MLP, built, points_and_labels
from saved_tensors import columns_in, kept, masks, own

FEATURES = torch.tensor([0, 3, 4, 11, 19])
OUT, IN = 12, 20


def wrapped(dtype: torch.dtype = torch.float32, **features: Tensor) -> nn.Module:
    """The model through PEFT's door, an adapter for each keyword: the features of its first layer."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig

    model = None
    for name, at in features.items():
        base = built(MLP).to(dtype)
        mask = sprand.select(base, strategy=masks(base, {"first.weight": at}))
        if model is None:
            model = peft.get_peft_model(base, SprandConfig(mask=mask), adapter_name=name)
        else:
            model.add_adapter(name, SprandConfig(mask=mask))
    return model


ONE, TWO = torch.tensor([1, 7, 15]), torch.tensor([0, 7])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("active", [["one"], ["two"], ["one", "two"]])
def test_adapters_of_peft_keep_the_features_of_their_union(active, compiled):
    torch.compiler.reset()
    model = wrapped(torch.float64, one=ONE, two=TWO)
    model.base_model.set_adapter(active)
    generator = torch.Generator().manual_seed(1)
    features = {"one": ONE, "two": TWO}
    deltas = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(deltas) == len(active)
    for p in deltas.values():
        p.data.normal_(0, 0.1, generator=generator)
    called = torch.compile(model, fullgraph=True) if compiled else model
    x, y = points_and_labels(dtype=torch.float64)
    x.requires_grad_(True)
    union = torch.cat([features[name] for name in active]).unique()
    called(x)
    sizes = [sorted(shape) for shape in kept(lambda: called(x), *own(model))]
    assert sorted((32, len(union))) in sizes and [16, 32] not in sizes

    dense = built(MLP).double()
    weight, changes = dense.first.weight.detach(), []
    for name, p in zip(active, deltas.values(), strict=True):
        changes.append(p.detach().clone().requires_grad_(True))
        weight = weight.index_add(1, features[name], changes[-1].view(24, -1))
    loss = F.cross_entropy(torch.func.functional_call(dense, {"first.weight": weight}, x), y)
    wanted = torch.autograd.grad(loss, [*changes, x])
    got = torch.autograd.grad(F.cross_entropy(called(x), y), [*deltas.values(), x])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.compiler.reset()


@pytest.mark.parametrize("door", ["apply", "peft"])
def test_conv1d_of_hugging_face_keeps_the_features_of_its_rows(door):
    transformers = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    torch.manual_seed(0)
    layer = transformers.Conv1D(OUT, IN).double()  # its weight is [in, out]
    dense = copy.deepcopy(layer)
    model = nn.Sequential(layer, nn.Tanh())
    mask = {"0.weight": columns_in((IN, OUT), FEATURES, transposed=True)}
    if door == "apply":
        model = sprand.apply(model, strategy=mask)
        (delta,) = sprand.parameters(model)
    else:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        from sprand.peft import SprandConfig

        model = peft.get_peft_model(model, SprandConfig(mask=sprand.select(model, strategy=mask)))
        (delta,) = (p for p in model.parameters() if p.requires_grad)
    x = torch.randn(2, 9, IN, dtype=torch.float64, requires_grad=True)
    sizes = kept(lambda: model(x), *own(model))
    assert any(shape[-1] == len(FEATURES) for shape in sizes) and not any(shape[-1] == IN for shape in sizes)
    (got,) = torch.autograd.grad(model(x).square().sum(), delta)
    (wanted,) = torch.autograd.grad(torch.tanh(dense(x)).square().sum(), dense.weight)
    torch.testing.assert_close(got, wanted[FEATURES].flatten(), rtol=1e-12, atol=1e-12)


def test_an_nf4_base_keeps_the_features_alone():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes quantizes the base")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 128, bias=True, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(torch.randn(128, 64), requires_grad=False, quant_type="nf4", blocksize=64)
    model = nn.Sequential(layer.to("cpu"), nn.Tanh())
    plain = nn.Sequential(nn.Linear(64, 128), nn.Tanh())
    features = torch.tensor([3, 60])
    mask = sprand.select(plain, strategy={"0.weight": columns_in((128, 64), features)})
    model = peft.get_peft_model(model, SprandConfig(mask=mask))
    (delta,) = (p for p in model.parameters() if p.requires_grad)
    delta.data.normal_(0, 0.1)
    x = torch.randn(2, 20, 64, requires_grad=True)
    sizes = kept(lambda: model(x), *own(model))
    assert (2, 20, 2) in sizes and not any(shape[-1] == 64 for shape in sizes)
    got = torch.autograd.grad(model(x).square().sum(), [delta, x])
    dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    change = delta.detach().double().requires_grad_(True)
    given = x.detach().double().requires_grad_(True)
    weight = dense.index_add(1, features, change.view(128, 2))
    wanted = torch.autograd.grad(torch.tanh(F.linear(given, weight, layer.bias.double())).square().sum(), [change, given])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
