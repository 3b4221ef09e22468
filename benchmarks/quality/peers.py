"""The peers of a quality benchmark at the trained count of a budget: PEFT LoRA and SHiRA, peft-sparta, a head, all weights."""

from __future__ import annotations

import dataclasses
import importlib
import math

import torch
from torch import Tensor, nn

import sprand
from sprand.cli.finetune import methods
from sprand.cli.finetune.models import head_names
from sprand.cli.finetune.settings import Settings

ADAPTERS = ("lora", "shira", "peft-sparta")
PEERS = (*ADAPTERS, "full", "head", "untrained")
LAYER_KINDS = {"attention": ("q", "k", "v", "o"), "query and value": ("q", "v"), "value": ("v",)}  # subsets an adapter may take
NAMES = {
    "q": ("q_proj", "query"),
    "k": ("k_proj", "key"),
    "v": ("v_proj", "value"),
    "o": ("o_proj", "attention.output.dense"),
}


class Sparta(nn.Module):
    """peft-sparta's model with the `train` and `eval` of a torch module, which it overrides with other signatures."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> object:
        return self.inner(**inputs)

    def train(self, mode: bool = True) -> Sparta:
        self.training = mode
        self.inner.train() if mode else self.inner.eval()
        return self


def attach(name: str, model: nn.Module, lr: float | None, budget: float | None, settings: Settings) -> methods.Method:
    """A peer with as many trained weights as a budget of sprand's, as nearly as its own units allow.

    Args:
        name: one of `PEERS` but "untrained".
        model: changed in place.
        lr: its learning rate.
        budget: fraction of the targeted weights; not for "full" and "head".
        settings: the options of the run.
    """
    if name not in ADAPTERS:
        return methods.peer(name, model, settings, [], 0)
    config = methods.sparse_config(dataclasses.replace(settings, density=budget), model)
    target = sprand.select(model, config).nnz
    if name == "peft-sparta":
        return _sparta(model, target, lr, settings)
    where, layers = fit(model, target)
    if name == "lora":
        own = dataclasses.replace(settings, compare_lr=(("lora", lr),))
        method = methods.peer("lora", model, own, layers, target + head_size(model))
    else:
        method = _shira(model, layers, target, lr, settings)
    count = method.count - head_size(model)
    far = "" if abs(count / target - 1) < 0.1 else f"; nearest it can do to {target:,}"
    return dataclasses.replace(method, note=f"{method.note}, {where}{far}")


def fit(model: nn.Module, target: int) -> tuple[str, list[str]]:
    """The choice of layers whose count at some rank is nearest to `target`; the widest choice of those within 15 %."""
    linear = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] not in ("lm_head", "classifier")
    ]
    choices = [("all linears", linear)]
    for name, kinds in LAYER_KINDS.items():
        choices.append((name, of_kinds(linear, kinds)))
    values = choices[-1][1]
    choices += [(f"value, last {count} layers", values[-count:]) for count in range(len(values) - 1, 0, -1)]
    fits = []
    for order, (name, layers) in enumerate(choice for choice in choices if choice[1]):
        per_rank = _per_rank(model, layers)
        rank = max(1, round(target / per_rank))
        off = abs(math.log(rank * per_rank / target))
        fits.append((0.0 if off < 0.15 else off, order, name, layers))
    return min(fits)[2:]


def head_size(model: nn.Module) -> int:
    """Weights of a new head, which every method trains and no budget counts."""
    return sum(p.numel() for name in head_names(model) for p in model.get_submodule(name).parameters())


def of_kinds(layers: list[str], kinds: tuple[str, ...]) -> list[str]:
    """Those of the layers that are of some kinds, of `NAMES`."""
    suffixes = tuple(suffix for kind in kinds for suffix in NAMES[kind])
    return [name for name in layers if name.endswith(suffixes)]


def _per_rank(model: nn.Module, layers: list[str]) -> int:
    return sum(sum(model.get_submodule(n).weight.shape) for n in layers)


def sparse_shira(model: nn.Module, rank: int, targets: list[str], seed: int, heads: list[str] | None = None) -> nn.Module:
    """PEFT's SHiRA with its random mask, `rank * (in + out)` entries of each target."""
    peft = importlib.import_module("peft")
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, said aloud: it warns otherwise
    config = peft.ShiraConfig(r=rank, mask_type="random", random_seed=seed, target_modules=targets, modules_to_save=heads)
    return peft.get_peft_model(model, config)


def _shira(model: nn.Module, layers: list[str], target: int, lr: float | None, settings: Settings) -> methods.Method:
    rank = max(1, round(target / _per_rank(model, layers)))
    wrapped = sparse_shira(model, rank, layers, settings.seed, head_names(model) or None)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    return _method("shira", wrapped, trained, lr, f"rank {rank}", settings)


def _sparta(model: nn.Module, target: int, lr: float | None, settings: Settings) -> methods.Method:
    """Random entries of the value and output projections, as its authors recommend; drawn one by one, so the count varies."""
    package = importlib.import_module("peft_sparta")
    heads = {id(p) for name in head_names(model) for p in model.get_submodule(name).parameters()}
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    trained = {f"{name}.weight" for name in of_kinds(linear, ("v", "o"))}
    frozen = [name for name, _ in model.named_parameters() if name not in trained]

    class WithHead(package.SpaRTA):
        """It trains a head in full where it is called `score.weight`; here by whatever name."""

        def sample_trainable(self, param: Tensor, keep_prob: float) -> Tensor:
            return super().sample_trainable(param, 1.0 if id(param) in heads else keep_prob)

    torch.manual_seed(settings.seed)
    sparsity = 1 - target / sum(p.numel() for p in model.parameters())
    inner = WithHead(model, sparsity=sparsity, frozen_modules=frozen)
    return _method("peft-sparta", Sparta(inner), dict(inner.named_parameters()), lr, "value and output projections", settings)


def _method(
    name: str, model: nn.Module, trained: dict[str, nn.Parameter], lr: float | None, note: str, settings: Settings
) -> methods.Method:
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=settings.weight_decay, fused=True)
    return methods.Method(name, model, trained, optimizer, lr, note)
