"""Two doors, one choice: `sprand.apply` and `get_peft_model` train the same entries, and refuse the same fields."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import sprand
from models import MLP, EveryLayer, Tied, assert_same_bits, bits, built, points_and_labels
from peft_models import llama, peft, positions, trainable
from sprand.layers.sites import sites_of
from sprand.peft import SprandConfig


class Headed(nn.Module):
    """A body, and a large linear head whose name says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24))
        self.out = nn.Linear(24, 90)

    def forward(self, x):
        return self.out(self.body(x))


class Embeddings(nn.Module):
    """Holds a parameter of its own, and a layer, as the embeddings of vision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(16))
        self.patch = nn.Linear(16, 16)

    def forward(self, x):
        return self.patch(x) + self.position


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.again(self.first(x)))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the model is made by transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def classifier() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the model is made by transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes, num_labels=3))


MODELS = {
    "mlp": lambda: built(MLP),
    "every layer": lambda: built(EveryLayer),
    "tied": lambda: built(Tied),
    "twice": lambda: built(Twice),
    "headed": lambda: built(Headed),
    "llama": llama,
    "gpt2": gpt2,
    "classifier": classifier,
}
MASKS = {"second.weight": torch.arange(0, 500, 7), "first.bias": torch.arange(24) % 2 == 0}
WTE, LM_HEAD = "transformer.wte.weight", "lm_head.weight"

SAME = [
    *(
        (model, {"density": 0.1})
        for model in ("mlp", "every layer", "tied", "twice", "headed", "llama", "gpt2", "classifier")
    ),
    ("mlp", {}),
    ("mlp", {"budget": 77, "seed": 5}),
    ("mlp", {"budget": 1}),
    ("mlp", {"budget": 0.03}),
    ("mlp", {"density": 1.0, "strategy": "uniform"}),
    ("mlp", {"density": 0.2, "target_modules": ["second"], "target_parameters": ["bias"]}),
    ("mlp", {"density": 0.2, "target_modules": r"(first|third)"}),
    ("mlp", {"density": 0.2, "exclude_modules": ["second"]}),
    ("mlp", {"density": 0.2, "target_modules": r".*", "exclude_modules": r".*ir.*"}),
    ("mlp", {"density": 0.2, "target_modules": None, "target_parameters": ["second.weight", "third.bias"]}),
    ("mlp", {"density": 0.2, "target_parameters": ["third.weight"], "exclude_modules": ["third"]}),
    ("mlp", {"strategy": MASKS}),
    ("mlp", {"strategy": MASKS, "modules_to_save": ["second"]}),
    *((model, {"density": 0.2, "layout": "columns"}) for model in ("mlp", "tied", "twice", "headed", "llama", "gpt2")),
    ("mlp", {"density": 0.2, "layout": "columns", "strategy": "uniform", "target_parameters": ["second.weight", "first.bias"]}),
    ("every layer", {"density": 0.2, "target_modules": ["embed", "linear", "conv"], "target_parameters": ["norm.weight"]}),
    ("every layer", {"density": 0.2, "layout": "columns", "target_modules": ["embed", "linear", "conv"]}),
    ("every layer", {"budget": 0.02, "modules_to_save": ["embed"]}),
    ("tied", {"density": 0.2, "target_modules": ["out"]}),
    ("tied", {"density": 0.2, "target_modules": ["embed", "mix", "out"]}),
    ("tied", {"density": 0.2, "target_modules": None, "target_parameters": ["out.weight"]}),
    ("tied", {"density": 0.2, "exclude_modules": ["embed"]}),
    ("tied", {"strategy": {"out.weight": torch.tensor([5, 3])}}),
    ("twice", {"density": 0.2, "target_modules": ["again"]}),
    ("twice", {"density": 0.2, "exclude_modules": ["first"]}),
    ("twice", {"density": 0.2, "target_modules": None, "target_parameters": ["again.weight"]}),
    ("headed", {"budget": 0.05, "target_modules": ["body.0", "body.2"], "modules_to_save": ["out"]}),
    ("headed", {"density": 0.1, "modules_to_save": ["out"]}),
    ("headed", {"density": 0.1, "target_modules": ["body.0", "out"], "modules_to_save": ["out"]}),
    ("headed", {"density": 0.1, "target_parameters": ["out.weight", "out.bias"], "modules_to_save": ["out"]}),
    ("headed", {"density": 0.1, "target_modules": r"body\..*|out", "modules_to_save": ["body.2"]}),
    ("headed", {"budget": 40, "modules_to_save": ["body"]}),
    ("llama", {"density": 0.1, "layout": "columns", "strategy": "uniform"}),
    ("llama", {"budget": 0.02, "target_modules": ["v_proj", "o_proj"]}),
    ("llama", {"budget": 0.02, "target_modules": ["v_proj", "o_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    ("llama", {"density": 0.1, "target_modules": r".*\.layers\.1\..*_proj", "exclude_modules": ["down_proj"]}),
    ("llama", {"density": 0.1, "target_modules": ["layers.0.mlp.up_proj", "lm_head"]}),
    ("llama", {"density": 0.1, "target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight", "norm.weight"]}),
    ("gpt2", {"budget": 0.01}),
    ("gpt2", {"density": 0.2, "layout": "columns", "target_modules": ["c_attn", "lm_head"]}),
    ("gpt2", {"budget": 300, "target_modules": ["c_attn", "lm_head"]}),
    ("gpt2", {"density": 0.1, "target_modules": ["attn.c_proj"], "target_parameters": ["wte.weight"]}),
    ("gpt2", {"density": 0.1, "target_modules": None, "target_parameters": ["lm_head.weight", "c_fc.bias"]}),
    ("gpt2", {"strategy": {LM_HEAD: torch.tensor([2000, 7])}}),
    ("gpt2", {"budget": 0.01, "target_parameters": ["wte.weight"], "modules_to_save": ["lm_head"]}),
    *(("classifier", {"budget": 0.01, "modules_to_save": name}) for name in (["score"], "score", "auto")),
    ("mlp", {"budget": 0.03, "modules_to_save": "auto"}),
    ("classifier", {"density": 0.1, "target_modules": ["q_proj", "score"]}),
]  # fmt: skip


def fields_of(fields):
    """The fields of a `SprandConfig`, whose masks have a field of their own."""
    return {"mask" if key == "strategy" and isinstance(value, dict) else key: value for key, value in fields.items()}


def in_full_of_apply(model):
    return {name for name, p in model.named_parameters() if p.requires_grad and "sprand_delta" not in name}


def in_full_of_peft(model):
    names = (name for name, p in model.named_parameters() if p.requires_grad and ".sprand_delta" not in name)
    return {name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in names}


@pytest.mark.parametrize(("model", "fields"), SAME, ids=lambda value: value if isinstance(value, str) else str(sorted(value)))
def test_both_doors_train_the_same(model, fields):
    ours = sprand.apply(MODELS[model](), **fields)
    theirs = peft.get_peft_model(MODELS[model](), SprandConfig(**fields_of(fields)))
    chosen = dict(ours._sprand.current.indices)
    assert chosen
    assert_same_bits(positions(theirs), chosen)
    if model != "gpt2":  # PEFT trains a copy of a tied head, and apply the one weight of both
        assert in_full_of_peft(theirs) == in_full_of_apply(ours)
    drawn = {name.rpartition(".")[0] for name in chosen}
    assert not drawn & {name.rpartition(".")[0] for name in in_full_of_apply(ours)}


REFUSED = [
    ("mlp", {"target_modules": ["secnd"]}, "'secnd' matches no module of this model; the closest names are second"),
    ("mlp", {"target_modules": ["first", "secnd"]}, "'secnd' matches no module of this model; the closest names are second"),
    ("mlp", {"target_modules": r"nothing\..*"}, "matches no module of this model"),
    ("mlp", {"target_modules": None}, "target_modules=None matches no module"),
    ("mlp", {"exclude_modules": ["first", "second", "third"]}, "matches no module of this model"),
    ("mlp", {"target_parameters": ["frist.bias"]}, "'frist.bias' matches nothing in this model; the closest names are"),
    ("mlp", {"modules_to_save": ["fourth"]}, "modules_to_save: 'fourth' matches nothing in this model; the closest names are"),
    ("mlp", {"target_modules": ["third"], "modules_to_save": ["third"]}, "it trains all targets in full, third.weight"),
    ("mlp", {"density": 1e-9}, "of the 1,056 targeted entries rounds to no entry; raise it, or target more"),
    ("mlp", {"budget": 10**6}, "1,000,000 entries were asked for, but the targets hold 1,056"),
    ("mlp", {"layout": "run8", "budget": 64}, r"runs of adjacent entries \('run8'\) are drawn no more; give layout='columns'"),
    ("mlp", {"layout": "columns", "budget": 40}, "40 of 1,056 entries leave no whole column to first.weight"),
    ("mlp", {"strategy": {"secnd.weight": torch.tensor([0])}}, "no parameter 'secnd.weight'; the closest names are second"),
    ("mlp", {"strategy": {"second.weight": torch.tensor([576])}}, "index 576 .* is out of range"),
    ("mlp", {"strategy": {"second.weight": torch.tensor([1, 1])}}, "index 1 .* appears twice"),
    ("mlp", {"strategy": {"second.weight": torch.zeros(24, 24, dtype=torch.bool)}}, "it chooses no entry at all"),
    ("tied", {"strategy": dict.fromkeys(("embed.weight", "out.weight"), torch.tensor([1]))}, "another name of embed.weight"),
    ("llama", {"target_modules": ["self_attn"]}, "self_attn .* has no weight of its own; name the layers inside of it"),
    ("every layer", {"target_modules": ["rnn"]}, "has no `weight`, it holds weight_ih_l0, .* target_parameters="),
]  # fmt: skip


@pytest.mark.parametrize(("model", "fields", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_both_doors_refuse_the_same_in_the_same_words(model, fields, message):
    ours, theirs = MODELS[model](), MODELS[model]()
    with pytest.raises(ValueError, match=message) as said:
        sprand.apply(ours, **fields)
    with pytest.raises(ValueError, match=message) as answered:
        peft.get_peft_model(theirs, SprandConfig(**fields_of(fields)))
    assert str(said.value) == str(answered.value)
    for untouched in (ours, theirs):
        assert [type(module) for module in untouched.modules()] == [type(module) for module in MODELS[model]().modules()]
        assert_same_bits(bits(untouched), bits(MODELS[model]()))


def read_only(tmp_path):
    model = built(MLP)
    np.ones((24, 24), dtype=np.float32).tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", dtype=np.float32, mode="r", shape=(24, 24))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once in a process, torch says that this memory is not writable
        model.second.weight.data = torch.from_numpy(mapped)
    return model


def made_for_inference(tmp_path):
    with torch.inference_mode():
        return built(MLP)


def turned(tmp_path):
    model = built(MLP)
    model.second.weight.data = torch.zeros(24, 24).t()
    model.second.weight.data = model.second.weight.data[::2].t()
    return model


def of_whole_numbers(tmp_path):
    model = built(MLP)
    model.second.weight = nn.Parameter(torch.ones(24, 24, dtype=torch.int8), requires_grad=False)
    return model


MEMORY = {
    read_only: "second.weight: this weight lies in read-only memory .*; copy it first",
    made_for_inference: "first.weight: this weight was made under torch.inference_mode",
    turned: "second.weight: expected contiguous memory, got strides",
    of_whole_numbers: "second.weight: expected a floating-point weight, got torch.int8",
}


@pytest.mark.parametrize("made", MEMORY, ids=lambda made: made.__name__)
def test_both_doors_refuse_the_same_memory(made, tmp_path):
    said = []
    for door in (sprand.apply, lambda model: peft.get_peft_model(model, SprandConfig())):
        model = made(tmp_path)
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=MEMORY[made]) as refused:
            door(model)
        said.append(str(refused.value))
        assert [type(module) for module in model.modules()] == [type(module) for module in built(MLP).modules()]
        assert [p.requires_grad for p in model.parameters()] == flags and not hasattr(model, "_sprand")
        if made in (read_only, turned):
            model.second.weight.data = model.second.weight.data.clone(memory_format=torch.contiguous_format)
            door(model)
    assert said[0] == said[1]


class Scaled(nn.Module):
    """A module with a weight of its own around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) * self.scale


