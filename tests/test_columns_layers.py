"""Whole columns of linear layers: known from the indices, dense autograd's gradient, and of inputs only theirs are kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sprand
from models import MLP, Tied, built, points_and_labels
from saved_tensors import columns_in, kept, masks, own
from sprand.kernels import ops
from sprand.layers import functional
from sprand.layers.entries import Entries
from sprand.layers.units import Pattern, Units

OUT, IN = 12, 20
FEATURES = torch.tensor([0, 3, 4, 11, 19])
KEPT = ("first.weight", "second.weight")
COLUMNS = {"first.weight": torch.tensor([1, 7, 15]), "second.weight": torch.tensor([0, 22])}


def applied(dtype: torch.dtype = torch.float32, width: int = 24) -> nn.Module:
    model = built(MLP, width=width).to(dtype)
    return sprand.apply(model, strategy=masks(model, COLUMNS))


def entries_of(weight: Tensor, features: Tensor, scale: float = 1.0, transposed: bool = False) -> Entries:
    indices = columns_in(weight.shape, features, transposed)
    delta = (0.1 * torch.randn(len(indices), dtype=ops.accumulation_dtype(weight.dtype))).requires_grad_(True)
    return Entries(delta, pattern_in(weight.shape, indices, transposed), ops.gather(weight, indices), scale)


def pattern_in(shape: tuple[int, ...], indices: Tensor, transposed: bool = False) -> Pattern:
    return Pattern.of(indices, Units.of(shape, 0 if transposed else 1))


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, entries: Entries, transposed: bool, grad: Tensor) -> list[Tensor]:
    """Gradients of x, bias and delta by dense autograd in float64."""
    x, weight, grad = x.detach().double().requires_grad_(True), weight.double(), grad.double()
    delta = entries.delta.detach().double().requires_grad_(True)
    bias = None if bias is None else bias.detach().double().requires_grad_(True)
    dense = weight.flatten().index_put((entries.indices.long(),), entries.base.double() + entries.scale * delta).view_as(weight)
    output = F.linear(x, dense.t() if transposed else dense, bias)
    return torch.autograd.grad(output, [x, delta] + ([] if bias is None else [bias]), grad)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_whole_columns_are_known_from_the_indices_and_give_them_back(index_dtype):
    for features in (FEATURES, FEATURES[:1], torch.arange(IN)):
        for shape, transposed in (((OUT, IN), False), ((IN, OUT), True)):
            indices = columns_in(shape, features, transposed).to(index_dtype)
            found = pattern_in(shape, indices, transposed)
            assert found.columns is not None and found.chosen.tolist() == features.tolist()
            assert found.nnz == len(indices) and found.indices.tolist() == indices.tolist()
            weight = torch.randn(shape)
            assert torch.equal(found.gather(weight), weight.flatten()[indices.long()])


def test_anything_else_is_no_column():
    whole = columns_in((OUT, IN), FEATURES)
    moved = whole.clone()
    moved[7] += 1  # one entry of a middle row is beside its column
    wrong = {
        "one too few": whole[:-1],
        "one beside": moved,
        "no entries": whole[:0],
        "each row its own": (torch.arange(OUT) * IN + torch.arange(OUT)).int(),
        "a row and a half": torch.arange(IN * 3 // 2 // OUT * OUT).int(),
    }
    for name, indices in wrong.items():
        found = pattern_in((OUT, IN), indices)
        assert found.columns is None and found.chosen is found.indices is indices, name
    assert pattern_in((OUT, IN), whole.to("meta")).columns is None
    assert pattern_in((1, IN), FEATURES).columns is None  # of one entry each


@pytest.mark.parametrize("scale", [1.0, -0.25])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(IN,), (7, IN), (2, 3, IN), (0, IN)])
def test_the_gradient_is_that_of_dense_autograd(shape, transposed, with_bias, scale):
    torch.manual_seed(0)
    weight = torch.randn((IN, OUT) if transposed else (OUT, IN), dtype=torch.float64)
    entries = entries_of(weight, FEATURES, scale, transposed)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True) if with_bias else None
    output = functional.linear(x, weight, bias, entries, transposed)
    grad = torch.randn_like(output)
    got = torch.autograd.grad(output, [x, entries.delta] + ([bias] if with_bias else []), grad)
    for a, b in zip(got, oracle(x, weight, bias, entries, transposed, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_over_tokens_are_float32(dtype, transposed):
    """As exact as the product of the same values in float32, whatever the dtype of the layer."""
    torch.manual_seed(0)
    weight = torch.randn((IN, OUT) if transposed else (OUT, IN)).to(dtype)
    entries = entries_of(weight, FEATURES, 1.0, transposed)
    x, grad = torch.randn(700, IN).to(dtype).requires_grad_(True), torch.randn(700, OUT).to(dtype)
    (got,) = torch.autograd.grad(functional.linear(x, weight, None, entries, transposed), entries.delta, grad)
    wanted = oracle(x, weight, None, entries, transposed, grad)[1]
    terms = x.detach()[:, FEATURES].double().abs().t() @ grad.double().abs()  # what rounding of sums is measured by
    assert got.dtype == torch.float32
    assert (got - wanted).abs().max() <= 16 * torch.finfo(torch.float32).eps * terms.max()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_autocast_keeps_the_features_in_its_dtype(cast, transposed):
    torch.manual_seed(0)
    weight = torch.randn((IN, OUT) if transposed else (OUT, IN))
    entries = entries_of(weight, FEATURES, 1.0, transposed)
    x, bias = torch.randn(3, 50, IN, requires_grad=True), torch.randn(OUT)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=cast):
            return functional.linear(x, weight, bias, entries, transposed)

    sizes = kept(run, weight, entries.delta, entries.pattern.chosen, entries.base)
    assert sizes == {(150, len(FEATURES)): 150 * len(FEATURES) * 2}
    grad = torch.randn(3, 50, OUT).to(cast)
    (got,) = torch.autograd.grad(run(), entries.delta, grad)
    rounded = x.detach().to(cast)
    wanted = oracle(rounded, weight, None, entries, transposed, grad)[1]
    terms = rounded.flatten(0, 1)[:, FEATURES].double().abs().t() @ grad.flatten(0, 1).double().abs()
    assert (got - wanted).abs().max() <= 16 * torch.finfo(torch.float32).eps * terms.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_input_only_the_features_are_kept(dtype):
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN).to(dtype)
    entries = entries_of(weight, FEATURES)
    x = torch.randn(2, 30, IN).to(dtype).requires_grad_(True)
    tensors = weight, entries.delta, entries.pattern.chosen, entries.base
    size = weight.element_size()
    assert kept(lambda: functional.linear(x, weight, None, entries), *tensors) == {(2, 30, 5): 300 * size}
    entries.pattern = Pattern(entries.indices)  # as single entries
    tensors = weight, entries.delta, entries.pattern.chosen, entries.base
    assert kept(lambda: functional.linear(x, weight, None, entries), *tensors) == {(2, 30, IN): 60 * IN * size}


def test_without_a_gradient_of_the_entries_nothing_of_the_input_is_kept():
    """As behind a frozen adapter, through which a gradient passes; also of single entries."""
    torch.manual_seed(0)
    weight, x = torch.randn(OUT, IN), torch.randn(9, IN, requires_grad=True)
    for indices in (columns_in((OUT, IN), FEATURES), torch.tensor([1, 5, 44])):
        delta = torch.randn(len(indices))
        entries = Entries(delta, pattern_in(weight.shape, indices), ops.gather(weight, indices))
        tensors = weight, delta, entries.pattern.chosen, entries.base
        assert kept(lambda e=entries: functional.linear(x, weight, None, e), *tensors) == {}
        (got,) = torch.autograd.grad(functional.linear(x, weight, None, entries).sum(), x)
        torch.testing.assert_close(got, weight.sum(0).expand(9, -1))


class Seeing:
    """Stands for a mask that looks for entries to grow."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def add_linear(self, grad_output: Tensor, input: Tensor) -> None:
        self.seen.append(grad_output.T @ input)


