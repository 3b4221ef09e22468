"""16-bit products on a CPU without instructions for them: in float32 while a model trains, PyTorch's own at any other time."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sprand
from models import MLP, assert_same_bits, built, points_and_labels
from peft_models import peft
from problems import assert_within, problem_table, tolerance
from sprand.kernels import ops, products
from sprand.kernels.dtypes import HALVES
from sprand.layers.sites import sites_of
from sprand.peft import SprandConfig
from watch import WatchSizes

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of torch.backends.mkldnn.flags
TARGETS = ["first", "second"]  # "third" is the head, which is frozen


@pytest.fixture(autouse=True)
def no_instructions():
    with torch.backends.mkldnn.flags(enabled=False):
        yield


class NarrowProducts(TorchDispatchMode):
    """Records PyTorch's own products of 16 bits."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if func.namespace == "aten" and "mm" in func._schema.name and any(value.dtype in HALVES for value in tensors):
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def by_apply(model, **fields):
    return sprand.apply(model, target_modules=TARGETS, **fields)


def by_peft(model, **fields):
    return peft.get_peft_model(model, SprandConfig(target_modules=TARGETS, **fields))


doors = pytest.mark.parametrize("door", [by_apply, by_peft])
layouts = pytest.mark.parametrize("layout", ["unstructured", "columns"])


def trained(door, layout="unstructured", dtype=torch.bfloat16):
    """An MLP whose entries have changed."""
    model = door(built(MLP).to(dtype), density=0.2, layout=layout)
    for name, p in model.named_parameters():
        if "sprand_delta" in name:
            p.data.normal_(std=0.1)
    return model


def gradients(model, called=None):
    """The output, and the gradients of the deltas by name."""
    x, labels = points_and_labels(dtype=next(p for p in model.parameters() if p.dim() > 1).dtype)
    model.zero_grad()
    output = (called or model)(x)
    F.cross_entropy(output.float(), labels).backward()
    return {"output": output.detach()} | {site.name: site.deltas[0].grad.clone() for site in sites_of(model)}


@problem_table
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_as_near_as_pytorchs(problem, dtype, transposed, with_bias, monkeypatch):
    monkeypatch.setattr(products, "ENTRIES_AT_ONCE", 100)
    weight = torch.randn(problem.rows, problem.cols).to(dtype)
    used = weight.T if transposed else weight
    input, bias = torch.randn(3, problem.tokens, used.shape[1]).to(dtype), torch.randn(len(used)).to(dtype) if with_bias else None
    oracle = F.linear(input.double(), used.double(), None if bias is None else bias.double())
    result = ops.linear(input, weight, bias, transposed)
    assert result.shape == oracle.shape and result.dtype == dtype
    assert_within(result, oracle, tolerance(F.linear(input, used, bias), oracle, dtype))


@doors
@layouts
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_as_near_as_those_of_dense_training(door, layout, dtype):
    model = trained(door, layout, dtype)
    found = gradients(model)
    where = {site.name: site.entries.indices.long() for site in sites_of(model)}
    merged = sprand.merge(model) if door is by_apply else model.merge_and_unload()
    x, labels = points_and_labels(dtype=dtype)

    def dense(model, x):
        output = model.requires_grad_(True)(x)
        F.cross_entropy(output if x.dtype == torch.float64 else output.float(), labels).backward()
        grads = {name: p.grad.flatten() for name, p in model.named_parameters()}
        return {"output": output.detach()} | {name: grads[name][indices] for name, indices in where.items()}

    oracle, plain = dense(copy.deepcopy(merged).double(), x.double()), dense(merged, x)
    for name, value in found.items():
        assert_within(value, oracle[name], tolerance(plain[name], oracle[name], dtype))


