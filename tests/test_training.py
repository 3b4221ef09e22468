"""Training a few entries is what it says: AdamW on those entries of the weights, and nothing else changes."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sprand
from models import EVERY_TARGET, MLP, EveryLayer, Tied, assert_same_bits, built, points_and_labels, tokens_and_labels
from watch import WatchSizes


def dense_losses(model, masks, steps, dtype, optimizer=None, **options):
    """Losses of ordinary AdamW on weights whose gradients are masked, in another code path altogether."""
    weights = {name: p for name, p in model.named_parameters() if name in masks}
    for name, p in model.named_parameters():
        p.requires_grad_(name in masks)
    opt = (optimizer or torch.optim.AdamW)(weights.values(), **options)
    x, y = points_and_labels(dtype=dtype)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        loss.backward()
        for name, p in weights.items():
            p.grad.mul_(masks[name])
        opt.step()
        opt.zero_grad()
    return torch.tensor(losses, dtype=torch.float64)


def sparse_losses(model, steps, dtype, optimizer):
    x, y = points_and_labels(dtype=dtype)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses, dtype=torch.float64)


def masks_of(model):
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, sprand.SparseModule):
            mask = torch.zeros(module.weight.numel(), dtype=module.weight.dtype)
            mask[module.sparse_entries().indices.long()] = 1
            masks[f"{name}.weight"] = mask.view_as(module.weight)
    return masks


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_equals_dense_adamw_with_masked_gradients(density):
    """In float64 both paths are the same training; weight decay is off because it pulls elsewhere by design."""
    model = built(MLP).double()
    dense = copy.deepcopy(model)
    sprand.apply(model, density=density)
    masks = masks_of(model)
    expected = dense_losses(dense, masks, 30, torch.float64, lr=1e-2, weight_decay=0.0)
    got = sparse_losses(model, 30, torch.float64, sprand.SparseAdamW(model, lr=1e-2, weight_decay=0.0))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    sprand.merge(model)
    for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_float32_is_as_close_to_float64_as_dense_training():
    model = built(MLP)
    exact, dense = copy.deepcopy(model).double(), copy.deepcopy(model)
    sprand.apply(model, density=1.0)
    masks = masks_of(model)
    truth = dense_losses(exact, {k: v.double() for k, v in masks.items()}, 20, torch.float64, lr=1e-2, weight_decay=0.0)
    plain = dense_losses(dense, masks, 20, torch.float32, lr=1e-2, weight_decay=0.0)
    got = sparse_losses(model, 20, torch.float32, sprand.SparseAdamW(model, lr=1e-2, weight_decay=0.0))
    ulp = torch.finfo(torch.float32).eps * truth.abs().max()
    assert (got - truth).abs().max() <= 2 * (plain - truth).abs().max() + 4 * ulp


def optimizers():
    yield "SparseAdamW", lambda model: sprand.SparseAdamW(model, lr=1e-2, weight_decay=0.1)
    for name, options in {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}.items():
        yield name, lambda model, o=options: torch.optim.AdamW(sprand.parameters(model), lr=1e-2, weight_decay=0.1, **o)
    yield "Adafactor", lambda model: torch.optim.Adafactor(sprand.parameters(model), lr=1e-2)
    yield "SGD", lambda model: torch.optim.SGD(sprand.parameters(model), lr=0.5, momentum=0.9)


class IndexPut(nn.Module):
    """The same model with functional weights, `index_put` and ordinary autograd: dense gradients, no patch."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.chosen = {name: m for name, m in model.named_modules() if isinstance(m, sprand.SparseModule)}
        self.deltas = nn.ParameterDict(
            {name.replace(".", "_"): torch.zeros_like(m.sprand_delta) for name, m in self.chosen.items()}
        )
        sprand.unmerge(self.model)
        for p in self.model.parameters():
            p.requires_grad_(False)

    def forward(self, x):
        weights = {}
        for name, module in self.chosen.items():
            base = self.model.get_submodule(name).weight
            rows = module.sparse_entries().indices.long()
            value = module.sprand_base + self.deltas[name.replace(".", "_")]
            weights[f"{name}.weight"] = base.flatten().index_put((rows,), value).view_as(base)
        return torch.func.functional_call(self.model, weights, (x,))


@pytest.mark.parametrize(("name", "make"), [pytest.param(n, m, id=n) for n, m in optimizers()])
def test_same_losses_under_any_optimizer(name, make):
    """Also under fused AdamW, which does not move a parameter's version: no weight is ever stale."""
    model = sprand.apply(built(MLP).double(), density=0.2, seed=3)
    reference = IndexPut(model)
    if name == "SparseAdamW":
        other = torch.optim.AdamW(reference.deltas.parameters(), lr=1e-2, weight_decay=0.1)
    else:
        holder = sprand.apply(built(MLP).double(), density=0.2, seed=3)
        made = make(holder)
        other = type(made)(
            reference.deltas.parameters(),
            **{k: v for k, v in made.defaults.items() if k in ("lr", "weight_decay", "momentum", "fused", "foreach")},
        )
    expected = sparse_losses(reference, 15, torch.float64, other)
    got = sparse_losses(model, 15, torch.float64, make(model))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    assert got[-1] < got[0]


