"""What PEFT promises of every method: which adapters are merged, which names are seen, which layers are meant."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sprand
from models import MLP, EveryLayer, assert_same_bits, built, points_and_labels
from peft_models import adapted, base_weights, deltas, llama, logits, peft, positions, train, trainable
from sprand.peft import SprandConfig, SprandLayer


def two_adapters() -> nn.Module:
    """Adapter `default` on one layer, and active; `two` on another; each trains the last layer in full."""
    model = peft.get_peft_model(built(MLP), SprandConfig(density=0.3, target_modules=["first"], modules_to_save=["third"]))
    model.add_adapter("two", SprandConfig(density=0.3, target_modules=["second"], modules_to_save=["third"]))
    for name, p in model.named_parameters():
        if "sprand_delta" in name or "modules_to_save" in name:
            p.data.normal_(0, 0.3)
    return model.eval()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(points_and_labels()[0])


@pytest.mark.parametrize("active", ["default", "two"])
def test_only_the_named_adapters_are_merged(active):
    model = two_adapters()
    model.set_adapter("two")
    expected = outputs(model)
    model.set_adapter(active)
    assert torch.equal(outputs(model.merge_and_unload(adapter_names=["two"])), expected)


@pytest.mark.parametrize("names", [["nope"], ["two", "nope"], "two", []])
def test_names_that_no_adapter_has_are_refused_before_anything_changes(names):
    model = two_adapters()
    before = outputs(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="adapter_names: expected a list of names among default, two, got"):
            merge(adapter_names=names)
    assert torch.equal(outputs(model), before)


def test_unload_takes_off_what_was_trained_in_full():
    assert_same_bits(dict(two_adapters().unload().state_dict()), dict(built(MLP).state_dict()))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_is_not_finite_changes_no_layer(merge):
    model = adapted()
    last = trainable(model)[-1]
    kept = last.data.clone()
    before = logits(model)
    last.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        getattr(model, merge)(safe_merge=True)
    last.data.copy_(kept)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.merge_and_unload(safe_merge=True)), before)


def test_layers_of_the_base_model_are_its_own():
    base = llama().model
    model = peft.get_peft_model(base, SprandConfig(density=0.1))
    assert model.layers is base.layers and model.layers[0] is base.layers[0]


def test_a_wrapped_module_is_seen_through_its_layer():
    """Every name that the layer adds is sprand's, or one that PEFT gives to all of its layers."""
    model = peft.get_peft_model(built(MLP), SprandConfig(density=0.3))
    layer = model.base_model.model.first
    of_peft = {*dir(nn.Module()), *dir(peft.tuners.lora.layer.Linear), *vars(peft.tuners.tuners_utils.BaseTunerLayer)}
    own = {name for name in dir(layer) if not name.startswith(("_", "sprand_"))} - of_peft
    assert own <= {"base_layer", "merged_adapters"}
    layer.get_base_layer().weights = layer.get_base_layer().site = "its own"
    assert layer.weights == layer.site == "its own"


class Positions(nn.Embedding):
    """Is used by a method of its own, as the positions of ProphetNet are."""

    def _forward(self, numbers):
        return super().forward(numbers)


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions(6, 4)

    def forward(self, numbers):
        return self.positions._forward(numbers)


def test_a_model_calls_private_methods_of_a_wrapped_module():
    base, numbers = built(Positioned), torch.arange(6)
    plain = base(numbers)
    model = peft.get_peft_model(base, SprandConfig(density=1.0, target_modules=["positions"]))
    (delta,) = trainable(model)
    assert torch.equal(model(numbers), plain)
    model(numbers).sum().backward()
    assert torch.equal(delta.grad, torch.ones(24))
    assert not hasattr(model.base_model.model.positions, "_hf_hook")
    model.base_model.model.positions.get_base_layer()._hf_hook = "of the base layer alone"
    assert not hasattr(model.base_model.model.positions, "_hf_hook")


def test_every_layer_tells_its_features():
    parameters = ["rnn.weight_ih_l0", "norm.weight"]
    model = peft.get_peft_model(
        built(EveryLayer), SprandConfig(density=0.2, target_modules=["embed", "linear", "conv"], target_parameters=parameters)
    )
    features = {
        name: (module.in_features, module.out_features)
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, SprandLayer)
    }
    none = (None, None)
    assert features == {"embed": (50, 32), "linear": (32, 64), "norm": none, "conv": (64, 32), "rnn": none}