def test_a_second_adapter_trains_what_lies_inside_of_a_module_of_the_first():
    outer = {"density": 1.0, "target_modules": None, "target_parameters": ["scale"]}
    inner = {"density": 0.5, "target_modules": ["linear"], "exclude_modules": ["scaled"]}
    theirs = peft.get_peft_model(nn.ModuleDict({"scaled": Scaled()}), SprandConfig(**outer))
    theirs.add_adapter("second", SprandConfig(**inner))
    ours = sprand.apply(nn.ModuleDict({"scaled": Scaled()}), **inner)
    assert_same_bits(positions(theirs, "second"), dict(ours._sprand.current.indices))
    assert list(positions(theirs)) == ["scaled.scale"]


def test_a_task_of_peft_trains_its_head_in_full_and_draws_nothing_there():
    ours = sprand.apply(classifier(), budget=0.01, modules_to_save="auto")
    theirs = peft.get_peft_model(classifier(), SprandConfig(task_type="SEQ_CLS", budget=0.01))
    assert_same_bits(positions(theirs), dict(ours._sprand.current.indices))
    assert in_full_of_peft(theirs) == in_full_of_apply(ours) == {"score.weight"}


def test_layers_to_transform_are_those_layers_of_apply():
    ours = sprand.apply(llama(), density=0.1, target_modules=r".*\.1\..*\.(q_proj|up_proj)")
    config = SprandConfig(density=0.1, target_modules=["q_proj", "up_proj"], layers_to_transform=1)
    assert_same_bits(positions(peft.get_peft_model(llama(), config)), dict(ours._sprand.current.indices))
    with pytest.raises(ValueError, match="none of the target_modules is in a layer 7; some are in the layers 0, 1"):
        peft.get_peft_model(llama(), SprandConfig(target_modules=["q_proj"], layers_to_transform=[7]))