def test_eight_bit_adamw_trains():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = sprand.apply(built(MLP, width=512), density=0.2)
    losses = sparse_losses(model, 15, torch.float32, bnb.optim.AdamW8bit(sprand.parameters(model), lr=1e-2))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("layout", ["unstructured", "columns"])
def test_eight_bit_moments_take_a_quarter_and_resume_exactly(layout):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = sprand.apply(built(MLP, width=512), density=0.2, layout=layout)
        return model, bnb.optim.AdamW8bit(sprand.parameters(model), lr=1e-2)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for seed in steps:
            x, y = points_and_labels(seed)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    one, other = made(), made()
    train(*one, range(4))
    for part, state in zip(other, copy.deepcopy([part.state_dict() for part in one]), strict=True):
        part.load_state_dict(state)
    for parts in (one, other):
        train(*parts, range(4, 7))
    assert_same_bits(one[0].state_dict(), other[0].state_dict())
    large = max(sprand.parameters(one[0]), key=torch.numel)
    held = sum(value.nbytes for value in one[1].state[large].values() if isinstance(value, torch.Tensor))
    assert held < 2.5 * large.numel()


def test_only_the_chosen_entries_change():
    model = built(EveryLayer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sprand.apply(model, density=0.2, **EVERY_TARGET)
    chosen = {site.name: site.entries.indices.long() for site in sprand.layers.sites.sites_of(model)}
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    x, y = tokens_and_labels()
    for _ in range(5):
        F.cross_entropy(model(x), y).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sprand.parameters(model))
        optimizer.step()
        optimizer.zero_grad()
    sprand.merge(model)
    for name, p in model.named_parameters():
        if name.startswith("head."):
            continue
        changed = (p != before[name]).flatten()
        allowed = torch.zeros_like(changed)
        if name in chosen:
            allowed[chosen[name]] = True
            assert changed.sum() > 0.5 * chosen[name].numel(), name
        assert not (changed & ~allowed).any(), name


def test_forward_is_the_base_model_before_training():
    model = built(EveryLayer)
    x, _ = tokens_and_labels()
    expected = model(x)
    assert torch.equal(sprand.apply(model, density=0.2, **EVERY_TARGET)(x), expected)