@pytest.mark.parametrize("targets", ["all-linear", "ALL-LINEAR", r".*\.[qv]_proj", ["q_proj", "v_proj"]])
@pytest.mark.parametrize(("layers", "pattern"), [([3], None), (3, "layers"), ([1, 3], None), ([3], ["h", "layers"])])
def test_layers_to_transform_hold_for_any_targets(targets, layers, pattern, tmp_path):
    base = llama(num_hidden_layers=4)
    config = SprandConfig(budget=200, target_modules=targets, layers_to_transform=layers, layers_pattern=pattern)
    model = peft.get_peft_model(base, config)
    wanted = {layers} if isinstance(layers, int) else set(layers)
    assert {int(name.split(".")[2]) for name in positions(model)} == wanted
    assert sum(indices.numel() for indices in positions(model).values()) == 200
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(num_hidden_layers=4), tmp_path)
    assert_same_bits(positions(loaded), positions(model))


def test_layers_are_numbered_from_the_base_on():
    model = peft.get_peft_model(llama().model, SprandConfig(density=0.1, layers_to_transform=1))
    assert {name.split(".")[1] for name in positions(model)} == {"1"}


def test_weights_named_by_themselves_are_in_no_layer():
    fields = {"target_parameters": ["embed_tokens.weight"], "target_modules": ["q_proj"], "layers_to_transform": [0]}
    model = peft.get_peft_model(llama(), SprandConfig(density=0.1, **fields))
    assert list(positions(model)) == ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]


def test_the_config_is_the_users_own_and_serves_again(tmp_path):
    config = SprandConfig(density=0.1)
    model = peft.get_peft_model(llama(), config)
    assert model.peft_config["default"] is config
    model.save_pretrained(tmp_path)
    assert config.target_modules == "all-linear" and config.targets is None
    other = peft.get_peft_model(llama(seed=3), config)
    assert_same_bits(positions(other), positions(model))
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    saved = peft.PeftConfig.from_pretrained(tmp_path)
    assert sorted(saved.targets) == sorted(positions(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_deltas_have_the_dtype_of_the_base_if_asked(dtype, low_cpu_mem_usage, tmp_path):
    model = peft.get_peft_model(llama().to(dtype), SprandConfig(density=0.1), autocast_adapter_dtype=False)
    assert all(p.dtype == dtype for p in trainable(model))
    train(model, torch.optim.SGD(trainable(model), lr=0.1))
    assert all(delta.count_nonzero() for delta in deltas(model).values())
    trained = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        llama().to(dtype), tmp_path, autocast_adapter_dtype=False, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert all(delta.dtype == dtype for delta in deltas(loaded).values())
    assert torch.equal(logits(loaded), trained) and torch.equal(logits(loaded.merge_and_unload()), trained)


def test_single_entries_of_single_rows_are_refused():
    model = adapted(steps=1).eval()
    tokens = torch.arange(6)[None]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="adapter_names: .* otherwise than in whole columns of a linear layer"):
            call(input_ids=tokens, adapter_names=["default"])


def test_what_apply_trains_is_not_frozen_by_peft():
    model = sprand.apply(built(MLP), density=0.3, target_modules=["first"])
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"trains entries of sprand.apply \(in first\), which PEFT would freeze"):
        peft.get_peft_model(model, SprandConfig(density=0.3, target_modules=["second"]))
    assert [type(module) for module in model.modules()] == before
    peft.get_peft_model(sprand.merge(model), SprandConfig(density=0.3, target_modules=["second"]))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (SprandConfig(density=0.3, target_modules=["second"]), "trains entries through PEFT already"),
        (peft.LoraConfig(r=2, target_modules=["first"]), r"first.base_layer.weight is in a layer of PEFT.*exclude_modules"),
    ],
)
def test_apply_refuses_weights_that_peft_writes(config, match):
    model = peft.get_peft_model(built(MLP), copy.deepcopy(config))
    training = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=match):
        sprand.apply(model, density=0.3, target_modules=["first.base_layer" if config.peft_type == "LORA" else "first"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == training
    model.merge_and_unload()


@pytest.mark.parametrize("safe_merge", [True, False])
def test_lora_over_apply_is_not_merged_before_sprand_is(safe_merge):
    base = sprand.apply(built(MLP), density=0.3, target_modules=["first"])
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)).eval()
    for delta in sprand.parameters(base):
        delta.data.normal_()
    before = outputs(model)
    with pytest.raises(ValueError, match=r"first.weight: PEFT merges an adapter .* call sprand.merge\(model\)"):
        model.merge_and_unload(safe_merge=safe_merge)
    assert torch.equal(outputs(model), before)
    sprand.merge(base)
    torch.testing.assert_close(outputs(model.merge_and_unload(safe_merge=safe_merge)), before)


