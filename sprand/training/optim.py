"""`SparseAdamW`: AdamW whose step also writes the trained entries into their weights, in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..layers import sharding
from ..layers.entries import Entries, WatchedParameter
from ..layers.module import SparseModule, targets_by_delta
from ..layers.sites import named_parameters

Target = tuple[nn.Parameter, nn.Parameter, Entries]  # a delta, its weight, and its entries
Targets = Mapping[int, tuple[SparseModule, str]]  # by the identity of a delta, the module and name of its weight


class SparseAdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101) over deltas, fused with the write of `base + scale * delta` into the weights.

    It is a speed-up, never a requirement: any torch optimizer over `sprand.parameters(model)` is correct as well. State
    and parameter groups are those of `torch.optim.AdamW`, so a `state_dict` loads into either. Dense parameters in the
    same groups (a trained head, say) take torch's own fused AdamW.

    Weight decay pulls a delta to zero, that is its weight back to the pre-trained value.

    A step leaves every weight up to date, and the next forward does not write it again, unless its delta has changed, be it
    through `delta.data`.

    Under DistributedDataParallel the step is fused. Under FSDP2 and ZeRO deltas are sharded, dense parameters to it: the step is
    that of `torch.optim.AdamW(fused=True)`, and layers write their weights. DeepSpeed asks for `"zero_allow_untested_optimizer":
    true` in its configuration; `torch.optim.AdamW` needs no flag there.

    Args:
        params: a model, or parameters as for any optimizer: an iterable of parameters, of groups (dicts), or of named
            parameters. Of a model, everything that requires a gradient.
        lr: learning rate; a float, or a one-element tensor with `capturable`.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, towards the pre-trained weight.
        maximize: climb instead of descend.
        capturable: as in `torch.optim.AdamW`; decides where a loaded `step` goes. A new one is on the device in any case.
        max_grad_norm: clip the norm of all gradients to this value; the factor is applied as the gradients are read.
        amsgrad: refused; torch's optimizer has it.
        differentiable: refused; torch's optimizer has it.

    Attributes:
        grad_norm: norm of all gradients before clipping, from the last step, a tensor; None without `max_grad_norm`.

    Raises:
        ValueError: No delta is among the parameters, or an option is one that this optimizer does not have.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        capturable: bool = False,
        max_grad_norm: float | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
    ) -> None:
        if amsgrad or differentiable:
            raise ValueError(
                "SparseAdamW has no amsgrad and no differentiable; use torch.optim.AdamW(sprand.parameters(model), ...)"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm!r}")
        if isinstance(params, nn.Module):
            params = [item for item in named_parameters(params) if item[1].requires_grad]
            if not params:
                raise ValueError("SparseAdamW: this model trains nothing; call sprand.apply(model, ...) first")
        self.max_grad_norm, self.grad_norm = max_grad_norm, None
        self._step_supports_amp_scaling = True  # torch.amp.GradScaler hands over grad_scale and found_inf
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, capturable=capturable)
        deltas = targets_by_delta()
        if not any(id(p) in deltas for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "SparseAdamW: none of these parameters is a sprand delta; call sprand.apply(model, ...) first, or use "
                "torch.optim.AdamW"
            )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "max_grad_norm": self.max_grad_norm,
            "grad_norm": None,
            "_step_supports_amp_scaling": True,
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in any optimizer."""
        super().add_param_group(param_group)
        deltas = targets_by_delta()
        for p in self.param_groups[-1]["params"]:
            if id(p) in deltas:
                WatchedParameter.watch(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step, and the write of the weights.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            What closure returns, or None.

        Raises:
            RuntimeError: A gradient is a `torch.sparse` tensor, or a parameter has another shape than before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        coefs, targets = self._gradient_factor(grad_scale), targets_by_delta()
        for group in self.param_groups:
            fused, dense = self._divided(group["params"], targets)
            for device in {p.device for p in dense}:
                there = [p for p in dense if p.device == device]
                self._dense_step(there, group, coefs.get(device), _on(found_inf, device))
            for device in {p.device for p, _, _ in fused}:
                there = [item for item in fused if item[0].device == device]
                self._sparse_step(there, group, coefs.get(device), _on(found_inf, device))
        return loss

    def _divided(self, params: list[nn.Parameter], targets: Targets) -> tuple[list[Target], list[nn.Parameter]]:
        """The parameters with a gradient: deltas that the fused step takes, each with its weight, and all others."""
        fused, dense = [], []
        for p in params:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(
                    "SparseAdamW: expected dense gradients, got a torch.sparse one; use torch.optim.SparseAdam for it"
                )
            self._init_state(p)
            target = targets.get(id(p))
            entries = None if target is None else _fusable(p, *target)
            if entries is not None:
                fused.append((p, target[0]._parameters[target[1]], entries))
            else:
                dense.append(p)
        return fused, dense

    def _gradient_factor(self, grad_scale: Tensor | None) -> dict[torch.device, Tensor]:
        """What gradients are multiplied by as they are read: one over the loss scale, times the clipping factor."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = None if self.max_grad_norm is None else torch.zeros(())
        if not grads or (grad_scale is None and self.max_grad_norm is None):
            return {}
        factor = torch.ones((), dtype=torch.float64, device=grads[0].device)
        if grad_scale is not None:
            factor = grad_scale.to(factor).reciprocal()
        if self.max_grad_norm is not None:
            if any(sharding.is_of_fsdp1(p) for group in self.param_groups for p in group["params"]):
                raise ValueError(
                    "SparseAdamW: max_grad_norm sees the gradients of one rank under FullyShardedDataParallel (FSDP1); call its "
                    "clip_grad_norm_ before the step instead, or shard by fully_shard (FSDP2)"
                )
            norm = torch.nn.utils.get_total_norm(grads)
            self.grad_norm = sharding.whole(norm) * factor
            clipped = self.max_grad_norm / (self.grad_norm + 1e-6)
            factor = factor * clipped.clamp(max=1.0)
        double = all(grad.dtype == torch.float64 for grad in grads)
        dtype = torch.float64 if double else torch.float32
        return {device: factor.to(device=device, dtype=dtype) for device in {grad.device for grad in grads}}

    def _sparse_step(self, items: list[Target], group: dict[str, Any], coef: Tensor | None, found_inf: Tensor | None) -> None:
        deltas = [p for p, _, _ in items]
        weights = [weight for _, weight, _ in items]
        entries = [own for _, _, own in items]
        exp_avgs, exp_avg_sqs, steps = self._advanced(deltas, found_inf)
        ops.sparse_adamw_(
            [e.pattern.view(weight.data) for weight, e in zip(weights, entries, strict=True)],
            [e.pattern.chosen for e in entries],
            [e.base for e in entries],
            [p.data for p in deltas],
            [p.grad for p in deltas],
            exp_avgs,
            exp_avg_sqs,
            steps,
            [e.scale for e in entries],
            grad_coef=coef,
            found_inf=found_inf,
            **_options_of(group),
        )
        torch.autograd.graph.increment_version(deltas)
        for weight, entry in zip(weights, entries, strict=True):
            if entry.written is not None:
                entry.written.forget() if found_inf is not None else entry.written.declare(weight, entry.delta, entry.scale)

    def _dense_step(
        self, params: list[nn.Parameter], group: dict[str, Any], coef: Tensor | None, found_inf: Tensor | None
    ) -> None:
        grads = [p.grad if coef is None else p.grad * coef.to(p.grad.dtype) for p in params]
        exp_avgs, exp_avg_sqs, steps = self._advanced(params, found_inf)
        options = _options_of(group)
        torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, found_inf=found_inf, **options)

    def _advanced(self, params: list[nn.Parameter], found_inf: Tensor | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The first and second moments of parameters, and their steps, which go on by one unless a gradient overflowed."""
        states = [self.state[p] for p in params]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        return [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], steps

    def _init_state(self, p: nn.Parameter) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        elif state["exp_avg"].shape != p.shape:
            raise RuntimeError(
                f"SparseAdamW: a parameter is {list(p.shape)} now, and its moments are {list(state['exp_avg'].shape)}; make the "
                "optimizer anew where the model was resized"
            )
        elif state["step"].device != p.device:  # a state of torch.optim.AdamW keeps step on the CPU
            state["step"] = state["step"].to(p.device)


def _fusable(p: nn.Parameter, module: SparseModule, name: str) -> Entries | None:
    """The entries of a delta that the fused step can take; one that others cast, sharded or moved is a dense parameter to it."""
    if not isinstance(module, SparseModule):  # the delta of a weight that is stored packed
        return None
    weight = module._parameters[name]
    if sharding.is_sharded(p) or type(p.data) is not Tensor or type(weight.data) is not Tensor or not weight.is_contiguous():
        return None
    entries = module.sparse_entries(name)
    own = entries.delta is p and module.sparse_active
    same_dtypes = entries.base.dtype == weight.dtype and p.dtype == ops.accumulation_dtype(weight.dtype)
    return entries if own and same_dtypes and p.device == weight.device else None


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group, by the names that the operators of both steps give them."""
    beta1, beta2 = group["betas"]
    names = ("lr", "eps", "weight_decay", "maximize")
    return {"beta1": beta1, "beta2": beta2} | {name: group[name] for name in names}


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)
