"""One adapter, one file, of every kind of weight: both doors load it and train on; old files; what a door refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sprand
from checkpoints import redrawn
from models import EVERY_TARGET, MLP, EveryLayer, Tied, assert_same_bits, bits, built, points_and_labels
from peft_models import llama, peft, trainable
from sprand.adapters.file import CONFIG_FILE, WEIGHTS_FILE, AdapterFile
from sprand.checkpoint.inspect import inspect
from sprand.checkpoint.merge import merge
from sprand.peft import SprandConfig, hotswap, import_adapter
from sprand.serving import AdapterPool

PeftModel = peft.PeftModel
BASE = Path(__file__).parent / "adapters_of_0_1_0" / "base.safetensors"
OLD = {  # what sprand 0.1.0 wrote, what was written before each target was a line of text, and what was drawn in runs
    f"{version}-{path.parent.name}": path.parent
    for version in ("0_1_0", "format_3", "runs")
    for path in sorted((Path(__file__).parent / f"adapters_of_{version}").glob("*/adapter_config.json"))
}


class Normed(nn.Module):
    """A head of several layers, with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 24)
        self.head = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 4))

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def conv1d():
    transformers = pytest.importorskip("transformers", reason="Conv1D is a layer of transformers")
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def experts():
    transformers = pytest.importorskip("transformers", reason="a mixture of experts is made by transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
        num_local_experts=4, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


FUSED = ["experts.gate_up_proj", "experts.down_proj"]
GIVEN = {"second.weight": torch.arange(0, 576, 5), "first.bias": torch.tensor([1, 3])}
GIVEN_COLUMNS = {"second.weight": torch.arange(576).view(24, 24)[:, 2::5].flatten(), "first.bias": torch.tensor([1, 3])}
KINDS = {
    "every layer": (EveryLayer, EVERY_TARGET | {"density": 0.2}),
    "columns": (MLP, {"density": 0.2, "layout": "columns", "modules_to_save": ["third"]}),
    "columns of every layer": (EveryLayer, EVERY_TARGET | {"density": 0.2, "layout": "columns", "strategy": "uniform"}),
    "uniform": (MLP, {"density": 0.2, "strategy": "uniform", "seed": 9}),
    "budget": (MLP, {"budget": 123, "exclude_modules": ["first"]}),
    "mask": (MLP, {"strategy": GIVEN}),
    "mask of columns": (MLP, {"strategy": GIVEN_COLUMNS}),
    "bf16": (lambda: MLP().bfloat16(), {"density": 0.2, "modules_to_save": ["third"]}),
    "fp64": (lambda: MLP().double(), {"density": 0.2}),
    "tied": (Tied, {"density": 0.2, "target_modules": ["embed", "mix"]}),
    "a head of several layers": (Normed, {"density": 0.2, "target_modules": ["body"], "modules_to_save": ["head"]}),
    "Conv1D": (conv1d, {"density": 0.1, "target_modules": ["c_attn", "c_fc", "wte"], "target_parameters": ["ln_f.bias"]}),
    "columns of Conv1D": (conv1d, {"density": 0.1, "layout": "columns", "target_modules": ["c_attn", "c_fc", "wte"]}),
    "experts": (experts, {"density": 0.05, "target_modules": None, "target_parameters": FUSED}),
}


def by_apply(model, fields):
    return sprand.apply(model, **fields)


def by_peft(model, fields):
    strategy = fields.get("strategy")
    fields = {key: value for key, value in fields.items() if key != "strategy"}
    given = {"mask": strategy} if isinstance(strategy, dict) else {} if strategy is None else {"strategy": strategy}
    return peft.get_peft_model(model, SprandConfig(**fields, **given))


def outputs(model):
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(inner, (MLP, Normed)):
        return model(points_and_labels(dtype=next(inner.parameters()).dtype)[0])
    tokens = torch.arange(24).reshape(2, 12) % 20
    return model(tokens) if isinstance(inner, (EveryLayer, Tied)) else model(input_ids=tokens).logits


def trained_further(model, steps=2):
    """Some steps of an optimizer whose result depends on the order of the parameters, too."""
    parameters = trainable(model)
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    for _ in range(steps):
        outputs(model).float().square().mean().backward()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model


def merged(model):
    plain = bits(model.merge_and_unload() if isinstance(model, PeftModel) else sprand.merge(model))
    return {name: value.reshape(-1) for name, value in plain.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_both_doors_load_what_either_wrote_and_train_on_to_the_bit(tmp_path, kind):
    cls, fields = KINDS[kind]
    for name, start in {"save": by_apply, "save_pretrained": by_peft}.items():
        model = trained_further(start(built(cls), fields))
        sprand.save(model, tmp_path / name) if name == "save" else model.save_pretrained(tmp_path / name)
        loads = (
            sprand.load(built(cls), tmp_path / name),
            PeftModel.from_pretrained(built(cls), tmp_path / name, is_trainable=True),
        )
        expected = outputs(model.eval())
        for other in loads:
            assert torch.equal(outputs(other.eval()), expected)
        on = [merged(trained_further(each.train())) for each in (model, *loads)]
        assert_same_bits(on[1], on[0])
        assert_same_bits(on[2], on[0])
        assert not torch.equal(outputs(sprand.load(built(cls), tmp_path / name).eval()), outputs(built(cls).eval()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "mask" not in kind])
def test_what_a_configuration_says_comes_back_through_both_doors(tmp_path, kind):
    cls, fields = KINDS[kind]
    model = sprand.apply(built(cls), **fields)
    sprand.save(model, tmp_path / "save")
    config = sprand.SparseConfig(**fields)
    assert sprand.load(built(cls), tmp_path / "save")._sprand.current.config == config
    PeftModel.from_pretrained(built(cls), tmp_path / "save").save_pretrained(tmp_path / "again")
    assert AdapterFile.read(tmp_path / "again").config == config


def test_how_entries_were_chosen_comes_back_through_both_doors(tmp_path):
    fields = {"strategy": "magnitude", "density": 0.1, "scope": "global", "min_density": 0.02}
    model = sprand.apply(built(MLP), **fields)
    sprand.save(model, tmp_path / "save")
    selection = AdapterFile.read(tmp_path / "save").selection
    assert {key: selection[key] for key in fields} == fields
    mask = sprand.select(built(MLP), **fields)
    by_peft(built(MLP), {"strategy": mask}).save_pretrained(tmp_path / "save_pretrained")
    PeftModel.from_pretrained(built(MLP), tmp_path / "save").save_pretrained(tmp_path / "again")
    for name in ("save_pretrained", "again"):
        assert AdapterFile.read(tmp_path / name).selection == selection
    assert "magnitude, global, density 0.1" in inspect(tmp_path / "again").chosen


@pytest.mark.parametrize("path", OLD.values(), ids=OLD)
def test_adapters_of_earlier_versions_stay_readable(tmp_path, path):
    base, expected, frozen = load_file(BASE), load_file(path / "trained.safetensors"), AdapterFile.read(path).has_frozen

    def model():
        model = MLP()
        model.load_state_dict(base)
        return model

    assert_same_bits(bits(sprand.merge(sprand.load(model(), path))), expected)
    pooled = model()
    pool = AdapterPool(pooled)
    pool.add("old", path)
    pool.switch("old")
    assert_same_bits(bits(pooled), expected)
    merge(BASE, [(path, 1.0)], tmp_path / "merged")
    assert_same_bits(load_file(tmp_path / "merged" / "base.safetensors"), expected)
    if "peft_type" in json.loads((path / CONFIG_FILE).read_text()) and not frozen:
        assert_same_bits(bits(PeftModel.from_pretrained(model(), path).merge_and_unload()), expected)
    elif not frozen:
        assert_same_bits(bits(import_adapter(model(), path).merge_and_unload()), expected)
    sprand.save(sprand.load(model(), path), tmp_path / "new")
    assert_same_bits(bits(sprand.merge(sprand.load(model(), tmp_path / "new"))), expected)
    if not frozen:
        assert_same_bits(bits(PeftModel.from_pretrained(model(), tmp_path / "new").merge_and_unload()), expected)


@pytest.mark.parametrize("path", [path for name, path in OLD.items() if name.startswith("runs")], ids=lambda path: path.name)
def test_adapters_that_were_drawn_in_runs_train_on_as_given_masks(tmp_path, path):
    """Both doors train the same entries on, and what they save says where these came from, and needs no draw."""
    state = load_file(BASE)
    expected = {name: value.flatten() for name, value in load_file(path / "trained.safetensors").items()}

    def model():
        model = MLP()
        model.load_state_dict(state)
        return model

    ours, theirs = sprand.load(model(), path), PeftModel.from_pretrained(model(), path, is_trainable=True)
    assert ours._sprand.current.config.strategy == "given"
    layout, trained = path.name.partition("_")[2], merged(trained_further(ours))
    assert_same_bits(merged(trained_further(theirs)), trained)
    assert sum(int((value != state[name].flatten()).sum()) for name, value in trained.items()) > 100
    ours, theirs = sprand.load(model(), path), PeftModel.from_pretrained(model(), path)
    sprand.save(ours, tmp_path / "save")
    theirs.save_pretrained(tmp_path / "save_pretrained")
    for name in ("save", "save_pretrained"):
        file = AdapterFile.read(tmp_path / name)
        assert file.config.strategy == "given" and file.config.layout == "unstructured"
        assert file.selection["layout"] == layout and layout in inspect(tmp_path / name).chosen
        for loaded in (sprand.load(model(), tmp_path / name), PeftModel.from_pretrained(model(), tmp_path / name)):
            assert_same_bits(merged(loaded), expected)


def test_peft_says_in_a_sentence_what_it_cannot_hold(tmp_path):
    sprand.save(redrawn(sprand.apply(built(MLP), density=0.05, target_modules=["second"])), tmp_path / "frozen")
    sprand.save(trained_further(sprand.apply(built(Tied), density=0.2, modules_to_save=["embed"])), tmp_path / "tied")
    for cls, name, match in (
        (MLP, "frozen", "has frozen entries .*sprand.load"),
        (Tied, "tied", "trained embed.weight in full, which this model ties to out.weight.*sprand.load"),
    ):
        model = built(cls)
        with pytest.raises(ValueError, match=match):
            PeftModel.from_pretrained(model, tmp_path / name)
        assert_same_bits(bits(model), bits(built(cls)))
        assert not any("sprand" in key for key, _ in model.named_modules())


def test_a_copied_head_is_not_put_where_it_is_tied(tmp_path):
    model = peft.get_peft_model(built(Tied), SprandConfig(density=0.2, target_modules=["mix"], modules_to_save=["out"]))
    trained_further(model).save_pretrained(tmp_path)
    plain = built(Tied)
    with pytest.raises(ValueError, match="trained a copy of out.weight through PEFT, and left embed.weight as it was"):
        sprand.load(plain, tmp_path)
    assert_same_bits(bits(plain), bits(built(Tied)))
    untied = built(Tied)
    untied.out.weight = nn.Parameter(untied.out.weight.detach().clone())
    assert torch.equal(outputs(sprand.load(untied, tmp_path)), outputs(model))


def test_a_copied_head_is_not_merged_where_the_checkpoint_ties_it(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    fields = {"density": 0.2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    by_peft(llama(tie_word_embeddings=True), fields).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="trained a copy of lm_head.weight through PEFT, and .*base ties it"):
        merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_over_a_quantized_base_goes_on_the_dense_one(tmp_path):
    """The values that it started from are in no checkpoint, so that nothing tells its base; what it has no excuse for, does."""
    model = trained_further(by_peft(built(MLP), {"density": 0.2}))
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / CONFIG_FILE).read_text())
    settings["targets"] = AdapterFile.read(tmp_path).targets
    for target in settings["targets"].values():
        target["fingerprint"] = {}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="expected hashes by dtype, got none"):
        sprand.load(built(MLP), tmp_path)
    for target in settings["targets"].values():
        target["quantized"] = "bitsandbytes_4bit"
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings))
    for loaded in (sprand.load(built(MLP), tmp_path), PeftModel.from_pretrained(built(MLP), tmp_path)):
        assert torch.equal(outputs(loaded), outputs(model))


