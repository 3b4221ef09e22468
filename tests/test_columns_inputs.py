"""Scores of inputs, `"activation"` and `"token_fisher"`: sums over tokens, no gradient of a weight, bad input named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sprand
from models import MLP, EveryLayer, built
from peft_models import llama
from sprand.layers.sites import weights_of
from sprand.selection.batches import Batches
from sprand.selection.inputs import SCORES, InputSums
from sprand.selection.untouched import untouched
from test_columns_choice import columns_of, gpt2

SEQUENCES = torch.arange(48).reshape(6, 8) % 19


class Sequence(nn.Module):
    """Three linear layers over tokens, of which the first is called twice, and in-place operations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 24)
        self.third = nn.Linear(24, 5, bias=False)

    def forward(self, tokens):
        hidden = self.first(self.embed(tokens)).relu_()
        hidden = torch.tanh(self.first(hidden))
        return self.third(self.second(hidden).relu_())


def mean_loss(model, batch):
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten() % 5)


NAMES = ("first.weight", "second.weight", "third.weight")


def oracle(model, score):
    """Of every layer: the sums over the tokens of all examples, each with the loss of its own example, in float64."""
    model = copy.deepcopy(model).double()
    totals = {name: torch.zeros(model.get_parameter(name).shape[1], dtype=torch.float64) for name in NAMES}
    for example in SEQUENCES.split(1):
        seen, handles = [], []

        def see(name, x, output, seen=seen):
            seen.append((name, x.detach().clone(), output))
            return output * 1  # what follows may change this in place

        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(lambda _, args, output, name=name, see=see: see(name, *args, output)))
        loss = mean_loss(model, example)
        grads = torch.autograd.grad(loss, [output for _, _, output in seen])
        for (name, x, _), grad in zip(seen, grads, strict=True):
            for token, of_token in zip(x[0], grad[0], strict=True):
                length = 1.0 if score == "activation" else (of_token**2).sum()
                totals[f"{name}.weight"] += length * token**2
        for handle in handles:
            handle.remove()
    return {name: total / len(SEQUENCES) for name, total in totals.items()}


def sums_of(model, score, batch=4, loss_fn=mean_loss):
    sites = [weights_of(model)[name] for name in NAMES]
    sums = InputSums(sites, score)
    with untouched(model):
        assert sums.collect(model, Batches(model, SEQUENCES.split(batch), None, 1), loss_fn) == len(SEQUENCES)
    return sums.values


@pytest.mark.parametrize("batch", [1, 3, 6])
@pytest.mark.parametrize("score", SCORES)
def test_sums_are_those_of_a_loop_over_tokens(score, batch):
    model = built(Sequence).double()
    for name, total in oracle(model, score).items():
        assert torch.allclose(sums_of(model, score, batch)[name], total, rtol=1e-12, atol=0), name


@pytest.mark.parametrize("score", SCORES)
def test_a_choice_is_the_inputs_with_the_largest_sums(score):
    model, exact = built(Sequence), oracle(built(Sequence), score)
    fields = {"strategy": score, "layout": "columns", "data": SEQUENCES.split(2), "loss_fn": mean_loss}
    mask = sprand.select(model, density=0.25, **fields)
    for name, total in exact.items():
        columns = columns_of(model.get_parameter(name).shape, 1, mask[name])
        assert columns and set(columns) == set(total.topk(len(columns)).indices.tolist())
    ranked = []  # over all targets by the mean over the entries of a column, which all have the same activation
    for place, (name, total) in enumerate(exact.items()):
        size = model.get_parameter(name).shape[0]
        means = total if score == "activation" else total / size
        ranked += [(-mean, place, column, name, size) for column, mean in enumerate(means.tolist())]
    left, expected = 200, {name: set() for name in NAMES}
    for _, _, column, name, size in sorted(ranked):
        if size <= left:
            expected[name].add(column)
            left -= size
    mask = sprand.select(model, budget=200, scope="global", **fields)
    assert {name: set(columns_of(model.get_parameter(name).shape, 1, mask[name])) for name in NAMES} == expected


