"""Adapters on disk through PEFT: what is stored, who can load it, hot swap, and a base that is another one."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import sprand
from models import MLP, assert_same_bits, built, points_and_labels
from peft_models import adapted, base_weights, deltas, llama, logits, peft, positions, saved, train, trainable
from sprand.peft import SprandConfig, hotswap

PeftModel = peft.PeftModel


def mask() -> sprand.Mask:
    return sprand.select(llama(), strategy="magnitude", density=0.05, target_modules=["q_proj", "down_proj"])


def test_a_random_adapter_stores_its_values_and_loads_to_the_bit(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    draw = tensors.pop("base_model.model.sprand_draw")
    assert bytes(draw.tolist()) == b"random, unstructured, seed 0, pattern 1"
    assert all(name.endswith(".sprand_delta.weight") for name in tensors)
    assert sum(t.numel() for t in tensors.values()) == model.get_nb_trainable_parameters()[0]
    assert (
        "base_model:adapter" in (tmp_path / "README.md").read_text()
        or "library_name: peft" in (tmp_path / "README.md").read_text()
    )
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert not trainable(loaded)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(loaded.merge_and_unload()), logits(model))


def test_training_goes_on_from_a_saved_adapter(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    runs = [train(m, torch.optim.SGD(trainable(m), lr=0.1), 3) for m in (model.eval(), loaded.eval())]
    assert runs[0] == runs[1]
    assert_same_bits(deltas(model), deltas(loaded))


@pytest.mark.parametrize("as_file", [True, False])
def test_given_entries_are_stored_with_the_adapter(tmp_path, as_file):
    given = mask()
    config = SprandConfig(mask=str(given.save(tmp_path / "mask.safetensors")) if as_file else given)
    model = peft.get_peft_model(llama(), config)
    assert config.strategy == "magnitude"
    assert_same_bits(positions(model), dict(given))
    train(model, sprand.SparseAdamW(model, lr=1e-2))
    model.eval().save_pretrained(tmp_path / "adapter")
    (tmp_path / "mask.safetensors").unlink(missing_ok=True)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert_same_bits(positions(loaded), positions(model))
    loaded.add_adapter("ref", loaded.peft_config["default"])
    assert_same_bits(positions(loaded, "ref"), positions(model))
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(llama(seed=9), tmp_path / "adapter")


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_several_adapters_are_loaded_into_one_model(tmp_path, given, low_cpu_mem_usage):
    first = adapted(seed=1)
    first.save_pretrained(tmp_path / "first")
    second = peft.get_peft_model(llama(), SprandConfig(mask=mask()) if given else SprandConfig(density=0.05, seed=2))
    train(second, torch.optim.AdamW(trainable(second), lr=1e-2))
    second.eval().save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(llama(), tmp_path / "first", low_cpu_mem_usage=low_cpu_mem_usage)
    model.load_adapter(tmp_path / "second", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    for _ in range(2):
        model.set_adapter("second")
        assert torch.equal(logits(model), logits(second))
        model.set_adapter("default")
        assert torch.equal(logits(model), logits(first))
    model.save_pretrained(tmp_path / "both", selected_adapters=["second"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "both" / "second")
    assert torch.equal(logits(again), logits(second))


def test_another_base_is_refused_before_the_model_is_touched(tmp_path):
    saved(tmp_path)
    other = llama(seed=4)
    with pytest.raises(ValueError, match=r"another base: the entries it changes in model.layers.0.self_attn.q_proj.weight"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not any("sprand" in name for name, _ in other.named_modules())
    with pytest.raises(ValueError, match="another model"):
        PeftModel.from_pretrained(built(MLP), tmp_path)


def test_a_base_in_a_narrower_dtype_is_the_same_base(tmp_path):
    saved(tmp_path)
    model = PeftModel.from_pretrained(llama().bfloat16(), tmp_path)
    with model.disable_adapter():
        assert_same_bits(base_weights(model), base_weights(llama().bfloat16()))


def test_damaged_files_are_refused(tmp_path):
    file = saved(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(ValueError, match="expected .* finite values for .*, got none"):
        PeftModel.from_pretrained(llama(), tmp_path)
    save_file(tensors | {name: tensors[name] * float("nan")}, file)
    with pytest.raises(ValueError, match="finite values"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_modules_to_save_and_target_parameters_come_back(tmp_path):
    transformers = pytest.importorskip("transformers", reason="a classifier is made by transformers")

    def classifier():
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(llama().config).eval()

    base = classifier()
    base.config.pad_token_id = 0
    tokens = torch.arange(24).reshape(2, 12)
    config = SprandConfig(task_type="SEQ_CLS", density=0.1, target_parameters=["embed_tokens.weight", "norm.weight"])
    model = peft.get_peft_model(base, config)
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= positions(model).keys()
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    head = model.base_model.model.score.original_module.weight.clone()
    for _ in range(3):
        model(input_ids=tokens, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    fresh = classifier()
    fresh.config.pad_token_id = 0
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert not torch.equal(loaded.base_model.model.score.modules_to_save["default"].weight, head)
    sizes = {name: t.numel() for name, t in load_file(tmp_path / "adapter_model.safetensors").items() if "embed_tokens" in name}
    assert list(sizes.values()) == [positions(model)["model.embed_tokens.weight"].numel()]


def test_transformers_loads_and_adds_adapters_itself(tmp_path, monkeypatch):
    integration = pytest.importorskip("transformers.integrations.peft", reason="transformers loads the adapters")
    monkeypatch.setattr(integration, "check_peft_version", lambda min_version: None)  # it may want one that is not out yet
    model = adapted(seed=1)
    model.save_pretrained(tmp_path / "random")
    given = peft.get_peft_model(llama(), SprandConfig(mask=mask()))
    train(given, torch.optim.AdamW(trainable(given), lr=1e-2))
    given.eval().save_pretrained(tmp_path / "given")
    native, base = llama(), logits(llama())
    native.load_adapter(str(tmp_path / "random"))
    assert torch.equal(logits(native), logits(model))
    native.load_adapter(str(tmp_path / "given"), adapter_name="given")
    native.set_adapter("given")
    assert torch.equal(logits(native), logits(given))
    native.disable_adapters()
    assert torch.equal(logits(native), base)
    native.enable_adapters()
    native.add_adapter(SprandConfig(density=0.1, seed=5), "new")
    train(native, torch.optim.AdamW(trainable(native), lr=1e-2))
    native.eval().save_pretrained(tmp_path / "native")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "native")), logits(native))
    with pytest.raises(ValueError, match="another base"):
        llama(seed=9).load_adapter(str(tmp_path / "random"))


def test_a_model_on_the_meta_device_gets_its_entries_with_its_weights():
    with torch.device("meta"):
        base = llama()
    model = peft.get_peft_model(base, SprandConfig(density=0.1))
    model.to_empty(device="cpu")
    model.get_base_model().model.rotary_emb = llama().model.rotary_emb
    state = {f"base_model.model.{name}": value for name, value in llama().state_dict().items()}
    renamed = {}
    for name in model.state_dict():
        own = name.replace(".base_layer", "")
        if own in state:
            renamed[name] = state[own]
    model.load_state_dict(renamed, strict=False)
    plain = peft.get_peft_model(llama(), SprandConfig(density=0.1))
    assert_same_bits(positions(model), positions(plain))
    runs = [train(m, torch.optim.SGD(trainable(m), lr=0.1)) for m in (model, plain)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("merged", [True, False])
def test_hot_swap_copies_the_values_of_another_adapter(tmp_path, merged):
    model, other = adapted(), adapted(steps=6)
    other.save_pretrained(tmp_path)
    kept, before = trainable(model), logits(model)
    if merged:
        model.merge_adapter()
    hotswap(model, tmp_path)
    assert torch.equal(logits(model), logits(other)) and not torch.equal(logits(model), before)
    assert all(a is b for a, b in zip(kept, trainable(model), strict=True))
    if merged:
        model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_hot_swap_refuses_other_entries_and_other_methods(tmp_path):
    model, before = adapted(), None
    before = logits(model)
    saved(tmp_path / "seed", seed=8)
    with pytest.raises(ValueError, match="trains other entries of"):
        hotswap(model, tmp_path / "seed")
    saved(tmp_path / "layers", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="trains other weights"):
        hotswap(model, tmp_path / "layers")
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA"):
        hotswap(model, tmp_path / "lora")
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        hotswap(model, tmp_path / "nothing")
    assert torch.equal(logits(model), before)


def test_adapters_are_added_up(tmp_path):
    model = adapted(seed=1)
    model.add_adapter("second", SprandConfig(density=0.1, seed=2))
    model.set_adapter("second")
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    model.eval().base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(model), both)
    model.add_weighted_adapter(["default", "second"], [0.5, -0.25], "mixed")
    first, second, mixed = (deltas(model, name) for name in ("default", "second", "mixed"))
    for name, delta in mixed.items():
        dense = torch.zeros(base_weights(model)[name].numel())
        dense[positions(model)[name].long()] += 0.5 * first[name]
        dense[positions(model, "second")[name].long()] += -0.25 * second[name]
        assert torch.equal(dense[positions(model, "mixed")[name].long()], delta)
    model.set_adapter("mixed")
    model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "mixed")), logits(model))


def test_ties_elects_signs_and_drops_small_changes():
    model = peft.get_peft_model(built(MLP), SprandConfig(mask={"first.weight": torch.tensor([0, 1, 2, 5])}))
    model.add_adapter("second", SprandConfig(mask={"first.weight": torch.tensor([1, 2, 5, 9])}))
    target = model.base_model.model.first.sprand_targets["weight"]
    target.deltas["default"].data = torch.tensor([4.0, 1.0, -3.0, 0.5])
    target.deltas["second"].data = torch.tensor([3.0, 2.0, -1.0, 0.1])
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "t", combination_type="ties", density=0.75)
    model.set_adapter("t")
    # kept: default 4, 1, -3 at 0, 1, 2; second 3, 2, -1 at 1, 2, 5. Sums elect +, +, -, - at 0, 1, 2, 5.
    assert target.indices["t"].tolist() == [0, 1, 2, 5, 9]
    assert target.deltas["t"].tolist() == [4.0, 2.0, -3.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"combination_type": "linear"}, {"method": "sum"}),
        ({"combination_type": "ties", "density": 0.5}, {"method": "ties", "density": 0.5}),
        (
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "frequency"},
            {"method": "ties", "density": 0.5, "signs": "frequency"},
        ),
        ({"combination_type": "dare_linear", "density": 0.5, "seed": 7}, {"method": "dare", "density": 0.5, "seed": 7}),
    ],
)
def test_both_doors_combine_alike(options, ours):
    model = peft.get_peft_model(built(MLP), SprandConfig(density=0.3, seed=0))
    model.add_adapter("second", SprandConfig(density=0.3, seed=1))
    plain = built(MLP)
    for seed, name in enumerate(("default", "second")):
        sprand.apply(plain, density=0.3, seed=seed, name=name)
        for key, delta in plain._sprand.adapters[name].deltas.items():
            delta.data.normal_()
            target = model.base_model.model.get_submodule(key.removesuffix(".weight")).sprand_targets["weight"]
            target.deltas[name].data.copy_(delta)
    model.add_weighted_adapter(["default", "second"], [0.7, -1.3], "both", **options)
    sprand.combine(plain, {"default": 0.7, "second": -1.3}, name="both", **ours)
    both = plain._sprand.adapters["both"]
    assert positions(model, "both").keys() == both.indices.keys()
    for key, delta in both.deltas.items():
        assert torch.equal(positions(model, "both")[key], both.indices[key])
        assert torch.equal(deltas(model, "both")[key], delta)
    model.set_adapter("both")
    x, _ = points_and_labels()
    assert torch.equal(model(x), plain(x))


def test_the_saved_config_is_plain_json(tmp_path):
    config = json.loads((saved(tmp_path, seed=None) / "adapter_config.json").read_text())
    assert config["peft_type"] == "SPRAND" and isinstance(config["seed"], int) and config["indices_saved"] is False
    assert re.fullmatch(r"32x32 \d+ float32 [0-9a-f]{24}", config["targets"]["model.layers.0.self_attn.q_proj.weight"])


def test_values_are_saved_by_a_plain_model_too(tmp_path):
    x, _ = points_and_labels()
    model = peft.get_peft_model(built(MLP), SprandConfig(density=0.2, target_parameters=["first.bias"]))
    for p in trainable(model):
        p.data.normal_()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(built(MLP), tmp_path)(x), model(x))