def test_transformers_loads_what_sprand_saved(tmp_path, monkeypatch):
    integration = pytest.importorskip("transformers.integrations.peft", reason="transformers loads the adapter")
    monkeypatch.setattr(integration, "check_peft_version", lambda min_version: None)  # it may want one that is not out yet
    model = trained_further(sprand.apply(llama(), density=0.1, modules_to_save=["lm_head"]))
    sprand.save(model, tmp_path)
    other = llama()
    other.load_adapter(str(tmp_path))
    assert torch.equal(outputs(other), outputs(model))


def test_a_base_that_differs_below_the_narrower_dtypes_is_another_base(tmp_path):
    by_peft(built(MLP), {"density": 0.5}).save_pretrained(tmp_path)
    model = built(MLP)
    with torch.no_grad():
        model.second.weight.mul_(1 + 2**-20)
    assert torch.equal(model.second.weight.bfloat16(), built(MLP).second.weight.bfloat16())
    for load in (lambda: PeftModel.from_pretrained(model, tmp_path), lambda: sprand.load(model, tmp_path)):
        with pytest.raises(ValueError, match="another base"):
            load()


def test_a_live_adapter_takes_the_values_of_either(tmp_path):
    first, second = (trained_further(by_peft(built(MLP), {"density": 0.2}), steps) for steps in (1, 3))
    sprand.save(trained_further(sprand.apply(built(MLP), density=0.2), 3), tmp_path)
    hotswap(first, tmp_path)
    assert torch.equal(outputs(first), outputs(second))


def test_the_header_of_a_saved_adapter_is_not_optional(tmp_path):
    """Without it nothing would tell damaged values: what PEFT describes is read only where PEFT wrote it."""
    sprand.save(sprand.apply(built(MLP), density=0.2), tmp_path)
    file = tmp_path / WEIGHTS_FILE
    file.write_bytes(file.read_bytes().replace(b'"sprand"', b'"sprunt"'))
    with pytest.raises(ValueError, match="lost the description"):
        sprand.load(built(MLP), tmp_path)


def test_a_folder_of_another_method_or_of_a_newer_sprand_is_refused(tmp_path):
    peft.get_peft_model(built(MLP), peft.LoraConfig(target_modules=["second"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="adapter_config.json beside it is of type LORA"):
        sprand.load(built(MLP), tmp_path / "lora")
    by_peft(built(MLP), {"density": 0.2}).save_pretrained(tmp_path / "newer")
    file = tmp_path / "newer" / CONFIG_FILE
    settings = json.loads(file.read_text())
    settings["versions"]["format_version"] = 99
    file.write_text(json.dumps(settings))
    for load in (sprand.load, PeftModel.from_pretrained):
        with pytest.raises(ValueError, match="has format 99"):
            load(built(MLP), tmp_path / "newer")
