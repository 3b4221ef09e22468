"""The axolotl plugin: settings that are refused or used, and the adapter it puts into a model.

Without axolotl a stand-in takes the place of the two classes that the plugin needs of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass

import pytest
import torch

from models import assert_same_bits, bits
from trainers import llama, rows

peft = pytest.importorskip("peft", reason="the plugin's adapter is one of PEFT")
pydantic = pytest.importorskip("pydantic", reason="axolotl's settings are pydantic models")

TOKENS = rows(1)[0]["input_ids"][None]


@dataclass(frozen=True)
class AdapterCapabilities:
    """As in axolotl 0.19."""

    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    """What the plugin uses of axolotl's."""


class Config(dict):
    """Settings by key and by attribute, None where there is none, as axolotl's `DictDefault`."""

    def __getattr__(self, name):
        return self.get(name)


@pytest.fixture
def plugin(monkeypatch):
    if importlib.util.find_spec("axolotl") is None:
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        base = types.ModuleType("axolotl.integrations.base")
        base.BasePlugin, base.AdapterCapabilities = BasePlugin, AdapterCapabilities
        monkeypatch.setitem(sys.modules, base.__name__, base)
    module = importlib.import_module("sprand.integrations.axolotl")
    yield module.SprandPlugin()
    del sys.modules[module.__name__]


def settings(plugin, **given):
    """What is left of settings when axolotl has joined the plugin's with its own and checked them."""
    module, _, name = plugin.get_input_args().rpartition(".")

    class Own(pydantic.BaseModel):
        adapter: str | None = None
        lora_model_dir: str | None = None
        lora_r: int | None = None
        load_in_4bit: bool | None = False

    class Joined(Own, getattr(importlib.import_module(module), name)):
        pass

    return Config(Joined(**given).model_dump(exclude_none=True))


def test_it_offers_the_adapter_and_leaves_others_alone(plugin):
    assert [capability.name for capability in plugin.get_adapter_capabilities()] == ["sprand"]
    assert not plugin.get_adapter_capabilities()[0].lora_like
    assert plugin.load_adapter(llama(), settings(plugin, adapter="lora")) is None


def test_its_settings_are_those_of_the_config(plugin):
    from sprand.peft import SprandConfig

    given = {"density": 0.2, "target_modules": ["q_proj", "v_proj"], "target_parameters": ["embed_tokens.weight"], "seed": 3}
    cfg = settings(plugin, adapter="sprand", **{f"sprand_{name}": value for name, value in given.items()})
    none, config = plugin.load_adapter(llama(), cfg, config_only=True)
    assert none is None
    assert config.to_dict() == SprandConfig(task_type="CAUSAL_LM", **given).to_dict()
    model, _ = plugin.load_adapter(llama(), cfg)
    by_peft = peft.get_peft_model(llama(), SprandConfig(task_type="CAUSAL_LM", **given))
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert_same_bits(dict(model.named_buffers()), dict(by_peft.named_buffers()))
    assert plugin.load_adapter(llama(), settings(plugin, adapter="sprand"), config_only=True)[1].density == 0.01
    assert plugin.load_adapter(llama(), settings(plugin, adapter="sprand", sprand_budget=50), config_only=True)[1].budget == 50


@pytest.mark.parametrize("inference", [False, True])
def test_a_saved_adapter_is_loaded(plugin, tmp_path, capsys, inference):
    model, _ = plugin.load_adapter(llama(), settings(plugin, adapter="sprand", sprand_density=0.1))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    model.save_pretrained(tmp_path)
    loaded, config = plugin.load_adapter(llama(), settings(plugin, adapter="sprand", lora_model_dir=str(tmp_path)), inference)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert config.density == 0.1
    assert any(p.requires_grad for p in loaded.parameters()) == (not inference)
    assert_same_bits(bits(loaded.merge_and_unload()), bits(model.merge_and_unload()))
    assert "trainable params" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sprand_density": 0.1}, "sprand_density is set, but adapter is None; set adapter: sprand"),
        ({"adapter": "lora", "sprand_seed": 1}, "sprand_seed is set, but adapter is 'lora'"),
        ({"adapter": "sprand", "lora_r": 8}, "lora_r does nothing with adapter: sprand"),
        ({"adapter": "sprand", "load_in_4bit": True}, "load_in_4bit does nothing with adapter: sprand"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(plugin, given, message):
    with pytest.raises(ValueError, match=message):
        settings(plugin, **given)