def test_the_fisher_of_tokens_is_that_of_entries_where_examples_are_single_tokens():
    """And it is another one where they are not."""

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    x, y = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4
    data = list(zip(x.split(8), y.split(8), strict=True))
    fields = {"layout": "columns", "density": 0.3, "loss_fn": loss_fn, "data": data}
    masks = [sprand.select(built(MLP), strategy=strategy, **fields) for strategy in ("fisher", "token_fisher")]
    assert masks[0] == masks[1]
    fields = {"layout": "columns", "density": 0.3, "loss_fn": mean_loss, "data": SEQUENCES.split(2)}
    masks = [sprand.select(built(Sequence), strategy=strategy, **fields) for strategy in ("fisher", "token_fisher")]
    assert masks[0] != masks[1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_checkpointed_layers_are_counted_once(score, reentrant):
    class Checkpointed(Sequence):
        def forward(self, tokens):
            hidden = self.embed(tokens)
            if torch.is_grad_enabled():
                hidden.requires_grad_()
            hidden = checkpoint(lambda value: torch.tanh(self.first(self.first(value).relu_())), hidden, use_reentrant=reentrant)
            return self.third(self.second(hidden).relu_())

    plain = built(Sequence)
    model = built(Checkpointed)
    for name, total in sums_of(plain, score).items():
        assert torch.equal(sums_of(model, score)[name], total), name


def test_small_gradients_do_not_vanish():
    model = built(Sequence)
    whole = sums_of(model, "token_fisher", loss_fn=mean_loss)
    small = sums_of(model, "token_fisher", loss_fn=lambda model, batch: 1e-20 * mean_loss(model, batch))
    for name, total in whole.items():
        assert torch.allclose(small[name], 1e-40 * total, rtol=1e-5, atol=0)


def test_no_weight_gets_a_gradient_and_activation_runs_no_backward():
    def loss_fn(model, batch):
        output = model(batch)
        graphs.append(output.requires_grad)
        assert not any(p.requires_grad for p in model.parameters())
        return F.cross_entropy(output.flatten(0, 1), batch.flatten() % 5)

    for score, differentiates in (("activation", False), ("token_fisher", True)):
        graphs, model = [], built(Sequence)
        sprand.select(model, strategy=score, layout="columns", density=0.3, data=[SEQUENCES], loss_fn=loss_fn)
        assert graphs == [differentiates] and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("score", SCORES)
def test_models_of_transformers_need_no_loss_function(score):
    for model, axis in ((llama(), 1), (gpt2(), 0)):
        batch = {"input_ids": SEQUENCES, "labels": SEQUENCES, "attention_mask": torch.ones_like(SEQUENCES)}
        mask = sprand.select(model, strategy=score, layout="columns", density=0.2, data=[batch])
        assert all(columns_of(mask.shapes[name], axis, indices) for name, indices in mask.items())
        sprand.apply(model, strategy=mask)
    if score == "activation":
        sprand.select(llama(), strategy=score, layout="columns", density=0.2, data=[{"input_ids": SEQUENCES}])


class Attending(nn.Module):
    """Its attention reads the weight of a linear layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


class InPlace(Sequence):
    """Changes what a layer has read."""

    def forward(self, tokens):
        hidden = self.embed(tokens)
        first = self.first(hidden)
        hidden.zero_()
        return self.third(self.second(first))


def of_points(model, batch):
    return model(torch.ones(3, 2, 16)).sum()


ALL = {"density": 0.3, "layout": "columns", "data": [SEQUENCES], "loss_fn": mean_loss}
BAD = {
    "another layout": (Sequence, {"strategy": "activation"}, "'activation' scores whole columns; give layout='columns'"),
    "no data": (Sequence, ALL | {"strategy": "token_fisher", "data": None}, "'token_fisher' needs data to calibrate on"),
    "an embedding": (
        EveryLayer, ALL | {"strategy": "activation", "target_modules": ["embed"]},
        "'activation' scores the inputs of linear layers, and embed.weight is in a Embedding; leave it out",
    ),
    "a bias": (
        Sequence, ALL | {"strategy": "token_fisher", "target_parameters": ["first.bias"]}, "and first.bias is in a Linear",
    ),
    "never called": (
        Attending, ALL | {"strategy": "activation", "loss_fn": of_points}, "attention.out_proj.weight was not called on this",
    ),
    "not finite": (
        Sequence, ALL | {"strategy": "token_fisher", "loss_fn": lambda model, batch: mean_loss(model, batch) * torch.inf},
        "gradients at its output, are not finite",
    ),
    "in place": (
        InPlace, ALL | {"strategy": "token_fisher"}, "the input of first.weight was changed in place after it was read",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("cls", "fields", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(cls, fields, message):
    model = built(cls)
    with pytest.raises(ValueError, match=message):
        sprand.select(model, **fields)
    assert not hasattr(model, "_sprand") and not any(module._forward_hooks for module in model.modules())
