"""SynFlow's pass: the gradient of the sum of outputs of a model of absolute weights without nonlinearities, for ones as input."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .batches import call, mapped

ACTIVATIONS = {
    getattr(owner, name)
    for owner in (torch, Tensor, F)
    for name in (
        "celu", "elu", "gelu", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu_", "relu6", "selu", "sigmoid", "silu",
        "softplus", "softsign", "tanh",
    )
    if hasattr(owner, name)
}  # fmt: skip
ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")
LABELS = ("labels", "label", "label_ids")
NOT_POINTWISE = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmax2d)


class Linear(TorchFunctionMode):
    """Activations become the identity, and a normalization a product with its weight and its scale, held constant.

    (The softmax of attention stays: over the one token of the input it is 1.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in ACTIVATIONS:
            return args[0]
        if func in (F.layer_norm, F.rms_norm):
            return _normed(*args, **kwargs)
        result = func(*args, **kwargs)
        return result.detach() if func in (torch.rsqrt, Tensor.rsqrt) else result


def flow(model: nn.Module, batch: Any = None, has_loss: bool = False) -> None:
    """Run the pass forward and backward; targets that require a gradient get it, and the weights are as they were.

    Args:
        model: in evaluation mode.
        batch: what shapes the input has, for a model that takes neither `inputs_embeds` nor the input of its first layer.
        has_loss: a loss function is given, for which the last of a tuple or list is labels.

    Raises:
        ValueError: No input of ones can be made for this model, or it cannot be called with what the batch has.
    """
    with ExitStack() as stack:
        stack.enter_context(_absolute(model))
        for module in model.modules():
            if type(module).__module__ in ACTIVATION_MODULES and not isinstance(module, NOT_POINTWISE):
                stack.callback(module.register_forward_hook(_input_of).remove)
            if isinstance(module, nn.Embedding) and batch is not None:
                stack.callback(module.register_forward_hook(_ones_of).remove)
        stack.enter_context(Linear())
        output = _ones_through(model) if batch is None else _ones_like_batch(model, batch, has_loss)
        if not isinstance(output, Tensor):
            output = output.logits if hasattr(output, "logits") else output[0]
        output.sum().backward()


def _input_of(module: nn.Module, inputs: Sequence[Any], output: Any) -> Any:
    return inputs[0]


def _ones_of(module: nn.Module, inputs: Sequence[Any], output: Tensor) -> Tensor:
    return torch.ones_like(output)


def _ones_like_batch(model: nn.Module, batch: Any, has_loss: bool) -> Any:
    """The output for the inputs of a batch, whose floating point tensors are ones."""
    inputs = inputs_of(model, batch, has_loss)
    if has_loss or (isinstance(batch, (Mapping, tuple, list)) and len(inputs) < len(batch)):
        warnings.warn("synflow: of data it takes what the model's forward needs; labels and loss_fn play no part", stacklevel=2)
    try:
        return call(model, mapped(inputs, lambda value: torch.ones_like(value) if value.is_floating_point() else value))
    except Exception as error:
        raise ValueError(
            f"synflow: this {type(model).__name__} cannot be called with the inputs of the data ({error}); give data= with one "
            "batch of the model's input and nothing else"
        ) from error


def inputs_of(model: nn.Module, batch: Any, has_loss: bool) -> Any:
    """What of a batch is input: what the forward takes, of a tuple that goes with a loss without labels, its last, if it can."""
    parameters = inspect.signature(model.forward).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    if isinstance(batch, Mapping):
        takes_any = inspect.Parameter.VAR_KEYWORD in kinds
        return {key: value for key, value in batch.items() if key not in LABELS and (takes_any or key in parameters)}
    if isinstance(batch, (tuple, list)):
        takes_any = inspect.Parameter.VAR_POSITIONAL in kinds
        taken = [parameter for parameter in parameters.values() if parameter.kind < inspect.Parameter.VAR_POSITIONAL]
        needed = sum(parameter.default is inspect.Parameter.empty for parameter in taken)
        most = len(batch) if takes_any else len(taken)
        return batch[: min(most, max(1, needed, len(batch) - has_loss))]
    return batch


def _ones_through(model: nn.Module) -> Any:
    """The output for one token, or one row, of ones."""
    some = next(model.parameters())
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is not None:
        width = embedding.weight.shape[-1]
        return model(inputs_embeds=torch.ones(1, 1, width, dtype=some.dtype, device=some.device))
    first = next((module for module in model.modules() if isinstance(module, nn.Linear)), None)
    try:
        return model(torch.ones(1, first.in_features, dtype=some.dtype, device=some.device))
    except Exception as error:
        raise ValueError(
            f"synflow: no input of ones can be made for this {type(model).__name__} ({error}); give data= with one batch of the "
            "model's input"
        ) from error


@contextmanager
def _absolute(model: nn.Module) -> Iterator[None]:
    """Clear the signs of all parameters, and put them back bit for bit; between, they take one bit per entry."""
    signs = []
    try:
        for p in model.parameters():
            if p.is_floating_point():
                signs.append((p, _pack(torch.signbit(p.data))))
                p.data.abs_()
        yield
    finally:
        for p, packed in signs:
            negative = _unpack(packed, p.shape)
            p.data.copy_(torch.where(negative, -p.data, p.data))


def _pack(bits: Tensor) -> Tensor:
    bits = F.pad(bits.flatten().to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: shape.numel()].view(shape).bool()


def _normed(
    input: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """The normalization of the last dimensions, of `shape`, by a scale through which no gradient flows."""
    axes = tuple(range(-len(shape), 0))
    mean_square = input.float().square().mean(axes, keepdim=True)
    if not eps:
        eps = torch.finfo(input.dtype).eps
    scale = torch.rsqrt(mean_square + eps).to(input.dtype)
    result = input * scale.detach()
    if weight is not None:
        result = result * weight
    return result if bias is None else result + bias
