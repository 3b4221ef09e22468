"""The operators' schemas, and their fakes: what they return, by shape and dtype. They stand in PyTorch's library `sprand`."""

from __future__ import annotations

import torch

from . import reference
from .dtypes import accumulation_dtype

SCHEMAS = {
    "sddmm": "(Tensor grad_output, Tensor input, Tensor indices, Tensor? table=None, int[] launch=[]) -> Tensor",
    "linear": "(Tensor input, Tensor weight, Tensor? bias, bool transposed=False) -> Tensor",
    "linear_grad": "(Tensor grad_output, Tensor input) -> Tensor",
    "linear_input_grad": (
        "(Tensor grad_output, Tensor weight, Tensor indices, Tensor base, Tensor? delta, float scale, bool transposed) -> Tensor"
    ),
    "embedding_grad": "(Tensor grad_output, Tensor tokens, Tensor indices, int? padding_idx=None) -> Tensor",
    "gather": "(Tensor weight, Tensor indices) -> Tensor",
    "patch_": "(Tensor(a!) weight, Tensor indices, Tensor base, Tensor? delta, float scale=1.0) -> ()",
    "patch_all_": "(Tensor(a!)[] weights, Tensor[] indices, Tensor[] bases, Tensor[]? deltas, float[] scales) -> ()",
    "scatter_add_all_": "(Tensor(a!)[] weights, Tensor[] indices, Tensor[] values, float[] scales) -> ()",
    "sparse_adamw_": (
        "(Tensor(a!)[] weights, Tensor[] indices, Tensor[] bases, Tensor(b!)[] deltas, Tensor[] grads, "
        "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor[] steps, float[] scales, float lr, float beta1, "
        "float beta2, float eps, float weight_decay, bool maximize, Tensor? lr_tensor=None, Tensor? grad_coef=None, "
        "Tensor? found_inf=None) -> ()"
    ),
    "stratified_indices_": "(Tensor(a!) indices, int rows, int cols, int key, int run_rows=1, int run_cols=1) -> ()",
    "uniform_indices_": "(Tensor(a!) indices, int numel, int key) -> ()",
}

# Operators that `reference.py` serves on these devices, since they are products of PyTorch's own.
ON_BLAS = {"linear": ("cpu", "cuda"), "linear_grad": ("cuda",), "linear_input_grad": ("cpu", "cuda")}

_library = torch.library.Library("sprand", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("sprand::linear")
def _(input, weight, bias, transposed=False):
    return input.new_empty(*input.shape[:-1], weight.shape[1 if transposed else 0])


@torch.library.register_fake("sprand::linear_grad")
def _(grad_output, input):
    shape = grad_output.shape[1], input.shape[1]
    return grad_output.new_empty(shape, dtype=accumulation_dtype(grad_output.dtype))


@torch.library.register_fake("sprand::linear_input_grad")
def _(grad_output, weight, indices, base, delta, scale, transposed):
    return grad_output.new_empty(grad_output.shape[0], weight.shape[0 if transposed else 1])


@torch.library.register_fake("sprand::sddmm")
@torch.library.register_fake("sprand::embedding_grad")
def _(grad_output, input, indices, *how):
    return grad_output.new_empty(indices.shape, dtype=accumulation_dtype(grad_output.dtype))


@torch.library.register_fake("sprand::gather")
def _(weight, indices):
    return weight.new_empty(indices.shape)


for _name in (name for name in SCHEMAS if name.endswith("_")):
    torch.library.register_fake(f"sprand::{_name}", lambda *args, **kwargs: None)
