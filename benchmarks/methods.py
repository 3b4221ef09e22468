"""The contestants: a small Llama with random weights, and every method of training it, behind one training step."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

VOCABULARY = 1024
LEARNING_RATE = 1e-3
PEER_DENSITY = 0.01
OURS = {"sprand": ("sprand", "unstructured"), "sprand-columns": ("sprand, columns", "columns")}  # label and layout
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
METHODS = ("frozen", "sprand", "sprand-columns", "lora", "lora-bf16", "shira", "peft-sparta", "supertuning", "full")
ON_PEFT = ("frozen", "shira", "shira-accelerated", "supertuning", "supertuning-accelerated", "sprand-peft")

Attach = Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer | None]]


class Unavailable(Exception):
    """A method that cannot run here, with the reason."""


@dataclass(frozen=True)
class Method:
    """One row of the table: what to call it, and how to attach it to a loaded model."""

    key: str
    label: str
    density: float | None
    attach: Attach


@dataclass
class Times:
    """Seconds of one training step, by phase."""

    forward: float
    backward: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer


@dataclass
class Trainer:
    """One method on its own copy of the model.

    Attributes:
        model: the model with the method attached.
        optimizer: None for the frozen model.
        tokens: `[batch, length]` token ids, the labels as well.
        losses: the loss of every step taken so far.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    tokens: Tensor
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, method: Method, base: nn.Module, tokens: Tensor) -> Trainer:
        """Attach `method` to `base`, which is changed.

        Raises:
            Unavailable: the package it needs is not installed.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, optimizer = method.attach(base)
        except ImportError as error:
            raise Unavailable(f"not installed: {error.name or error}") from error
        model.train()
        return cls(model, optimizer, tokens)

    @property
    def trained(self) -> int:
        """How many scalars the optimizer updates."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return sum(p.numel() for group in groups for p in group["params"])

    def loss(self) -> Tensor:
        return self.model(input_ids=self.tokens, labels=self.tokens).loss

    def step(self) -> Times:
        """Forward, loss, backward, optimizer step, zero_grad."""
        start = time.perf_counter()
        loss = self.loss()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        self.losses.append(loss.item())
        return Times(forward - start, backward - forward, end - backward)


def build(width: int, layers: int, dtype: str, checkpointing: bool = False) -> nn.Module:
    """A Llama with random weights whose embedding output requires grad, as for every method.

    Args:
        width: hidden size; heads of 64, feed-forward width 2.75 times that, rounded up to a multiple of 64.
        layers: decoder layers.
        dtype: "fp32" or "bf16".
        checkpointing: recompute each layer's activations in backward (non-reentrant).

    Raises:
        Unavailable: transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM, LlamaConfig
    except ImportError as error:
        raise Unavailable(f"not installed: {error.name}") from error
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=-(-width * 11 // 4 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        num_key_value_heads=max(width // 64, 1),
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def random_tokens(tokens: int, length: int | None = None) -> Tensor:
    """`[batch, length]` token ids: sequences of `length`; by default of 512, or one where 512 does not divide `tokens`."""
    length = length or (512 if tokens % 512 == 0 else tokens)
    return torch.randint(0, VOCABULARY, (tokens // length, length), generator=torch.Generator().manual_seed(0))


def fresh(base: nn.Module) -> nn.Module:
    """A copy of the built model for one more method."""
    return copy.deepcopy(base)


def expand(names: Sequence[str], densities: Sequence[float], dtype: str) -> list[Method]:
    """The methods to run, those of `OURS` once per density, peers at the count of `PEER_DENSITY`."""
    methods = []
    for name in names:
        if name in OURS:
            label, layout = OURS[name]
            methods += [
                Method(f"{name}@{d:g}", f"{label} {100 * d:g} %", d, partial(attach_sprand, density=d, layout=layout))
                for d in densities
            ]
        elif name != "lora-bf16" or dtype == "bf16":
            label, density, attach = PEERS[name]
            methods.append(Method(name, label, density, attach))
    return methods


def at(name: str, density: float) -> Method:
    """LoRA or SHiRA at the rank whose count is nearest to `density` of the linears."""
    label, _, attach = PEERS[name]
    return Method(f"{name}@{density:g}", f"{label} {100 * density:g} %", density, partial(attach, density=density))


def attach_frozen(model: nn.Module) -> tuple[nn.Module, None]:
    """Nothing trains: forward, and backward down to the embedding output. The floor of any method."""
    return model.requires_grad_(False), None


def attach_full(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Every weight trains, weights and moments in the model's dtype."""
    return model, adamw(model.parameters())


