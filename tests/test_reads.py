"""Weights that are read past their module's forward: they train as in dense autograd, through both doors, or it is said."""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import sprand
from models import Tied, built
from sprand.layers.sites import sites_of


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


class Pair(nn.Module):
    """Two linear layers, to be used in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)


class Read(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.a.weight, self.a.bias)), self.b.weight)


class ReadAndCalled(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) @ self.b.weight @ self.a.weight


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


def first_changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    change(model[0])
    return model.eval()  # a spectral norm moves its vectors while it trains


def called_through(layer: nn.Module) -> None:
    """As tools do that put a function in front of a layer: they keep the forward it had."""
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def written_anew(layer: nn.Module) -> None:
    """As kernels are put in place of a layer's own."""
    layer.forward = types.MethodType(lambda self, x: Kernel.apply(x, self.weight) - self.bias, layer)


def prune_half(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


BOTH = ["a.weight", "b.weight"]
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


def through_apply(model: nn.Module, targets: list[str]) -> nn.Module:
    return sprand.apply(model, target_modules=None, target_parameters=targets, density=0.5)


def through_peft(model: nn.Module, targets: list[str]) -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig

    return peft.get_peft_model(model, SprandConfig(target_modules=[], target_parameters=targets, density=0.5))


DOORS = pytest.mark.parametrize("door", [through_apply, through_peft], ids=lambda door: door.__name__)


@pytest.fixture(autouse=True)
def nothing_is_said():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sprand")
        warnings.filterwarnings("ignore", message=".*weight_norm. is deprecated")
        yield


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
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
    torch.compiler.reset()
    for eager, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-14)


@DOORS
def test_without_gradients_a_read_sees_what_was_trained(door):
    """Also where no forward of its own ever writes it."""
    model, x = doubles(Read), torch.randn(3, 6, dtype=torch.float64)
    adapted = door(model, BOTH)
    before = model(x).detach()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
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


COMPUTED = {
    "prune": (prune_half, r"from weight_orig .* target_parameters=\['0.weight_orig'\]"),
    "weight_norm by a hook": (weight_norm, "from weight_g, weight_v"),
    "weight_norm": (parametrizations.weight_norm, "from parametrizations.weight.original0, parametrizations.weight.original1"),
}


@pytest.mark.parametrize("targets", ["all-linear", r"\d", ["0"], ["0", "2"]], ids=str)
@pytest.mark.parametrize("change", COMPUTED.values(), ids=COMPUTED)
def test_both_doors_refuse_a_weight_that_is_computed_and_say_from_what(change, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig

    model = first_changed(change[0])
    flags, said = [p.requires_grad for p in model.parameters()], []
    for door in (sprand.apply, lambda model, **fields: peft.get_peft_model(model, SprandConfig(**fields))):
        with pytest.raises(ValueError, match=f"the weight of 0 .* is computed anew in every forward, {change[1]}") as refused:
            door(model, target_modules=targets, density=0.5)
        said.append(str(refused.value))
        assert [p.requires_grad for p in model.parameters()] == flags and not hasattr(model, "_sprand")
    assert said[0] == said[1]
    assert list(sprand.select(model, exclude_modules=["0"], density=0.5)) == ["2.weight"]


class Bypassed(Pair):
    """A layer whose weight is kept where nobody sees that it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.product = functools.partial(F.linear, weight=self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(torch.tanh(self.a(x)))


UNSEEN = "sprand: the first backward gave the entries of 1 of 2 weights no gradient: b.weight. Either this loss"


@DOORS
def test_the_first_backward_names_what_it_gave_no_gradient_and_says_it_once(door):
    model, x = built(Bypassed), torch.randn(3, 6)
    door(model, BOTH)
    with pytest.warns(UserWarning, match=UNSEEN):
        model(x).sum().backward()
    model(x).sum().backward()
    copy.deepcopy(model)(x).sum().backward()


def test_where_only_modules_in_full_have_gradients_that_is_said():
    model = built(Bypassed)
    sprand.apply(model, target_modules=["b"], modules_to_save=["a"], density=0.5)
    with pytest.warns(UserWarning, match="gave the entries of 1 of 1 weights no gradient: b.weight"):
        model(torch.randn(3, 6)).sum().backward()


class Held(Pair):
    """A model that keeps weights in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.a.weight, self.b.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + x @ self.weights[0].t() @ self.weights[1].t()


@DOORS
def test_weights_that_a_model_keeps_in_a_list_are_named_before_anything_trains(door):
    told = (
        r"sprand: weights that train are held beside their modules as well, a.weight in Held.weights, b.weight in Held.weights;"
    )
    with pytest.warns(UserWarning, match=told):
        door(built(Held), BOTH)


class BypassedInSegments(Bypassed):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=True)


def test_gradients_of_backwards_inside_of_another_are_looked_at_when_an_optimizer_steps():
    model, x = sprand.apply(built(BypassedInSegments), density=0.5), torch.randn(3, 6, requires_grad=True)
    optimizer = torch.optim.SGD(sprand.parameters(model), lr=0.1)
    model(x).sum().backward()
    with pytest.warns(UserWarning, match=UNSEEN):
        optimizer.step()
    optimizer.step()


@DOORS
def test_a_loss_that_reads_a_weight_outside_of_any_forward_is_told_what_it_loses(door):
    model, x = built(ReadAndCalled), torch.randn(3, 6)
    door(model, BOTH)
    loss = model(x).sum()
    with pytest.warns(UserWarning, match=r"sprand: a\.weight is read outside of any forward while its gradient is still to come"):
        loss = loss + model.a.weight.square().sum()
    with torch.no_grad():
        model.a.weight.norm()
    loss.backward()
    model.a.weight.norm()


@DOORS
def test_both_doors_refuse_torchscript_in_words(door):
    model = nn.ModuleDict({"inner": torch.jit.trace(nn.Linear(6, 8), torch.randn(2, 6))})
    with pytest.raises(ValueError, match="inner is TorchScript, whose code reads weights where no entries can train; give the"):
        door(model, ["inner.weight"])


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