def test_two_forwards_then_one_backward():
    """DPO and siamese losses use a model twice; gradients add up as for a dense model."""
    x, y = points_and_labels()
    model = sprand.apply(built(MLP), density=0.3)
    (F.cross_entropy(model(x), y) + F.cross_entropy(model(2 * x), y)).backward()
    twice = [p.grad.clone() for p in sprand.parameters(model)]
    for p in sprand.parameters(model):
        p.grad = None
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(model(2 * x), y).backward()
    for p, expected in zip(sprand.parameters(model), twice, strict=True):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize(
    "make",
    [sprand.SparseAdamW, lambda m, lr: torch.optim.AdamW(sprand.parameters(m), lr=lr, fused=True)],
    ids=["sparse", "fused"],
)
def test_reference_forward_between_forward_and_backward(make):
    """A disabled forward in the middle leaves the gradient of the trained model alone."""
    x, y = points_and_labels()
    model = sprand.apply(built(MLP), density=0.3)
    base = built(MLP)
    optimizer = make(model, lr=1e-1)
    for _ in range(3):
        loss = F.cross_entropy(model(x), y)
        expected = torch.autograd.grad(loss, sprand.parameters(model), retain_graph=True)
        with sprand.disabled(model), torch.no_grad():
            assert torch.equal(model(x), base(x))
        loss.backward()
        for p, grad in zip(sprand.parameters(model), expected, strict=True):
            assert torch.equal(p.grad, grad)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    x, y = points_and_labels()
    x.requires_grad_(True)
    plain, saved = (sprand.apply(built(MLP), density=0.3) for _ in range(2))
    for model, run in ((plain, lambda m, v: m(v)), (saved, lambda m, v: checkpoint(m, v, use_reentrant=reentrant))):
        optimizer = sprand.SparseAdamW(model, lr=1e-2)
        for _ in range(4):
            F.cross_entropy(run(model, x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(sprand.parameters(plain), sprand.parameters(saved), strict=True):
        assert torch.equal(a, b)


def test_saved_tensors_may_be_moved_away_until_backward():
    x, y = points_and_labels()
    plain, offloaded = (sprand.apply(built(MLP), density=0.3) for _ in range(2))
    for model, hooks in ((plain, nullcontext), (offloaded, torch.autograd.graph.save_on_cpu)):
        optimizer = sprand.SparseAdamW(model, lr=1e-2)
        for _ in range(4):
            with hooks():
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(sprand.parameters(plain), sprand.parameters(offloaded), strict=True):
        assert torch.equal(a, b)


def test_gradient_accumulation_equals_one_large_batch():
    x, y = points_and_labels(dtype=torch.float64)
    whole, parts = (sprand.apply(built(MLP).double(), density=0.3) for _ in range(2))
    F.cross_entropy(whole(x), y).backward()
    for i in range(4):
        (F.cross_entropy(parts(x[8 * i : 8 * i + 8]), y[8 * i : 8 * i + 8]) / 4).backward()
    for a, b in zip(sprand.parameters(whole), sprand.parameters(parts), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_no_dense_gradient_is_made(layer):
    """Nothing as large as the weight is allocated in forward, backward or step."""
    if layer == "linear":
        model, x = nn.Sequential(nn.Linear(300, 200)), torch.randn(6, 300)
        sprand.apply(model, density=0.01)
    else:
        model, x = nn.Sequential(nn.Embedding(300, 200)), torch.randint(0, 300, (6,))
        sprand.apply(model, density=0.01, target_modules=["0"])
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    with WatchSizes(300 * 200) as watch:
        model(x).square().sum().backward()
        optimizer.step()
    assert not watch.seen
    assert sprand.parameters(model)[0].grad is not None


def test_weight_decay_pulls_to_the_pretrained_value():
    model = built(MLP)
    base = copy.deepcopy(model.second.weight)
    sprand.apply(model, density=0.5)
    with torch.no_grad():
        model.second.sprand_delta.fill_(1.0)
    optimizer = sprand.SparseAdamW(model, lr=0.1, weight_decay=5.0)
    x, y = points_and_labels()
    for _ in range(60):
        (0.0 * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.second.weight, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_train(dtype):
    """Deltas stay float32: changes far below one ulp of the weight add up instead of vanishing."""
    x, y = points_and_labels(dtype=dtype)
    model = sprand.apply(built(MLP).to(dtype), density=0.5)
    assert all(p.dtype == torch.float32 for p in sprand.parameters(model))
    optimizer = sprand.SparseAdamW(model, lr=2e-6, weight_decay=0.0)
    for _ in range(10):
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = model.second.sprand_delta
    assert moved.abs().min() > 0
    expected = (model.second.sprand_base.float() + moved.detach()).to(dtype)
    assert torch.equal(model.second.weight.flatten()[model.second.sparse_entries().indices.long()], expected)


def test_autocast_equals_a_dense_layer_under_autocast():
    x, y = points_and_labels()
    model = built(MLP)
    dense = copy.deepcopy(model)
    sprand.apply(model, density=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = model(x), dense(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    F.cross_entropy(got.float(), y).backward()
    F.cross_entropy(expected.float(), y).backward()
    wanted = dense.second.weight.grad.flatten()
    assert model.second.sprand_delta.grad.dtype == torch.float32
    torch.testing.assert_close(model.second.sprand_delta.grad, wanted, rtol=2**-7, atol=wanted.abs().max().item() * 2**-7)


def test_tied_weights_train_once_and_get_both_gradients():
    model = built(Tied).double()
    dense = copy.deepcopy(model)
    sprand.apply(model, density=1.0, target_modules=["embed", "out"])
    assert len(sprand.parameters(model)) == 1
    assert sprand.parameters(model)[0].numel() == 20 * 8
    tokens = torch.arange(12) % 7
    F.cross_entropy(model(tokens), tokens).backward()
    F.cross_entropy(dense(tokens), tokens).backward()
    torch.testing.assert_close(sprand.parameters(model)[0].grad, dense.embed.weight.grad.flatten(), rtol=1e-12, atol=1e-15)


def test_hugging_face_conv1d_has_a_sampled_gradient():
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(48, 32)).double()
    dense = copy.deepcopy(model)
    sprand.apply(model, density=0.3)
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    with WatchSizes(48 * 32) as watch:
        model(x).square().sum().backward()
    assert not watch.seen
    dense(x).square().sum().backward()
    expected = dense[0].weight.grad.flatten()[model[0].sparse_entries().indices.long()]
    torch.testing.assert_close(model[0].sprand_delta.grad, expected, rtol=1e-12, atol=1e-12)


def test_padding_token_gives_no_gradient():
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=2))
    sprand.apply(model, density=1.0, target_modules=["0"])
    model(torch.tensor([0, 2, 2, 5])).sum().backward()
    grad = sprand.parameters(model)[0].grad.view(6, 4)
    assert torch.equal(grad.sum(1), torch.tensor([4.0, 0, 0, 0, 0, 4.0]))
