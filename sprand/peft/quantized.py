"""Quantized base layers: the packed weight is never touched; a dense copy of one layer is patched and used, or none at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import quantization_extra_repr
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels import ops
from ..layers.entries import Entries
from ..layers.functional import Product
from ..layers.module import track, untrack
from ..layers.scores import scored
from ..layers.sites import Site
from ..layers.units import Pattern
from .adapter_target import AdapterTarget
from .cpu_packing import keep_stored_layout, set_may_pack
from .layer import SprandLayer
from .plan import packed_site


class QuantizedLayer(SprandLayer):
    """Wraps a quantized linear layer.

    Where PEFT can dequantize the format, forward and backward each make the dense weight of this one layer, write the
    entries `cast(base + sum of delta)` into it, and use it. Where it cannot, the base layer's output gains the product of
    the input with the sparse change.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._shape: tuple[int, ...] = ()
        self._may_pack = False
        track(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        track(self)

    def sparse_sites(self, prefix: str) -> Iterator[Site]:
        """The weight, while adapters are active; its module is this layer, which knows its entries."""
        for parameter, target in self.sprand_targets.items():
            if target.active:
                yield replace(self.sprand_site(parameter), owners=[(self, parameter)])

    @property
    def sparse_active(self) -> bool:
        """Whether adapters are in effect."""
        return any(target.active for target in self.sprand_targets.values())

    def sparse_entries(self, parameter: str = "weight") -> Entries:
        """The entries of the active adapters, on what the packed weight stands for; on zeros where nothing can read it."""
        pattern, delta = self._change(self.sprand_targets[parameter])
        if not self.quantization_backend.supports_merge:
            return Entries(delta, pattern, torch.zeros_like(delta))
        weight = self.quantization_backend.get_base_weight(self.get_base_layer()).contiguous()
        return Entries(delta.to(ops.accumulation_dtype(weight.dtype)), pattern, pattern.gather(weight))

    def sparse_deltas(self) -> Iterator[tuple[nn.Parameter, str]]:
        """The deltas of the active adapters, for `SparseAdamW`, which updates them without writing a weight."""
        return ((target.deltas[name], key) for key, target in self.sprand_targets.items() for name in target.active)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., in]` to `[..., out]`, in the dtype of `x`."""
        target = self.sprand_targets["weight"]
        if not target.active:
            return self.base_layer(x, *args, **kwargs)
        output = self._output(target, x, *args, **kwargs)
        return output if target.scores is None or not torch.is_grad_enabled() else scored(output, x, target.scores)

    def _output(self, target: AdapterTarget, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What `forward` gives, with adapters in effect."""
        (chosen, columns), delta = self._change(target)
        base_layer, given = self.get_base_layer(), x.dtype
        if not self.quantization_backend.supports_merge:
            if columns is None:
                change = _SparseProduct.apply(x, delta, chosen, self._shape[0])
            else:
                change = F.linear(x.index_select(-1, chosen).float(), delta.view(-1, len(chosen)))
            return self.base_layer(x, *args, **kwargs) + change.to(given)
        if torch.is_autocast_enabled(x.device.type):
            x, given = x.to(torch.get_autocast_dtype(x.device.type)), torch.get_autocast_dtype(x.device.type)
        elif getattr(base_layer, "compute_dtype", None) is not None and getattr(base_layer, "compute_type_is_set", True):
            x = x.to(base_layer.compute_dtype)
        bias = None if base_layer.bias is None else base_layer.bias.to(x.dtype)
        read = self.quantization_backend.get_base_weight
        product = Product(x.dtype, transposed=False, trains=torch.is_grad_enabled())
        return _DequantizedLinear.apply(x, bias, delta, chosen, columns, read, base_layer, product).to(given)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: what was trained would be quantized anew, and be another thing.

        Raises:
            ValueError: The weight is quantized.
        """
        raise ValueError(
            f"{self.sprand_targets['weight'].name} is quantized ({self.quantization_backend.backend_name}); merging would "
            "quantize it anew and change what was trained. Save the adapter, load the base model in 16 bits, and merge there: "
            "PeftModel.from_pretrained(base, path).merge_and_unload()"
        )

    def sprand_refresh(self) -> None:
        for target in self.sprand_targets.values():
            target.active = () if self.disable_adapters else tuple(target.known(self.active_adapters))

    def delete_adapter(self, adapter_name: str) -> None:
        for target in self.sprand_targets.values():
            target.active = tuple(name for name in target.active if name != adapter_name)
            target.forget()
        super(SprandLayer, self).delete_adapter(adapter_name)

    def sprand_leave(self) -> None:
        untrack(self)
        set_may_pack(self.get_base_layer(), self._may_pack)
        self.sprand_targets.clear()

    def sprand_site(self, parameter: str) -> Site:
        return packed_site(self.sprand_targets[parameter].name, self.get_base_layer(), self.quantization_backend)

    def sprand_base_of(self, parameter: str, adapter_name: str) -> Tensor | None:
        return None

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def _host(self, site: Site) -> None:
        self.quantization_backend, self._shape = site.backend, site.shape
        self.get_base_layer().requires_grad_(False)
        self._may_pack = keep_stored_layout(self.get_base_layer())

    def _read_base(self, site: Site, target: AdapterTarget, adapter_name: str) -> None:
        """Nothing: the dense copy brings the base with it."""

    def _zeros(self, site: Site, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float32, device=site.device)

    def _change(self, target: AdapterTarget) -> tuple[Pattern, Tensor]:
        """The entries of the active adapters, and their summed delta, float32."""
        names = target.active
        for name in names:
            _settle(target, name)
        if len(names) == 1:
            return target.indices.pattern(names[0]), target.deltas[names[0]].float()
        return target.union(names)[0], target.summed(names, torch.float32)


def _settle(target: AdapterTarget, name: str) -> None:
    """Have the indices of an adapter where its delta is; what was derived from others is dropped."""
    device = target.deltas[name].device
    if target.indices.pattern(name).chosen.device != device or name in target.indices.replaced:
        target.indices.move(name, device)
        target.indices.replaced.discard(name)
        target.forget_positions(name)


def _patched(read: Callable[[nn.Module], Tensor], layer: nn.Module, pattern: Pattern, delta: Tensor) -> Tensor:
    """A dense copy of a packed weight with the entries in it."""
    weight = read(layer).contiguous()
    if any(weight.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in layer.parameters()):
        weight = weight.clone()
    Entries(delta.to(ops.accumulation_dtype(weight.dtype)), pattern, pattern.gather(weight)).write(weight)
    return weight


class _DequantizedLinear(torch.autograd.Function):
    """Forward: y = x W^T + b with W made from the packed weight.  Backward: W made again; dx = dy W, ddelta = (dy^T x)[indices].

    Shapes: x [..., in], dy [..., out], delta [nnz], chosen: indices [nnz] or input features F [c]. Kept for backward: x (of whole
    columns x[:, F]), delta, chosen.
    """

    @staticmethod
    def forward(ctx, input, bias, delta, chosen, columns, read, layer, product):
        weight = _patched(read, layer, Pattern(chosen, columns), delta)
        kept = None
        if ctx.needs_input_grad[2]:
            kept = input if columns is None else input.index_select(-1, chosen)
        ctx.save_for_backward(kept, delta, chosen)
        ctx.read, ctx.layer, ctx.columns, ctx.product = read, layer, columns, product
        return product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        kept, delta, chosen = ctx.saved_tensors
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_delta = None
        if ctx.needs_input_grad[0]:
            grad_input = ctx.product.input_grad(grad_output, _patched(ctx.read, ctx.layer, Pattern(chosen, ctx.columns), delta))
        if ctx.needs_input_grad[2]:
            columns = kept.reshape(-1, kept.shape[-1])
            is_packed = ctx.columns is not None
            sampled = ops.linear_grad(rows, columns).flatten() if is_packed else ops.sddmm(rows, columns, chosen)
            grad_delta = sampled.to(delta.dtype)
        return grad_input, None, grad_delta, None, None, None, None, None


class _SparseProduct(torch.autograd.Function):
    """Forward: y = x S^T with S [out, in] sparse.  Backward: dx = dy S, ddelta = (dy^T x)[indices].

    Shapes: x [..., in], dy [..., out], delta, indices [nnz]. float32 within.
    """

    @staticmethod
    def forward(ctx, input, delta, indices, out_features):
        ctx.save_for_backward(input, delta, indices)
        matrix = _sparse(delta, indices, out_features, input.shape[-1])
        columns = input.reshape(-1, input.shape[-1]).float()
        return torch.sparse.mm(matrix, columns.t()).t().reshape(*input.shape[:-1], out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        input, delta, indices = ctx.saved_tensors
        rows = grad_output.reshape(-1, grad_output.shape[-1]).float().contiguous()
        grad_input = grad_delta = None
        if ctx.needs_input_grad[0]:
            matrix = _sparse(delta, indices, rows.shape[-1], input.shape[-1])
            grad_input = torch.sparse.mm(matrix.t(), rows.t()).t().to(input.dtype).reshape(input.shape)
        if ctx.needs_input_grad[1]:
            grad_delta = ops.sddmm(rows, input.reshape(-1, input.shape[-1]).float(), indices).to(delta.dtype)
        return grad_input, grad_delta, None, None


def _sparse(delta: Tensor, indices: Tensor, rows: int, columns: int) -> Tensor:
    flat = indices.long()
    return torch.sparse_coo_tensor(torch.stack([flat // columns, flat % columns]), delta, (rows, columns), is_coalesced=True)