@doors
@layouts
def test_training_multiplies_in_float32_alone(door, layout):
    model = trained(door, layout)
    with NarrowProducts() as narrow:
        expected = gradients(model)
        again = gradients(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert not narrow.seen
    assert_same_bits(again, expected)
    mixed = trained(door, layout, torch.float32)
    with NarrowProducts() as narrow, torch.autocast("cpu", dtype=torch.bfloat16):
        gradients(mixed)
    assert not narrow.seen


@doors
def test_no_weight_is_copied_whole(door, monkeypatch):
    monkeypatch.setattr(products, "ENTRIES_AT_ONCE", 1000)
    net = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 200), nn.Linear(200, 300)).bfloat16()
    model = sprand.apply(net, target_modules=["0", "1"], density=0.01)
    if door is by_peft:
        model = peft.get_peft_model(sprand.unmerge(model), SprandConfig(target_modules=["0", "1"], density=0.01))
    with WatchSizes(200 * 300) as sizes:
        model(torch.randn(2, 200).bfloat16()).sum().backward()
    assert not sizes.seen


@doors
def test_without_gradients_and_without_entries_the_product_is_pytorchs(door):
    base, model = built(MLP).bfloat16(), trained(door)
    x = points_and_labels(dtype=torch.bfloat16)[0].requires_grad_()
    with torch.no_grad(), NarrowProducts() as narrow:
        expected = model(x)
    assert len(narrow.seen) == 3
    with sprand.disabled(model) if door is by_apply else model.disable_adapter(), NarrowProducts() as narrow:
        output = model(x)
        output.sum().backward()
    assert len(narrow.seen) == 6 and torch.equal(output, base(x))
    with NarrowProducts() as narrow:
        model(x).sum().backward()
    assert not narrow.seen
    merged = sprand.merge(model) if door is by_apply else model.merge_and_unload()
    with NarrowProducts() as narrow:
        output = merged.requires_grad_(False)(x)
        output.sum().backward()
    assert len(narrow.seen) == 6 and torch.equal(output, expected)


@doors
def test_the_head_stays_what_it_is(door):
    base, model = built(MLP).bfloat16(), trained(door)
    head = (model if door is by_apply else model.base_model.model).third
    assert type(head) is nn.Linear and head.state_dict().keys() == base.third.state_dict().keys()
    expected = gradients(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with NarrowProducts() as narrow:
            assert_same_bits(gradients(copied), expected)
        assert not narrow.seen
    replica = head._replicate_for_data_parallel()
    for name, p in head._parameters.items():
        setattr(replica, name, p.detach() + 1)
    x = torch.randn(3, 24).bfloat16().requires_grad_()
    assert torch.equal(replica(x), F.linear(x, head.weight + 1, head.bias + 1))
    _ = sprand.unmerge(model) if door is by_apply else model.unload()
    assert head.__dict__.keys() == base.third.__dict__.keys()


def test_a_head_that_another_adapter_trains_trains_there():
    model = by_apply(built(MLP).bfloat16(), density=0.2)
    sprand.apply(model, name="head", target_modules=["third"], density=0.5)
    assert gradients(model)["third.weight"].any()
    sprand.switch(model, "default")
    with NarrowProducts() as narrow:
        assert gradients(model)["first.weight"].any()
    assert not narrow.seen
    tuned = by_peft(built(MLP).bfloat16(), density=0.2)
    tuned.add_adapter("head", SprandConfig(target_modules=["third"], density=0.5))
    tuned.set_adapter("head")
    assert gradients(tuned)["third.weight"].any()


def test_a_forward_that_another_tool_keeps_is_pytorchs_once_the_entries_are_gone():
    model = trained(by_apply)
    inner = model.third.forward
    model.third.forward = lambda x: inner(x)
    with NarrowProducts() as narrow:
        gradients(model)
    assert not narrow.seen
    sprand.unmerge(model)
    with NarrowProducts() as narrow:
        output = model.requires_grad_(False)(x := points_and_labels(dtype=torch.bfloat16)[0].requires_grad_())
    assert len(narrow.seen) == 3 and torch.equal(output, built(MLP).bfloat16()(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_asks_at_each_call(backend, monkeypatch):
    model, calls = trained(by_apply), []
    ours = products.linear_in_float32
    monkeypatch.setattr(products, "linear_in_float32", lambda *args: calls.append(args) or ours(*args))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for enabled in (True, False, True):
        with torch.backends.mkldnn.flags(enabled=enabled):
            calls.clear()
            found = gradients(model, lambda x: compiled(x))
            assert len(calls) == (0 if enabled else 5)
            if backend == "aot_eager":
                assert_same_bits(found, gradients(model))
    torch.compiler.reset()
