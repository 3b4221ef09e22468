"""Frozen linear layers without trained entries, such as an output head: in training they compute as the layers with entries do.

That is, in float32 where a CPU has no product of 16-bit operands. Such a module keeps its class and its state; its forward is
replaced on the object, and comes back when the entries are out of effect.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.products import lacks_product, may_lack_product
from .functional import Product, as_autocast
from .module import SparseModule, is_transposed

FORWARD, REPLICATE = "forward", "_replicate_for_data_parallel"
ORDINARY = Tensor, nn.Parameter  # a weight of another class may be packed, or a part

_replaced: weakref.WeakKeyDictionary[nn.Module, UntargetedForward] = weakref.WeakKeyDictionary()


def follow(model: nn.Module) -> None:
    """Let the untargeted linear layers of a model compute as they should from now on.

    Called when entries come into effect and when they leave it.
    """
    modules = list(model.modules())
    trains = any(hasattr(type(module), "sparse_sites") and module.sparse_active for module in modules)
    for module in modules:
        replaced = _replaced.get(module)
        if replaced is not None:
            replaced.trains = trains and not isinstance(module, SparseModule)
            if not replaced.trains:
                replaced.leave()
        elif trains and FORWARD not in module.__dict__ and not isinstance(module, SparseModule):
            transposed = is_transposed(type(module))
            if transposed is not None:
                UntargetedForward(module, transposed)


class UntargetedForward:
    """Stands in for the forward of a linear layer. It knows the module by a weak reference, so that both are freed at once.

    Args:
        module: gets this forward.
        transposed: whether its weight is `[in, out]`.

    Attributes:
        trains: whether entries of the model are in effect; another tool may hold this forward when they no longer are.
    """

    def __init__(self, module: nn.Module, transposed: bool) -> None:
        self.module, self.transposed, self.trains = weakref.ref(module), transposed, True
        module.__dict__.update({FORWARD: self, REPLICATE: self.replicate})
        _replaced[module] = self

    def __call__(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        module = self.module()
        if self.trains and torch.is_grad_enabled() and input.requires_grad:
            weight, lacks = module.weight, may_lack_product if torch.compiler.is_compiling() else lacks_product
            used, bias, cast = as_autocast(input, module.bias)
            if lacks(used) and type(weight) in ORDINARY and not weight.requires_grad and used.dtype == (cast or weight.dtype):
                return _FrozenLinear.apply(used, weight, bias, Product(cast, self.transposed, trains=True))
        return type(module).forward(module, input)

    def replicate(self) -> nn.Module:
        """What `nn.DataParallel` takes to a GPU: a module with the forward of its class."""
        module = self.module()
        replica = type(module)._replicate_for_data_parallel(module)
        del replica.__dict__[FORWARD], replica.__dict__[REPLICATE]
        return replica

    def leave(self) -> None:
        """Give the module its own forward back, unless another tool has put one over this."""
        module = self.module()
        if module.__dict__.get(FORWARD) is self:
            del module.__dict__[FORWARD], module.__dict__[REPLICATE], _replaced[module]

    def __reduce__(self) -> tuple[Any, ...]:
        return UntargetedForward, (self.module(), self.transposed)


class _FrozenLinear(torch.autograd.Function):
    """Forward: y = x W^T + b.  Backward: dx = dy W, db = sum dy.  Shapes: x [..., in], W [out, in], dy [..., out]."""

    @staticmethod
    def forward(ctx, input, weight, bias, product):
        ctx.save_for_backward(weight)
        ctx.product = product
        return product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (weight,) = ctx.saved_tensors
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return ctx.product.input_grad(grad_output, weight), None, grad_bias, None
