"""Gradients of the functional layers against finite differences and against dense autograd, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sprand.kernels import ops
from sprand.layers import functional
from sprand.layers.entries import Entries
from sprand.layers.units import Pattern
from sprand.selection import pattern


def entries_for(weight, nnz, scale=1.0):
    indices = pattern.draw("random", "weight", weight.shape, nnz, 0)
    delta = (0.1 * torch.randn(nnz, dtype=weight.dtype)).requires_grad_(True)
    return Entries(delta, Pattern(indices), ops.gather(weight, indices), scale)


def dense_weight(weight, entries):
    """The patched weight by index_put, differentiable in delta."""
    return weight.flatten().index_put((entries.indices.long(),), entries.base + entries.scale * entries.delta).view_as(weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,)])
def test_linear_gradcheck(shape, transposed):
    weight = torch.randn((6, 7) if transposed else (7, 6), dtype=torch.float64)
    entries = entries_for(weight, 11, scale=0.5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def run(x, delta, bias):
        return functional.linear(x, weight, bias, Entries(delta, entries.pattern, entries.base, 0.5), transposed)

    assert torch.autograd.gradcheck(run, (x, entries.delta, bias))


def test_embedding_gradcheck():
    weight = torch.randn(9, 4, dtype=torch.float64)
    entries = entries_for(weight, 13)
    tokens = torch.tensor([[0, 3, 3], [8, 0, 5]])
    assert torch.autograd.gradcheck(
        lambda d: functional.embedding(tokens, weight, Entries(d, entries.pattern, entries.base)), (entries.delta,)
    )


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
def test_embedding_equals_index_put(padding_idx, token_dtype):
    weight = torch.randn(9, 6, dtype=torch.float64)
    entries = entries_for(weight, 30, scale=-0.25)
    tokens = torch.randint(9, (4, 50), dtype=token_dtype)
    tokens[:, ::3] = 8
    factor = torch.randn(4, 50, 6, dtype=torch.float64)
    dense = F.embedding(tokens, dense_weight(weight, entries), padding_idx)
    (expected,) = torch.autograd.grad((dense * factor).sum(), entries.delta)
    sparse = functional.embedding(tokens, weight, entries, padding_idx)
    assert torch.equal(sparse, dense)
    (got,) = torch.autograd.grad((sparse * factor).sum(), entries.delta)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"max_norm": 1.0}, {"max_norm": 0.5, "norm_type": 1.0}, {"scale_grad_by_freq": True}, {"max_norm": 1.0, "padding_idx": 3}],
    ids=str,
)
def test_an_embedding_takes_the_options_of_pytorch(options):
    """Whose own embedding rewrites the rows of its weight to bound their norm; here the weight keeps its values."""
    weight = torch.randn(9, 6, dtype=torch.float64)
    entries = entries_for(weight, 30, scale=-0.25)
    tokens = torch.randint(8, (4, 50))
    factor = torch.randn(4, 50, 6, dtype=torch.float64)
    patched = dense_weight(weight, entries).detach()
    dense = patched.clone().requires_grad_()
    expected = F.embedding(tokens, dense, **options)
    (expected_grad,) = torch.autograd.grad((expected * factor).sum(), dense)
    got = functional.embedding(tokens, weight, entries, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad((got * factor).sum(), entries.delta)
    torch.testing.assert_close(grad, -0.25 * expected_grad.flatten()[entries.indices.long()], rtol=1e-6, atol=1e-12)
    assert torch.equal(weight, patched)
    with torch.no_grad():
        assert torch.equal(functional.embedding(tokens, weight, entries, **options), got)


@pytest.mark.parametrize("tokens", [torch.empty(0, dtype=torch.long), torch.empty(2, 0, dtype=torch.long)])
def test_embedding_of_no_tokens(tokens):
    weight = torch.randn(9, 4)
    entries = entries_for(weight, 13)
    functional.embedding(tokens, weight, entries).sum().backward()
    assert torch.equal(entries.delta.grad, torch.zeros(13))


def test_alias_gradcheck_through_a_convolution():
    weight = torch.randn(3, 2, 3, dtype=torch.float64)
    entries = entries_for(weight, 7)
    x = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, d: F.conv1d(x, functional.alias(weight, Entries(d, entries.pattern, entries.base))), (x, entries.delta)
    )


@pytest.mark.parametrize("scale", [1.0, -0.25])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_equals_index_put(scale, transposed):
    """Also of a weight stored transposed (Hugging Face's `Conv1D`), where the two sides of the sampled product change places."""
    weight = torch.randn((20, 30) if transposed else (30, 20), dtype=torch.float64)
    entries = entries_for(weight, 70, scale)
    x = torch.randn(11, 20, dtype=torch.float64, requires_grad=True)
    dense = dense_weight(weight, entries)
    expected = torch.autograd.grad(F.linear(x, dense.t() if transposed else dense).square().sum(), (x, entries.delta))
    got = torch.autograd.grad(functional.linear(x, weight, None, entries, transposed).square().sum(), (x, entries.delta))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_tokens_and_no_entries():
    weight = torch.randn(4, 3)
    entries = entries_for(weight, 0)
    assert functional.linear(torch.randn(5, 3), weight, None, entries).shape == (5, 4)
    entries = entries_for(weight, 5)
    functional.linear(torch.randn(0, 3), weight, None, entries).sum().backward()
    assert torch.equal(entries.delta.grad, torch.zeros(5))


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.randn(7)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,), (0, 6)])
def test_without_gradients_the_output_has_the_same_bits_and_the_weight_is_written(shape, transposed, bias, cast):
    weight = torch.randn((6, 7) if transposed else (7, 6))
    entries = entries_for(weight, 11)
    x, given = torch.randn(shape), weight.clone()
    with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
        wanted = functional.linear(x, weight, bias, entries, transposed)
        for mode in (torch.no_grad, torch.inference_mode):
            weight.copy_(given)
            with mode():
                found = functional.linear(x, weight, bias, entries, transposed)
            assert torch.equal(found, wanted) and not found.requires_grad
            assert torch.equal(weight, dense_weight(given, entries))


