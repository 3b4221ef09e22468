"""Weights that are read past their module's forward train as in dense autograd, through both doors."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import sprand
from models import Tied, built
from sprand.layers.sites import sites_of
from weight_readers import (
    BOTH,
    DOORS,
    NOTHING_SAID,
    Pair,
    Read,
    ReadAndCalled,
    called_through,
    first_changed,
    prune_half,
    through_apply,
)

pytestmark = NOTHING_SAID


class Kernel(torch.autograd.Function):
    """A linear layer as fused kernels are: a function of its own, which is given the weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x if ctx.needs_input_grad[1] else None


class Fused(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return Kernel.apply(torch.tanh(Kernel.apply(x, self.a.weight)), self.b.weight) + self.b(self.a(x))


class Checkpointed(Pair):
    """What is repeated in backward reads the weights without a module being called."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.a(x)), self.b.weight) + x @ self.a.weight.t() @ self.b.weight.t()

        return checkpoint(body, x, use_reentrant=self.use_reentrant)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.randn(6, 8), torch.randn(8, 5)])
        self.dict = nn.ParameterDict({"last": torch.randn(5, 5)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.list:
            x = torch.tanh(x @ weight)
        return x @ self.dict["last"] + self.list[-1].sum() * len(self.list) * ("last" in self.dict)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x[None].expand(2, -1, -1))
        return self.attention(x, x, x, need_weights=False)[0]


def written_anew(layer: nn.Module) -> None:
    """As kernels are put in place of a layer's own."""
    layer.forward = types.MethodType(lambda self, x: Kernel.apply(x, self.weight) - self.bias, layer)


NORMED = "0.parametrizations.weight.original"
OF_ATTENTION = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
KINDS = {
    "read": (Read, [*BOTH, "a.bias"]),
    "read and called": (ReadAndCalled, [*BOTH, "b.bias"]),
    "read by a kernel": (Fused, BOTH),
    "read where a checkpoint repeats": (functools.partial(Checkpointed, False), BOTH),
    "read in a backward of its own": (functools.partial(Checkpointed, True), BOTH),
    "lists": (Listed, ["list.0", "list.1", "dict.last"]),
    "attention": (
        Attention,
        ["encoder.linear1.weight", "encoder.norm1.weight", *(f"attention.{name}" for name in OF_ATTENTION),
         *(f"encoder.self_attn.{name}" for name in OF_ATTENTION)],
    ),
    "pruned": (lambda: first_changed(prune_half), ["0.weight_orig", "2.weight"]),
    "weight_norm by a hook": (lambda: first_changed(weight_norm), ["0.weight_v", "0.weight_g", "2.weight"]),
    "spectral_norm by a hook": (lambda: first_changed(spectral_norm), ["0.weight_orig", "0.bias"]),
    "weight_norm": (lambda: first_changed(parametrizations.weight_norm), [f"{NORMED}0", f"{NORMED}1", "2.weight"]),
    "spectral_norm": (lambda: first_changed(parametrizations.spectral_norm), [NORMED, "2.weight"]),
    "orthogonal": (lambda: first_changed(parametrizations.orthogonal), [NORMED]),
    "a forward in front": (lambda: first_changed(called_through), ["0.weight", "0.bias", "2.weight"]),
    "another forward": (lambda: first_changed(written_anew), ["0.weight", "0.bias", "2.weight"]),
}  # fmt: skip


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def doubles(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


@DOORS
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_read_trains_as_in_dense_autograd(door, kind):
    make, targets = kind
    model, dense = doubles(make), doubles(make)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    adapted = door(model, targets)
    for each in (model, dense):
        each(x).square().mean().backward()
    weights, sites = dict(dense.named_parameters()), sites_of(adapted)
    assert {site.name for site in sites} == set(targets)
    for site in sites:
        entries = site.entries
        expected = weights[site.name].grad.flatten()[entries.indices.long()]
        torch.testing.assert_close(entries.delta.grad, expected, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            entries.delta.normal_()
            weights[site.name].flatten()[entries.indices.long()] = entries.base + entries.delta
    with torch.no_grad():
        trained, expected = model.eval()(x), dense.eval()(x)
        torch.testing.assert_close(trained, expected, rtol=1e-10, atol=1e-12)
        merged = sprand.merge(model) if door is through_apply else adapted.merge_and_unload()
        assert torch.equal(merged(x), trained)


SAVED = ("lists", "pruned", "weight_norm by a hook", "orthogonal", "another forward")


@DOORS
@pytest.mark.parametrize("kind", SAVED)
def test_what_is_read_is_saved_loaded_and_taken_off(door, kind, tmp_path):
    make, targets = KINDS[kind]
    model, fresh, x = doubles(make), doubles(make), torch.randn(3, 6, dtype=torch.float64)
    adapted, base = door(model, targets), fresh(x)
    for p in trained_parameters(adapted):
        p.data.normal_()
    trained = model(x)
    assert not torch.equal(trained, base)
    if door is through_apply:
        sprand.save(model, tmp_path)
        assert torch.equal(sprand.load(fresh, tmp_path)(x), trained)
        with sprand.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(sprand.unmerge(model)(x), base)
    else:
        peft = pytest.importorskip("peft")
        adapted.save_pretrained(tmp_path)
        assert torch.equal(peft.PeftModel.from_pretrained(fresh, tmp_path)(x), trained)
        with adapted.disable_adapter():
            assert torch.equal(model(x), base)
        assert torch.equal(adapted.unload()(x), base)


@DOORS
def test_deltas_given_to_a_functional_call_are_those_that_are_read(door):
    model, x = doubles(ReadAndCalled), torch.randn(3, 6, dtype=torch.float64)
    adapted = door(model, BOTH)
    given = {name: torch.randn_like(p, requires_grad=True) for name, p in adapted.named_parameters() if p.requires_grad}
    loss = functional_call(adapted, given, (x,)).square().mean()
    gradients = torch.autograd.grad(loss, list(given.values()))
    for p, value in zip(trained_parameters(adapted), given.values(), strict=True):
        p.data.copy_(value.detach())
    assert torch.equal(loss, adapted(x).square().mean())
    adapted(x).square().mean().backward()
    for p, gradient in zip(trained_parameters(adapted), gradients, strict=True):
        assert torch.equal(p.grad, gradient)


@DOORS
@pytest.mark.parametrize("make", [Read, ReadAndCalled])
def test_compiled_code_reads_as_eager_code_does(door, make):
    torch.compiler.reset()
    gradients = []
    for compiled in (False, True):
        model = doubles(make)
        adapted = door(model, BOTH)
        called = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        called(torch.ones(3, 6, dtype=torch.float64)).square().mean().backward()
        gradients.append([p.grad for p in trained_parameters(adapted)])
    torch.compiler.reset()
    for eager, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-14)


@DOORS
def test_without_gradients_a_read_sees_what_was_trained(door):
    """Also where no forward of its own ever writes it."""
    model, x = doubles(Read), torch.randn(3, 6, dtype=torch.float64)
    adapted = door(model, BOTH)
    before = model(x).detach()
    optimizer = torch.optim.SGD(trained_parameters(adapted), lr=1.0)
    model(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = model(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, model(x))


@DOORS
def test_outside_of_a_forward_a_weight_is_the_parameter_that_can_be_tied_and_replaced(door):
    model = doubles(ReadAndCalled)
    adapted = door(model, BOTH)
    weight = model.a.weight
    assert isinstance(weight, nn.Parameter) and weight is model.get_parameter(
        "a.weight" if adapted is model else "a.base_layer.weight"
    )
    assert not weight.requires_grad and weight.requires_grad_(False) is weight
    other = nn.Linear(6, 8)
    other.weight = model.a.weight
    model.a.weight.data = torch.ones_like(weight)
    assert other.weight is model.a.weight and bool((other.weight == 1).all())


def test_a_read_beside_the_own_forward_leaves_that_its_sampled_gradient():
    model = sprand.apply(built(ReadAndCalled), density=0.5)
    x = torch.randn(3, 6)
    assert type(model.a(x).grad_fn).__name__ == "_LinearBackward"
    assert type(model.a.weight) is nn.Parameter


@pytest.mark.parametrize("order", ["hooked, applied", "applied, hooked"])
def test_a_layer_with_hooks_of_accelerate_has_its_sampled_gradient_and_can_be_left(order):
    hooks = pytest.importorskip("accelerate.hooks", reason="its hooks replace the forward of a layer")
    model, x = built(ReadAndCalled), torch.randn(3, 6)
    plain = sprand.apply(copy.deepcopy(model), density=0.5)
    for step in order.split(", "):
        if step == "hooked":
            hooks.add_hook_to_module(model.a, hooks.ModelHook())
        else:
            sprand.apply(model, density=0.5)
    for each in (model, plain):
        each(x).square().sum().backward()
    assert type(model.a(x).grad_fn).__name__ == "_LinearBackward"
    assert torch.equal(model.a.sprand_delta.grad, plain.a.sprand_delta.grad)
    assert torch.equal(sprand.unmerge(model)(x), sprand.unmerge(plain)(x))
    hooks.remove_hook_from_module(model.a)
    assert torch.equal(model(x), plain(x))


def test_a_forward_that_a_tool_has_taken_from_a_layer_serves_the_merged_layer():
    model, x = sprand.apply(built(ReadAndCalled), density=0.5), torch.randn(3, 6)
    for layer in (model.a, model.b):
        called_through(layer)
    trained = model(x)
    assert torch.equal(sprand.merge(model)(x), trained)


def test_tied_weights_are_read_by_whom_ever():
    class ReadTied(Tied):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.tanh(self.mix(self.embed(tokens))) @ self.embed.weight.t()

    tokens = torch.arange(8)
    called, read = (sprand.apply(doubles(cls), density=0.5, target_modules=["embed"]) for cls in (Tied, ReadTied))
    for model in (called, read):
        model(tokens).square().sum().backward()
    torch.testing.assert_close(read.embed.sprand_delta.grad, called.embed.sprand_delta.grad, rtol=1e-12, atol=1e-14)
