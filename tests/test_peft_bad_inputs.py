"""Bad input at the PEFT door: every refusal says what was expected, what came, and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft_models
import sprand
from models import MLP, built
from peft_models import adapted, llama, logits, peft, train
from sprand.peft import SprandConfig


def refused(match: str, model: nn.Module | None = None, adapter_name: str = "default", **fields) -> None:
    model = built(MLP) if model is None else model
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=match):
        peft.get_peft_model(model, SprandConfig(**fields), adapter_name=adapter_name)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"target_modules": ["q_prj"]}, "q_prj.* matches no module of this model; the closest names are"),
        ({"target_parameters": ["frist.bias"]}, "'frist.bias' matches nothing in this model; the closest names are .*first.bias"),
        ({"density": 2.0}, r"density: expected a fraction in \(0, 1\], got 2.0"),
        ({"density": 1e-9}, "rounds to no entry; raise it"),
        ({"density": 0.1, "budget": 3}, "give density or budget, not both"),
        ({"budget": 10**6}, "1,000,000 entries were asked for, but the targets hold"),
        ({"strategy": "snip"}, r"mask = sprand.select\(model, strategy='snip'"),
        ({"strategy": "best"}, "strategy: expected one of random, uniform, .*, got 'best'"),
        ({"layout": "run3"}, "layout: expected one of"),
        ({"seed": 1.5}, "seed: expected an int, got 1.5"),
        ({"mask": {"first.wight": torch.tensor([0])}}, "the model has no parameter 'first.wight'; the closest names are"),
        ({"mask": {"first.weight": torch.tensor([10**6])}}, "index 1000000 .* is out of range"),
        ({"mask": {"first.weight": torch.tensor([1, 1])}}, "appears twice"),
        ({"mask": {"first.weight": torch.zeros(24, 16, dtype=torch.bool)}}, "chooses no entry at all"),
        ({"mask": {"first.weight": torch.tensor([0])}, "density": 0.5}, "leave out density, budget and layout"),
        ({"mask": 3}, "expected a sprand.Mask, a mapping of indices, or a file, got int"),
        ({"target_modules": None}, "target_modules=None matches no module of this model; the closest names are"),
        ({"layers_pattern": "h"}, "layers_pattern: 'h' says where layers are numbered; give their numbers"),
        ({"layers_to_transform": [-1]}, r"layers_to_transform: expected numbers of layers from 0 on, got \[-1\]"),
        ({"layers_to_transform": 0}, "none of the target_modules is in a layer 0; they are in no numbered layers"),
        ({"layers_to_transform": 0, "mask": {"first.weight": torch.tensor([0])}}, "it chooses among target_modules"),
        ({"layers_to_transform": 0, "target_modules": None, "target_parameters": ["bias"]}, "it chooses among target_modules"),
    ],
)
def test_a_field_that_does_not_fit(fields, match):
    refused(match, **fields)


@pytest.mark.parametrize("name", ["a.b", "", "keys", "weight.default"])
def test_an_adapter_name_that_cannot_be_a_parameter(name):
    refused("adapter name: .* cannot be used", adapter_name=name)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"layers_to_transform": [0, 7]}, "is in a layer 7; some are in the layers 0, 1"),
        ({"layers_to_transform": 1, "layers_pattern": "h"}, r"is in a layer 1 of h \(layers_pattern\); they are in no numbered"),
    ],
)
def test_a_layer_that_is_not_there(fields, match):
    refused(match, llama(), **fields)


def test_a_container_is_no_target():
    refused("has no weight of its own; name the layers inside of it", llama(), target_modules=["self_attn"])


def test_a_parameter_of_the_model_itself():
    class Scaled(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

    refused(
        "PEFT replaces the module that holds a weight",
        built(Scaled),
        target_modules=None,
        target_parameters=["factor"],
        density=1.0,
    )


def test_hooks_of_accelerate_stay_in_front_of_the_trained_weight():
    accelerate = pytest.importorskip("accelerate", reason="its hooks replace the forward of a layer")

    class Counting(accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    model, plain = llama(), adapted()
    accelerate.hooks.add_hook_to_module(model.model.layers[0].self_attn.q_proj, Counting())
    hooked = adapted(model=model)
    assert torch.equal(logits(hooked), logits(plain)) and Counting.calls > 3
    merged = hooked.merge_and_unload()
    assert torch.equal(logits(merged), logits(plain))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"adapters": ["default", "none"]}, "expected names among default, second, got 'none'"),
        ({"weights": [1.0]}, "expected one for each of 2 adapters, got 1"),
        ({"adapter_name": "second"}, "'second' is there already"),
        ({"combination_type": "svd"}, "expected one of linear, ties, dare_linear, got 'svd'"),
        ({"combination_type": "ties"}, "density: expected a fraction"),
        ({"density": 0.5}, "None for 'linear'"),
    ],
)
def test_adapters_that_cannot_be_added_up(changes, match):
    model = adapted(steps=1)
    model.add_adapter("second", SprandConfig(density=0.1))
    arguments = {"adapters": ["default", "second"], "weights": [1.0, 1.0], "adapter_name": "sum"} | changes
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(**arguments)
    assert set(model.peft_config) == {"default", "second"}


def test_a_failed_adapter_leaves_the_others_as_they_were():
    model = adapted()
    before = logits(model)
    with pytest.raises(ValueError, match="matches no module"):
        model.add_adapter("second", SprandConfig(target_modules=["nothing"]))
    assert torch.equal(logits(model), before) and set(model.peft_config) == {"default"}


def test_an_old_peft_is_named(monkeypatch):
    from sprand.peft import registration

    monkeypatch.delattr(peft_models.peft.tuners.tuners_utils.BaseTuner, "_get_adapter_state_dict")
    with pytest.raises(ImportError, match=r"has not \(BaseTuner has no _get_adapter_state_dict\): .*, or use sprand.apply"):
        registration.check_peft()


def test_a_peft_without_something_that_is_imported_is_named():
    from sprand.peft import registration

    said = r"has not \(cannot import name 'nothing' from 'peft.utils'.*or use sprand.apply"
    with pytest.raises(ImportError, match=said), registration.imported_from_peft():
        from peft.utils import nothing  # noqa: F401


def test_a_peft_with_all_hooks_is_taken_whatever_its_version(monkeypatch, recwarn):
    from sprand.peft import SprandModel, registration

    registration.check_peft()
    assert not recwarn
    monkeypatch.setattr(peft, "__version__", "0.30.1.dev0")
    with pytest.warns(UserWarning, match=r"was tested with peft 0.21, never with 0.30.1.dev0, which has every hook"):
        registration.check_peft()
    of_peft = {*dir(peft.tuners.tuners_utils.BaseTuner), *peft.tuners.tuners_utils.BaseTuner.__annotations__}
    answered = {name for name in vars(SprandModel) if name in of_peft and not name.startswith("__")}
    assert answered - {"_abc_impl"} <= {*registration.HOOKS}


def test_not_finite_values_are_not_saved(tmp_path):
    model = adapted(steps=1)
    next(p for p in model.parameters() if p.requires_grad).data[0] = float("nan")
    with pytest.raises(ValueError, match="are not finite; load the last good checkpoint"):
        model.save_pretrained(tmp_path)


def test_the_message_of_sparse_adamw_for_an_unknown_model():
    with pytest.raises(ValueError, match="none of these parameters is a sprand delta"):
        sprand.SparseAdamW(built(MLP))
    model = adapted(steps=1)
    assert train(model, sprand.SparseAdamW(model), 1)
