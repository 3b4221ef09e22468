"""What `suggest_lr` and `visible_share` say of every kind of PEFT model: the same as of an ordinary one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import sprand
from peft_models import peft, trainable
from sprand.peft import SprandConfig, accelerate

IN, OUT, DENSITY = 64, 128, 0.0625


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT, bias=False))


def sparse() -> nn.Module:
    return peft.get_peft_model(plain(), SprandConfig(density=DENSITY, target_modules=["0"]))


def injected() -> nn.Module:
    return peft.inject_adapter_in_model(SprandConfig(density=DENSITY, target_modules=["0"]), plain())


def quantized(kind: str) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes quantizes the base")
        weight = plain()[0].weight.data
        if kind == "nf4":
            linear = bnb.nn.Linear4bit(IN, OUT, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=64)
        else:
            linear = bnb.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
            linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        model = nn.Sequential(linear.to("cpu"))
        return peft.get_peft_model(model, SprandConfig(density=DENSITY, target_modules=["0"]))

    return made


def accelerated(config: Callable[[], peft.PeftConfig]) -> Callable[[], nn.Module]:
    return lambda: accelerate(peft.get_peft_model(plain(), config()))


RANK = int(DENSITY * IN * OUT / (IN + OUT))  # SHiRA trains as many entries as LoRA of this rank
KINDS = {
    "sprand": sparse,
    "injected": injected,
    "nf4": quantized("nf4"),
    "int8": quantized("int8"),
    "accelerated shira": accelerated(lambda: peft.ShiraConfig(r=RANK, target_modules=["0"])),
    "accelerated supertuning": accelerated(lambda: peft.SupertuningConfig(sparsity=1 - DENSITY, target_modules=["0"])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rate_and_visible_share_are_those_of_its_entries(kind):
    model = KINDS[kind]()
    (delta,) = trainable(model)
    rms = model(torch.eye(IN)).square().mean().sqrt().item()
    assert sprand.suggest_lr(model) == sprand.suggest_lr(density=delta.numel() / (IN * OUT), rms=rms, width=min(IN, OUT))
    assert sprand.visible_share(model) == 0
    rate, changed = sprand.suggest_lr(model), delta.numel() // 4
    delta.data[:changed] = 1.0
    assert sprand.visible_share(model) == changed / delta.numel()
    assert sprand.suggest_lr(model) == rate


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "injected"])
def test_a_model_whose_adapters_are_off_says_what_to_call(kind):
    model = KINDS[kind]()
    with model.disable_adapter():
        for report in (lambda: sprand.suggest_lr(model), lambda: sprand.visible_share(model)):
            with pytest.raises(ValueError, match=r"no adapter of this PEFT model is active; call model.set_adapter\(name\)"):
                report()