@pytest.mark.parametrize("fields", [{"density": 0.2}, {"strategy": MASKS}], ids=["drawn", "given"])
def test_both_doors_lead_off_the_meta_device_with_the_same_entries(fields):
    with torch.device("meta"):
        models = [MLP(), MLP()]
    ours = sprand.apply(models[0], **fields).to_empty(device="cpu")
    theirs = peft.get_peft_model(models[1], SprandConfig(**fields_of(fields))).to_empty(device="cpu")
    expected = dict(sprand.apply(built(MLP), **fields)._sprand.current.indices)
    assert_same_bits({site.name: site.entries.indices for site in sites_of(ours)}, expected)
    assert_same_bits(positions(theirs), expected)


@pytest.mark.parametrize("merge", [True, False])
def test_a_layer_inside_of_a_module_with_parameters_of_its_own_is_unloaded_too(merge):
    x, base = points_and_labels()[0], built(lambda: nn.Sequential(Embeddings(), nn.Tanh(), nn.Linear(16, 4)))
    plain, names = copy.deepcopy(base), ["0.position", "0.patch.weight", "2.weight"]
    model = peft.get_peft_model(base, SprandConfig(density=0.5, target_modules=None, target_parameters=names))
    for p in trainable(model):
        p.data.normal_()
    expected = model(x) if merge else plain(x)
    model.state_dict()  # the base is in the weights now
    unloaded = model.merge_and_unload() if merge else model.unload()
    assert torch.equal(unloaded(x), expected)
    assert [type(module) for module in unloaded.modules()] == [type(module) for module in plain.modules()]


def test_an_adapter_of_a_layer_inside_of_a_module_with_parameters_of_its_own_goes_through_either_door(tmp_path):
    x, base = points_and_labels()[0], built(lambda: nn.Sequential(Embeddings(), nn.Tanh(), nn.Linear(16, 4)))
    fields = {"density": 0.5, "target_modules": None, "target_parameters": ["0.position", "0.patch.weight", "2.weight"]}
    theirs = peft.get_peft_model(copy.deepcopy(base), SprandConfig(**fields))
    for p in trainable(theirs):
        p.data.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = sprand.load(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.equal(ours(x), theirs(x))
    sprand.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(again(x), theirs(x))