def test_without_gradients_an_embedding_has_the_same_bits_and_its_weight_is_written():
    weight = torch.randn(9, 4)
    entries, given, tokens = entries_for(weight, 13), weight.clone(), torch.tensor([[0, 3, 8], [3, 3, 1]])
    wanted = functional.embedding(tokens, weight, entries, padding_idx=-1)
    weight.copy_(given)
    with torch.no_grad():
        found = functional.embedding(tokens, weight, entries, padding_idx=-1)
    assert torch.equal(found, wanted) and not found.requires_grad
    assert torch.equal(weight, dense_weight(given, entries))


def test_second_derivative_is_refused():
    weight = torch.randn(4, 3, dtype=torch.float64)
    entries = entries_for(weight, 5)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(functional.linear(x, weight, None, entries).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_patch_leaves_the_version_of_the_weight_alone():
    weight = torch.randn(4, 3)
    before = weight._version
    functional.linear(torch.randn(2, 3), weight, None, entries_for(weight, 5))
    assert weight._version == before


def test_a_changed_delta_is_seen_by_autograd():
    """An update between forward and backward would give the gradient of other weights: autograd refuses."""
    weight = torch.randn(4, 3)
    entries = entries_for(weight, 5)
    loss = functional.linear(torch.randn(2, 3), weight, None, entries).sum()
    with torch.no_grad():
        entries.delta.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_a_weight_that_was_cast_holds_the_sum_rounded_once_and_the_bits_of_a_base_that_nothing_is_added_to(dtypes):
    """FSDP2's mixed precision gives a forward the weight in another dtype than that of the base."""
    given, used = dtypes
    base = torch.tensor([-0.0, 0.0, -0.0, 1.0, 3.0], dtype=given)
    delta = torch.tensor([0.0, 0.0, -1e-30, 2**-9 + 2**-20, 0.0], dtype=given)
    weight = torch.full((8,), 7.0, dtype=used)
    Entries(delta, Pattern(torch.arange(1, 6, dtype=torch.int32)), base).write(weight)
    wanted = torch.tensor([-0.0, 0.0, -1e-30, 1.0 + 2**-9 + 2**-20, 3.0], dtype=given).to(used)
    assert torch.equal(weight[1:6], wanted)
    assert torch.equal(weight[1:6].signbit(), wanted.signbit())
    assert weight[0] == weight[6] == weight[7] == 7.0
