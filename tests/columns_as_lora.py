"""What the tests of LoRA share: trained adapters of whole columns, and the weights that stock PEFT makes of a LoRA."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import sprand
from peft_models import llama, peft, train, trainable
from sprand.layers.units import Units
from sprand.peft import SprandConfig

PREFIX = "base_model.model."


def columns(shape, count: int, seed: int = 0, axis: int = 1) -> torch.Tensor:
    """The flat indices of some columns of a weight seen as a matrix, or of some of its rows."""
    units = Units.of((shape[0], torch.Size(shape[1:]).numel()), axis)
    chosen = torch.randperm(units.count, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return units.entries(chosen)


def mask_of(model: nn.Module, *names: str) -> dict[str, torch.Tensor]:
    """Three columns of the weights whose modules are called so."""
    ends = tuple(f"{name}.weight" for name in names)
    return {name: columns(p.shape, 3, number) for number, (name, p) in enumerate(model.named_parameters()) if name.endswith(ends)}


def trained(dtype: torch.dtype = torch.float32, **fields) -> peft.PeftModel:
    """Three or four columns of the weights with 32 of them, five of those with 48."""
    wrapped = peft.get_peft_model(llama().to(dtype), SprandConfig(layout="columns", density=0.1, **fields))
    train(wrapped, torch.optim.AdamW(trainable(wrapped), lr=1e-2))
    return wrapped.eval()


def merged(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The weights that stock PEFT makes of a LoRA."""
    stock = peft.PeftModel.from_pretrained(llama().to(dtype), folder)
    assert isinstance(stock.peft_config["default"], peft.LoraConfig)
    return dict(stock.merge_and_unload().state_dict())


def own(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    return dict(model.merge_and_unload().state_dict())


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every trained value at random."""
    torch.manual_seed(seed)
    for p in sprand.parameters(model):
        p.data.normal_(0, 0.1)
    sprand.write(model)
    return model.eval()
