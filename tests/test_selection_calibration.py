"""Calibration: the model is untouched, also after an exception; memory is bounded; passes, dtypes and own losses agree."""

from __future__ import annotations

import copy
import random
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sprand
from models import MLP, Tied, built, points_and_labels
from sprand.selection import calibration
from sprand.selection.strategies import STRATEGIES

WITH_DATA = [name for name, strategy in STRATEGIES.items() if strategy.wants_data]


class Lively(nn.Module):
    """All that calibration could change: dropout, running statistics, a counter of calls, a gradient, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.norm = nn.BatchNorm1d(24)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(24, 24)
        self.third = nn.Linear(24, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("latest", None)

    def forward(self, x):
        self.calls += 1
        self.latest = x.mean()
        return self.third(torch.relu(self.second(self.drop(self.norm(torch.relu(self.first(x)))))))


def batches(size: int = 8):
    x, y = points_and_labels()
    return list(zip(x.split(size), y.split(size), strict=True))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def loss_that_draws(model, batch):
    torch.rand(3), random.random(), numpy.random.rand()
    return loss_fn(model, batch)


def failing_loss(model, batch):
    failing_loss.calls += 1
    if failing_loss.calls == 3:
        raise RuntimeError("the third batch is bad")
    return loss_that_draws(model, batch)


def layout_of(strategy):
    return {"layout": "columns"} if STRATEGIES[strategy].columns else {}


def lively():
    torch.manual_seed(0)
    model = Lively()
    model.drop.eval()
    model.third.requires_grad_(False)
    loss_fn(model, batches()[0]).backward()
    with torch.no_grad():
        model.second.weight[0, 0] = -0.0
        model.second.weight[0, 1] = -1e-42
    return model


def everything(model):
    """All that a user could look at."""
    tensors = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    return {
        "values": {name: value.reshape(-1).view(torch.uint8) for name, value in tensors.items()},
        "buffers": {name: None if value is None else value.clone() for name, value in model._buffers.items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "objects": [id(p) for p in model.parameters()] + [id(p.grad) for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()]
        + [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        "rng": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": str(numpy.random.get_state()),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for name, part in parts:
            there = other[key][name] if isinstance(value, dict) else other[key]
            equal = torch.equal(part, there) if isinstance(part, torch.Tensor) else part == there
            assert equal, f"{key} {name}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_untouched(strategy, training):
    model = lively().train(training)
    model.drop.eval()
    before = everything(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*points_and_labels()), batch_size=8, shuffle=True)
    given = {"data": loader, "loss_fn": loss_that_draws} if strategy in WITH_DATA else {}
    sprand.select(model, strategy=strategy, density=0.1, **given, **layout_of(strategy))
    assert_same(everything(model), before)


@pytest.mark.parametrize("strategy", WITH_DATA)
def test_the_model_is_untouched_after_an_exception(strategy):
    model, failing_loss.calls = lively(), 0
    before = everything(model)
    with pytest.raises(RuntimeError, match="third batch"):
        sprand.select(model, strategy=strategy, density=0.1, data=batches(), loss_fn=failing_loss, **layout_of(strategy))
    assert_same(everything(model), before)


def test_the_model_is_untouched_after_an_exception_of_synflow_and_of_a_callable():
    model = lively()
    model.norm.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    before = everything(model)
    with pytest.raises(ValueError, match="no input of ones can be made"):
        sprand.select(model, strategy="synflow")
    assert_same(everything(model), before)
    model, before = lively(), everything(lively())
    with pytest.raises(ZeroDivisionError):
        sprand.select(model, strategy=lambda *_: 1 / 0, data=batches(), loss_fn=loss_fn)
    assert before["modes"] == everything(model)["modes"] and before["flags"] == everything(model)["flags"]


LABELLED = {
    "pair": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "by name": lambda x, y: {"x": x, "target": y},
    "with labels": lambda x, y: {"x": x, "labels": y},
}


@pytest.mark.parametrize("batch", LABELLED.values(), ids=LABELLED)
def test_synflow_takes_the_inputs_of_labelled_batches_and_says_so(batch):
    x, y = points_and_labels()
    data = [batch(x, y)]
    plain = sprand.select(built(MLP), strategy="synflow", density=0.1)
    for loss in (None, loss_fn):
        with pytest.warns(UserWarning, match="synflow: .* labels and loss_fn play no part"):
            assert sprand.select(built(MLP), strategy="synflow", density=0.1, data=data, loss_fn=loss) == plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sprand.select(built(MLP), strategy="synflow", density=0.1, data=[x]) == plain
    with pytest.raises(ValueError, match="synflow: this MLP cannot be called with the inputs of the data"):
        sprand.select(built(MLP), strategy="synflow", density=0.1, data=[torch.ones(8, 3)])


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("strategy", ["gradient", "snip", "fisher", "synflow"])
@pytest.mark.parametrize("memory", [2400, 4000])
def test_several_passes_give_the_same_mask(strategy, scope, memory, monkeypatch):
    """A shuffling loader too: each pass sees the same batches."""
    passes, held = [], []
    real = calibration._zeros
    monkeypatch.setattr(
        calibration,
        "_zeros",
        lambda group, run: passes.append(0) or held.append(calibration._bytes_of(group, run)) or real(group, run),
    )
    x, y = points_and_labels()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    fields = {"strategy": strategy, "scope": scope, "density": 0.1, "target_modules": ["first", "second", "third"]}
    if strategy != "synflow":
        fields |= {"data": loader, "loss_fn": loss_fn, "calibration_examples": 16}
    one = sprand.select(built(MLP), **fields)
    count = len(passes)
    several = sprand.select(built(MLP), **fields, calibration_memory=memory)
    assert count == 1 and len(passes) - 1 == (2 if memory == 4000 else 3)
    assert max(held[1:]) <= memory
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_one_dense_gradient_lives_at_a_time(monkeypatch):
    """Of all gradients of a backward pass, the one just made."""
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(6)])
    most = 0
    real = calibration.Sums.add

    def add(sums, name, grad):
        nonlocal most
        most = max(most, 1 + sum(p.grad is not None for p in model.parameters()))
        real(sums, name, grad)

    monkeypatch.setattr(calibration.Sums, "add", add)
    data = [torch.randn(4, 32) for _ in range(2)]
    sprand.select(model, strategy="snip", data=data, loss_fn=lambda m, b: m(b).square().mean(), target_modules=r"\d")
    assert most == 1


def test_a_limited_number_of_examples_is_read():
    read = []

    def endless():
        while True:
            read.append(1)
            yield torch.randn(8, 16), torch.randint(0, 4, (8,))

    sprand.select(built(MLP), strategy="snip", data=endless(), loss_fn=loss_fn, calibration_examples=20)
    assert len(read) == 3


def test_accumulators_may_be_bfloat16_and_the_model_too():
    fields = {"strategy": "gradient", "density": 0.2, "data": batches()}
    exact = sprand.select(built(MLP), loss_fn=loss_fn, **fields)

    def overlap(other):
        return sum(torch.isin(other[name], exact[name]).sum().item() for name in exact) / sum(map(len, exact.values()))

    assert overlap(sprand.select(built(MLP), loss_fn=loss_fn, **fields, calibration_dtype=torch.bfloat16)) > 0.95
    narrow = sprand.select(
        built(MLP).bfloat16(), loss_fn=lambda m, b: F.cross_entropy(m(b[0].bfloat16()).float(), b[1]), **fields
    )
    assert overlap(narrow) > 0.9


class Checkpointed(MLP):
    """The same function, computed twice."""

    def forward(self, x):
        return self.third(checkpoint(lambda x: torch.tanh(self.second(torch.tanh(self.first(x)))), x, use_reentrant=False))


@pytest.mark.parametrize("strategy", ["snip", "fisher"])
def test_gradient_checkpointing_changes_nothing(strategy):
    fields = {"strategy": strategy, "density": 0.2, "data": batches(), "loss_fn": loss_fn}
    one, other = sprand.select(built(MLP), **fields), sprand.select(built(Checkpointed), **fields)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_tied_weight_has_the_sum_of_its_gradients():
    model = built(Tied)
    tokens = torch.randint(0, 20, (6, 5))

    def loss(model, batch):
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    chosen = sprand.select(model, strategy="gradient", budget=30, target_modules=["embed"], data=[tokens], loss_fn=loss)
    double = copy.deepcopy(model).double()
    (grad,) = torch.autograd.grad(loss(double, tokens), double.embed.weight)
    assert torch.equal(chosen["embed.weight"].long(), grad.abs().flatten().topk(30).indices.sort().values)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_transformers_model_uses_its_own_loss(checkpointing):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64
    )
    model = transformers.LlamaForCausalLM(config)
    oracle = copy.deepcopy(model).double()
    tokens = torch.randint(0, 50, (4, 7))
    oracle(input_ids=tokens, labels=tokens).loss.backward()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    before = everything(model)
    data = [{"input_ids": tokens, "labels": tokens}]
    chosen = sprand.select(model, strategy="gradient", data=data, density=0.05)
    for name, indices in chosen.items():
        score = oracle.get_parameter(name).grad.abs().flatten()
        assert score[indices.long()].min() >= (1 - 1e-3) * score.topk(len(indices)).values[-1]
    for strategy in ("synflow", "grasp", "fisher"):
        assert (
            sprand.select(model, strategy=strategy, data=data if strategy != "synflow" else None, density=0.05).keys()
            == chosen.keys()
        )
    assert_same(everything(model), before)


def test_time_and_memory_are_reported(caplog):
    fields = {"target_modules": ["first", "second", "third"], "data": batches(), "loss_fn": loss_fn}
    with caplog.at_level("INFO", logger="sprand"):
        sprand.select(built(MLP), strategy="snip", calibration_memory=4000, **fields)
    assert len(caplog.messages) == 2
    assert all("32 examples" in text and " s so far" in text and "peak" in text for text in caplog.messages)


def test_an_optimizer_that_steps_in_backward_does_not():
    model, steps = built(MLP), []
    model.second.weight.register_post_accumulate_grad_hook(lambda p: steps.append(p.data.zero_()))
    before = everything(model)
    sprand.select(model, strategy="snip", data=batches(), loss_fn=loss_fn)
    assert not steps
    assert_same(everything(model), before)
    loss_fn(model, batches()[0]).backward()
    assert len(steps) == 1