def test_a_mask_that_moves_sees_the_gradient_of_the_whole_weight():
    torch.manual_seed(0)
    weight, x = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(7, IN, dtype=torch.float64)
    entries = entries_of(weight, FEATURES)
    entries.candidates = Seeing()
    (got,) = torch.autograd.grad(functional.linear(x, weight, None, entries).sum(), entries.delta)
    (dense,) = entries.candidates.seen
    torch.testing.assert_close(dense, torch.ones(OUT, 1, dtype=torch.float64) * x.sum(0))
    torch.testing.assert_close(got, dense.flatten()[entries.indices.long()])


def gradients(model: nn.Module, run, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x, y = points_and_labels(dtype=dtype)
    F.cross_entropy(run(x.requires_grad_(True)), y).backward()
    found = [p.grad for p in sprand.parameters(model)] + [x.grad]
    for p in sprand.parameters(model):
        p.grad = None
    return found


def dense_gradients(dtype: torch.dtype) -> list[Tensor]:
    """The same of the plain model, at the trained entries."""
    model = built(MLP).to(dtype)
    x, y = points_and_labels(dtype=dtype)
    F.cross_entropy(model(x.requires_grad_(True)), y).backward()
    chosen = masks(model, COLUMNS)
    return [model.get_parameter(name).grad.flatten()[chosen[name].long()] for name in KEPT] + [x.grad]


def randomize(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in sprand.parameters(model):
        p.data.normal_(0, 0.1, generator=generator)


def test_a_model_gives_dense_gradients():
    for a, b in zip(gradients(m := applied(torch.float64), m, torch.float64), dense_gradients(torch.float64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_gives_the_same_bits(reentrant):
    model = applied()
    randomize(model)
    wanted = gradients(model, model)
    got = gradients(model, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_layer_that_is_used_twice_sums_both_gradients():
    layer = nn.Linear(IN, IN).double()
    twice = sprand.apply(nn.Sequential(layer, nn.Tanh(), layer), strategy={"0.weight": columns_in((IN, IN), FEATURES)})
    (delta,) = sprand.parameters(twice)
    x = torch.randn(6, IN, dtype=torch.float64)
    (got,) = torch.autograd.grad(twice(x).square().sum(), delta)
    weight = layer.weight.detach().clone().requires_grad_(True)
    hidden = torch.tanh(F.linear(x, weight, layer.bias))
    (dense,) = torch.autograd.grad(F.linear(hidden, weight, layer.bias).square().sum(), weight)
    torch.testing.assert_close(got, dense[:, FEATURES].flatten(), rtol=1e-12, atol=1e-12)


def test_a_weight_tied_to_an_embedding_sums_both_gradients():
    """The embedding's gradient walks its tokens; the projection keeps the features that train."""
    model, dense = built(Tied).double(), built(Tied).double()
    chosen = columns_in((20, 8), torch.tensor([1, 6]))
    sprand.apply(model, strategy={"embed.weight": chosen})
    tokens = torch.tensor([[0, 3, 3, 19]])
    model(tokens).square().sum().backward()
    dense(tokens).square().sum().backward()
    (delta,) = sprand.parameters(model)
    torch.testing.assert_close(delta.grad, dense.embed.weight.grad.flatten()[chosen.long()], rtol=1e-12, atol=1e-12)
    assert (2, 4) not in kept(lambda: model(tokens), *own(model)) and (4, 8) not in kept(lambda: model(tokens), *own(model))


def stacked(width: int = 256, depth: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Linear layers between operations that keep nothing of their own input."""
    torch.manual_seed(0)
    return nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())]).to(dtype)


def on_columns(model: nn.Module, density: float) -> nn.Module:
    """A random draw of columns in every linear layer."""
    shapes = {name: p.shape for name, p in model.named_parameters() if p.dim() == 2}
    generator = torch.Generator().manual_seed(0)
    chosen = {}
    for name, (rows, columns) in shapes.items():
        features = torch.randperm(columns, generator=generator)[: max(1, round(density * columns))].sort().values
        chosen[name] = columns_in((rows, columns), features)
    return sprand.apply(model, strategy=chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_beside_what_a_frozen_model_keeps_there_are_the_features_alone(compiled, dtype):
    """Also in a graph, whose partition could keep whole inputs and choose from them in backward."""
    width, depth, tokens, density = 256, 3, 64, 2 / 256
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    torch.compiler.reset()

    def total(model: nn.Module) -> int:
        called = torch.compile(model, fullgraph=True) if compiled else model
        called(x)  # the graph is made
        return sum(kept(lambda: called(x), *own(model)).values())

    frozen = total(stacked(width, depth, dtype).requires_grad_(False))
    above = total(on_columns(stacked(width, depth, dtype), density)) - frozen
    assert frozen >= depth * tokens * width * x.element_size()
    assert 0 <= above <= depth * tokens * 2 * x.element_size()
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_are_those_of_eager(backend):
    torch.compiler.reset()
    eager, other = applied(torch.float64), applied(torch.float64)
    randomize(eager)
    randomize(other)
    wanted = gradients(eager, eager, torch.float64)
    got = gradients(other, torch.compile(other, fullgraph=True, backend=backend), torch.float64)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.compiler.reset()


def moved(model: nn.Module) -> dict[str, nn.Module]:
    """The model after everything that may change what is known of its indices."""
    there = copy.deepcopy(model)
    there.to("meta").to_empty(device="cpu")
    there.load_state_dict(model.state_dict())
    loaded = applied()
    loaded.load_state_dict(model.state_dict())
    return {"copied": copy.deepcopy(model), "through meta": there, "loaded": loaded}


def test_what_is_kept_follows_a_model_wherever_it_goes():
    model = applied()
    randomize(model)
    wanted = gradients(model, model)
    x = points_and_labels()[0].requires_grad_(True)
    sizes = kept(lambda: model(x), *own(model))
    assert {(32, 3), (32, 2)} <= sizes.keys() and (32, 16) not in sizes
    for name, other in moved(model).items():
        assert kept(lambda other=other: other(x), *own(other)) == sizes, name
        got = gradients(other, other)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), name
    half = copy.deepcopy(model).bfloat16()
    sizes = kept(lambda: half(x.bfloat16()), *own(half))
    assert sizes[32, 3] == 32 * 3 * 2


def test_columns_of_a_state_dict_replace_others():
    one, other = built(MLP), built(MLP)
    features = {"first.weight": torch.tensor([0, 2, 9]), "second.weight": torch.tensor([5, 6])}
    sprand.apply(one, strategy=masks(one, features))
    sprand.apply(other, strategy=masks(other, COLUMNS))
    randomize(one)
    other.load_state_dict(one.state_dict())
    for a, b in zip(gradients(other, other), gradients(one, one), strict=True):
        assert torch.equal(a, b)


def test_nothing_of_it_is_in_a_state_dict():
    model = applied()
    single = sprand.apply(built(MLP), strategy={name: torch.arange(3) for name in KEPT})
    assert model.state_dict().keys() == single.state_dict().keys()


def test_a_weight_that_others_write_between_a_compiled_forward_and_its_backward_is_written_again():
    """As by a reference model, the same one with its entries disabled, on whose output the loss depends."""
    torch.compiler.reset()
    eager, other = applied(torch.float64), applied(torch.float64)
    randomize(eager)
    randomize(other)

    def run(model: nn.Module, called):
        def both(x: Tensor) -> Tensor:
            output = called(x)
            with sprand.disabled(model), torch.no_grad():
                reference = model(x)
            return output - reference

        return both

    wanted = gradients(eager, run(eager, eager), torch.float64)
    got = gradients(other, run(other, torch.compile(other, fullgraph=True)), torch.float64)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.compiler.reset()


def test_optimizers_train_columns_as_they_train_entries():
    """The step, the write and the losses are those of AdamW on the dense weight's columns."""
    model = applied(torch.float64)
    optimizer = sprand.SparseAdamW(model, lr=1e-2, weight_decay=0.0)
    dense = built(MLP).double()
    chosen = masks(dense, COLUMNS)
    deltas = {name: torch.zeros(len(index), dtype=torch.float64, requires_grad=True) for name, index in chosen.items()}
    reference = torch.optim.AdamW(deltas.values(), lr=1e-2, weight_decay=0.0)
    base = {name: dense.get_parameter(name).detach() for name in deltas}
    x, y = points_and_labels(dtype=torch.float64)
    for _ in range(4):
        weights = {
            name: base[name].flatten().index_add(0, chosen[name], delta).view_as(base[name]) for name, delta in deltas.items()
        }
        losses = F.cross_entropy(model(x), y), F.cross_entropy(torch.func.functional_call(dense, weights, x), y)
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        for loss, opt in zip(losses, (optimizer, reference), strict=True):
            loss.backward()
            opt.step()
            opt.zero_grad()