def attach_sprand(model: nn.Module, density: float, layout: str = "unstructured") -> tuple[nn.Module, torch.optim.Optimizer]:
    """This project, with its own optimizer."""
    import sprand

    model = sprand.apply(model, density=density, layout=layout, seed=0)
    return model, sprand.SparseAdamW(model, lr=LEARNING_RATE)


def attach_lora(
    model: nn.Module, autocast: bool = True, density: float = PEER_DENSITY
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """PEFT LoRA at the rank with the nearest count; by PEFT's default its weights are fp32 on a bf16 model."""
    from peft import LoraConfig, get_peft_model

    names, rank = targets(model), matching_rank(model, density)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names), autocast_adapter_dtype=autocast)
    return model, adamw(model.parameters())


def attach_shira(model: nn.Module, density: float = PEER_DENSITY) -> tuple[nn.Module, torch.optim.Optimizer]:
    """PEFT SHiRA with its random mask, which counts in LoRA ranks."""
    from peft import ShiraConfig, get_peft_model

    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, said aloud: it warns otherwise
    config = ShiraConfig(r=matching_rank(model, density), mask_type="random", random_seed=0, target_modules=targets(model))
    model = get_peft_model(model, config)
    return model, adamw(model.parameters())


def attach_peft_sparta(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """peft-sparta, which counts over the whole model: the sparsity is set so that the same linears get the same count."""
    from peft_sparta import SpaRTA

    total = sum(p.numel() for p in model.parameters())
    count = PEER_DENSITY * sum(layer.weight.numel() for layer in linears(model).values())
    model = SpaRTA(model, sparsity=1 - count / total, frozen_modules=["embed_tokens", "lm_head", "norm"])
    return model, adamw(model.parameters())


def attach_supertuning(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """PEFT Super-Tuning: the largest entries of every linear."""
    from peft import SupertuningConfig, get_peft_model

    model = get_peft_model(model, SupertuningConfig(sparsity=1 - PEER_DENSITY, target_modules=targets(model)))
    return model, adamw(model.parameters())


def attach_accelerated(model: nn.Module, attach: Attach) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of PEFT's, moved to this project's kernels in place, with this project's optimizer."""
    import sprand
    from sprand.peft import accelerate

    model = accelerate(attach(model)[0])
    return model, sprand.SparseAdamW(model, lr=LEARNING_RATE)


def attach_sprand_peft(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """This project as a PEFT method."""
    from peft import get_peft_model

    import sprand
    from sprand.peft import SprandConfig

    model = get_peft_model(model, SprandConfig(density=PEER_DENSITY, target_modules=targets(model)))
    return model, sprand.SparseAdamW(model, lr=LEARNING_RATE)


PEERS: dict[str, tuple[str, float | None, Attach]] = {
    "frozen": ("frozen model", None, attach_frozen),
    "lora": ("PEFT LoRA", PEER_DENSITY, attach_lora),
    "lora-bf16": ("PEFT LoRA, bf16 adapter", PEER_DENSITY, partial(attach_lora, autocast=False)),
    "shira": ("PEFT SHiRA", PEER_DENSITY, attach_shira),
    "peft-sparta": ("peft-sparta", PEER_DENSITY, attach_peft_sparta),
    "supertuning": ("PEFT Super-Tuning", PEER_DENSITY, attach_supertuning),
    "full": ("full AdamW", 1.0, attach_full),
    "shira-accelerated": ("PEFT SHiRA, accelerated", PEER_DENSITY, partial(attach_accelerated, attach=attach_shira)),
    "supertuning-accelerated": (
        "PEFT Super-Tuning, accelerated",
        PEER_DENSITY,
        partial(attach_accelerated, attach=attach_supertuning),
    ),
    "sprand-peft": ("sprand as a PEFT method", PEER_DENSITY, attach_sprand_peft),
}


def adamw(parameters) -> torch.optim.Optimizer:
    """The fastest AdamW of torch over whatever trains."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=LEARNING_RATE, fused=True)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All Linear modules but the output head, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


def targets(model: nn.Module) -> list[str]:
    """The last parts of their names, as PEFT wants them."""
    return sorted({name.rsplit(".", 1)[-1] for name in linears(model)})


def matching_rank(model: nn.Module, density: float = PEER_DENSITY) -> int:
    """The rank at which r * (in + out) over all targets is nearest to `density` of their entries."""
    layers = linears(model).values()
    entries = sum(layer.weight.numel() for layer in layers)
    return max(round(density * entries / sum(layer.in_features + layer.out_features for layer in layers)), 1)