def test_apply_trains_beside_layers_of_peft():
    model = peft.get_peft_model(built(MLP), peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    sprand.apply(model, density=0.3, target_modules=["second"])
    (delta,) = sprand.parameters(model)
    delta.data.normal_()
    before = outputs(model)
    torch.testing.assert_close(outputs(model.merge_and_unload()), before)
    assert base_weights(model)


def of_seed(seed: int) -> nn.Module:
    """An adapter of as many entries for any seed."""
    model = peft.get_peft_model(built(MLP), SprandConfig(density=0.3, seed=seed))
    for p in trainable(model):
        p.data.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("door", ["a file", "a file of sprand.save", "tensors"])
def test_values_are_loaded_onto_the_entries_they_belong_to_or_not_at_all(door, tmp_path):
    model, other = of_seed(1), of_seed(2)
    model.save_pretrained(tmp_path)
    if door == "a file of sprand.save":
        sprand.save(sprand.load(built(MLP), tmp_path), tmp_path)
    tensors = peft.get_peft_model_state_dict(model)

    def load(into: nn.Module) -> None:
        peft.set_peft_model_state_dict(into, tensors) if door == "tensors" else into.load_adapter(tmp_path, "default")

    before = outputs(other)
    with pytest.raises(ValueError, match=r"entries that it has \(.* seed 2, .*\), got those of .* seed 1, .*; load its folder"):
        load(other)
    assert torch.equal(outputs(other), before)
    again = of_seed(1)
    load(again)
    assert torch.equal(outputs(again), outputs(model))
    if door != "tensors":
        other.load_adapter(tmp_path, "another")
        other.set_adapter("another")
        assert torch.equal(outputs(other), outputs(model))


def test_a_config_of_another_seed_than_the_file_is_refused(tmp_path):
    of_seed(1).save_pretrained(tmp_path)
    base = built(MLP)
    with pytest.raises(ValueError, match="seed 2, .* seed 1, .* without a config"):
        peft.PeftModel.from_pretrained(base, tmp_path, config=SprandConfig(density=0.3, seed=2))
    assert_same_bits(dict(base.state_dict()), dict(built(MLP).state_dict()))


def test_a_file_with_indices_is_not_loaded_onto_entries_of_a_seed(tmp_path):
    model, other = of_seed(1), of_seed(2)
    given = peft.get_peft_model(built(MLP), SprandConfig(mask=positions(model)))
    given.save_pretrained(tmp_path)
    before = outputs(other)
    with pytest.raises(ValueError, match="that its seed draws, got those of other ones; load its folder under a name"):
        other.load_adapter(tmp_path, "default")
    assert torch.equal(outputs(other), before)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(outputs(model), outputs(given))


def test_tensors_that_do_not_say_their_draw_are_taken_with_a_warning():
    model = of_seed(1)
    tensors = {name: value for name, value in peft.get_peft_model_state_dict(model).items() if "sprand_draw" not in name}
    again = of_seed(1)
    with pytest.warns(UserWarning, match="do not say of which entries they are, .* taken for those of .* seed 1,"):
        peft.set_peft_model_state_dict(again, tensors)
    assert torch.equal(outputs(again), outputs(model))


def test_a_configuration_of_another_draw_than_the_tensors_is_damaged(tmp_path):
    of_seed(1).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(ValueError, match="damaged: its tensors are of the draw .* seed 1, .* and it says .* seed 2,"):
        sprand.load(built(MLP), tmp_path)
