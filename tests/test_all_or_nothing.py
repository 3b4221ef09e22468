"""What fails half-way, refused or broken off, leaves a model as it was: values, classes, names, what trains, and hooks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sprand
from checkpoints import changed
from sprand.adapters import attaching


def built() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)]))


def picture(model):
    """All that a user may notice of a model, but for where its values lie."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
    modules = [
        (name, type(module), sorted(module.__dict__), [len(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    ]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return modules, values, {name: p.requires_grad for name, p in model.named_parameters()}


def assert_unchanged(model, before) -> None:
    modules, values, flags = picture(model)
    assert modules == before[0] and flags == before[2]
    assert values.keys() == before[1].keys()
    assert all(torch.equal(value, before[1][name]) for name, value in values.items())


def broken_at(monkeypatch, owner, name, call: int, error: type[BaseException]) -> None:
    """Let one call of a function end in an error."""
    own, calls = getattr(owner, name), iter(range(1, 1000))

    def broken(*args, **kwargs):
        if next(calls) == call:
            raise error("broken off")
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


@pytest.fixture
def saved(tmp_path):
    model = changed(sprand.apply(built(), density=0.1, seed=1, exclude_modules=["3.0"], modules_to_save=["3.0"]))
    return sprand.save(model, tmp_path / "saved")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("what", ["apply", "load", "a second apply", "a second load", "switch"])
def test_an_error_at_any_weight(monkeypatch, saved, what, error):
    model = built()
    if what in ("a second apply", "a second load", "switch"):
        changed(sprand.apply(model, density=0.1, modules_to_save=["2"]))
    if what == "switch":
        sprand.load(model, saved, name="other")
    before, active = picture(model), getattr(getattr(model, "_sprand", None), "active", None)
    actions = {
        "apply": lambda: sprand.apply(model, density=0.1, name="new"),
        "load": lambda: sprand.load(model, saved, name="new"),
        "switch": lambda: sprand.switch(model, "default"),
    }
    first = 3 if what == "a second apply" else 1  # which puts the first adapter back before it adds its own
    for call in (first, first + 1):
        with monkeypatch.context() as patched:
            broken_at(patched, attaching, "attach", call, error)
            with pytest.raises(error, match="broken off"):
                actions[what.split()[-1]]()
        assert_unchanged(model, before)
        assert getattr(getattr(model, "_sprand", None), "active", None) == active
    actions[what.split()[-1]]()


class Final(nn.Linear):
    """A layer whose class cannot have others below it."""

    def __init_subclass__(cls) -> None:
        raise TypeError("this class is final")


def test_a_layer_that_cannot_become_sparse_is_met_last():
    model = nn.Sequential(nn.Linear(8, 8), Final(8, 8))
    before = picture(model)
    with pytest.raises(TypeError, match="this class is final"):
        sprand.apply(model, density=0.1)
    assert_unchanged(model, before)


def test_a_name_that_a_layer_has_already_is_refused():
    model = built()
    model[2].register_buffer("sprand_delta", torch.zeros(1))
    before = picture(model)
    with pytest.raises(ValueError, match="has an attribute 'sprand_delta' of its own.*exclude_modules"):
        sprand.apply(model, density=0.1)
    assert_unchanged(model, before)


DAMAGES = {
    "short": lambda value: value[:-1].contiguous(),
    "not finite": lambda value: value * float("nan"),
    "missing": lambda value: None,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_peft_loads_a_whole_adapter_or_none(tmp_path, damage):
    peft = pytest.importorskip("peft")
    from sprand.peft import SprandConfig

    config = SprandConfig(density=0.1, target_modules="0|2", modules_to_save=["3.0"])
    peft.get_peft_model(built(), config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "2.sprand_delta" in name)
    value = damage(tensors.pop(name))
    save_file(tensors if value is None else tensors | {name: value}, file)
    model = built()
    model[0].weight.requires_grad_(False)
    before = picture(model)
    with pytest.raises(ValueError, match="expected 6 finite values for 2.weight"):
        peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert_unchanged(model, before)
    wrapped = peft.get_peft_model(model, SprandConfig(density=0.2, target_modules="0"))
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="expected 6 finite values for 2.weight"):
        wrapped.load_adapter(tmp_path / "adapter", "new")
    assert list(wrapped.peft_config) == wrapped.active_adapters == ["default"]
    assert trained == [name for name, p in wrapped.named_parameters() if p.requires_grad]
    base = wrapped.unload().state_dict()
    assert base.keys() == before[1].keys() and all(torch.equal(base[name], before[1][name]) for name in base)


@pytest.mark.parametrize("call", [1, 2])
def test_peft_adds_a_whole_adapter_or_none(monkeypatch, call):
    peft = pytest.importorskip("peft")
    from sprand.peft import SprandConfig
    from sprand.peft.layer import SprandLayer

    model = built()
    before = picture(model)
    with monkeypatch.context() as patched:
        broken_at(patched, SprandLayer, "sprand_add", call, RuntimeError)
        with pytest.raises(RuntimeError, match="broken off"):
            peft.get_peft_model(model, SprandConfig(density=0.1))
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="modules_to_save: 3 is a ModuleList, which PEFT cannot train in full"):
        peft.get_peft_model(model, SprandConfig(density=0.1, target_modules="0", modules_to_save=["3"]))
    assert_unchanged(model, before)
    peft.get_peft_model(model, SprandConfig(density=0.1))
