"""Modules that are resized or replaced after `apply`: entries go along, new rows train, all of it is saved and taken off."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sprand
from models import assert_same_bits

OLD, NEW = 30, 37
GROWN = "rows more than it had under sprand.apply: they train in full"


def llama(tied: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=OLD, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=tied
    )
    return transformers.LlamaForCausalLM(config)


def resized(model: nn.Module, rows: int = NEW, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, below: int = OLD, steps: int = 3) -> None:
    tokens = torch.randint(0, below, (2, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: nn.Module, below: int = NEW) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(below)[None]).logits


TARGETS = {
    "embedding": {"target_modules": ["q_proj"], "target_parameters": ["model.embed_tokens.weight"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "neither": {},
    "head in full": {"modules_to_save": ["lm_head"]},
    "both in full": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tied": {"target_modules": ["q_proj", "embed_tokens"]},
    "tied, neither": {},
    "tied, in full": {"modules_to_save": ["embed_tokens"]},
}
OPTIMIZERS = {
    "SparseAdamW": lambda model: sprand.SparseAdamW(model, lr=0.02),
    "AdamW": lambda model: torch.optim.AdamW(sprand.parameters(model), lr=0.02),
}


@pytest.mark.parametrize("made", OPTIMIZERS)
@pytest.mark.parametrize("what", TARGETS)
def test_tokens_that_are_added_after_apply(what: str, made: str, tmp_path: Path):
    tied = what.startswith("tied")
    model = sprand.apply(llama(tied), density=0.2, **TARGETS[what])
    optimizer = OPTIMIZERS[made](model)
    train(model, optimizer)
    trained = sprand.parameters(model)
    before = logits(model, OLD)
    new = {"neither": 2, "embedding": 1, "head": 1, "head in full": 1, "tied, neither": 1}.get(what, 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        resized(model)
    told = [str(warning.message) for warning in told if GROWN in str(warning.message)]
    assert len(told) == {"both in full": 0, "tied, in full": 0, "head in full": 1}.get(what, 1 if tied else 2)
    assert sum("make it anew" in text for text in told) == new
    assert torch.equal(logits(model, OLD)[..., :OLD], before)  # what was learned is there
    assert {id(p) for p in trained} <= {id(p) for p in sprand.parameters(model)}  # an optimizer goes on
    base = resized(copy.deepcopy(sprand.unmerge(copy.deepcopy(model))))
    assert torch.equal(base.lm_head.weight[:OLD], llama(tied).lm_head.weight)
    assert torch.equal(base.model.embed_tokens.weight[:OLD], llama(tied).model.embed_tokens.weight)
    if new:
        optimizer = OPTIMIZERS[made](model)  # it has new parameters
    new_rows = model.lm_head.weight[OLD:].detach().clone(), model.model.embed_tokens.weight[OLD:].detach().clone()
    train(model, optimizer, NEW)
    now = logits(model)
    assert not torch.equal(model.lm_head.weight[OLD:], new_rows[0])
    assert not torch.equal(model.model.embed_tokens.weight[OLD:], new_rows[1])
    with sprand.disabled(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), now)
    sprand.save(model, tmp_path)
    loaded = sprand.load(resized(llama(tied), seed=8), tmp_path)  # whose new rows are others
    assert torch.equal(logits(loaded), now)
    assert_same_bits(sprand.unmerge(loaded).state_dict(), resized(llama(tied), seed=8).state_dict())
    assert torch.equal(logits(sprand.merge(copy.deepcopy(model))), now)
    assert_same_bits(sprand.unmerge(model).state_dict(), base.state_dict())


def test_new_rows_get_their_whole_gradient():
    """Against the same model that trains its embedding in full."""
    model, dense = sprand.apply(llama(), density=0.2, target_modules=["q_proj", "embed_tokens"]), resized(llama())
    with pytest.warns(UserWarning, match=GROWN):
        resized(model)
    tokens = torch.arange(NEW)[None]
    for one in (model, dense):
        one(input_ids=tokens, labels=tokens).loss.backward()
    embed = model.model.embed_tokens
    wanted = dense.model.embed_tokens.weight.grad
    assert torch.allclose(embed.sprand_delta.grad, wanted.flatten()[embed.sprand_indices.long()], atol=1e-6)
    assert set(range(OLD * 16, NEW * 16)) <= set(embed.sprand_indices.tolist())


def test_tokens_are_taken_away(tmp_path: Path):
    model = sprand.apply(llama(), density=0.5, target_modules=["q_proj", "lm_head", "embed_tokens"])
    optimizer = sprand.SparseAdamW(model, lr=0.02)
    train(model, optimizer, 20)
    before = logits(model, 20)
    resized(model, 20)
    assert torch.equal(logits(model, 20), before[..., :20])
    train(model, optimizer, 20)
    sprand.save(model, tmp_path)
    assert torch.equal(logits(sprand.load(resized(llama(), 20), tmp_path), 20), logits(model, 20))
    assert_same_bits(sprand.unmerge(model).state_dict(), resized(llama(), 20).state_dict())


def test_each_adapter_has_its_new_rows():
    model = sprand.apply(llama(), density=0.2, target_modules=["embed_tokens"], name="a")
    train(model, sprand.SparseAdamW(model, lr=0.02))
    sprand.apply(model, density=0.2, target_modules=["q_proj"], name="b")
    with pytest.warns(UserWarning, match=GROWN):
        resized(model)
    outputs = {}
    for name in "ab":
        train(sprand.switch(model, name), sprand.SparseAdamW(model, lr=0.02), NEW)
        outputs[name] = logits(model)
    for name in "aba":
        assert torch.equal(logits(sprand.switch(model, name)), outputs[name])
    with pytest.raises(ValueError, match="frozen entries .*cannot be mixed"):
        sprand.switch(model, {"a": 1.0, "b": 1.0})


def test_a_base_that_was_not_resized_is_refused(tmp_path: Path):
    model = sprand.apply(llama(), density=0.2, target_modules=["embed_tokens"])
    with pytest.warns(UserWarning, match=GROWN):
        resized(model)
    sprand.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"which is \[30, 16\] here and \[37, 16\] there; .*resize_token_embeddings\(37\)"):
        sprand.load(llama(), tmp_path)
    other = resized(llama())
    with torch.no_grad():
        other.model.embed_tokens.weight[:OLD] += 1  # rows that are not new are proven
    with pytest.raises(ValueError, match="trained on another base"):
        sprand.load(other, tmp_path)


def test_resizing_to_the_same_size_leaves_the_entries_alone():
    model = sprand.apply(llama(), density=0.2, target_modules=["q_proj", "lm_head", "embed_tokens"])
    before = sprand.parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resized(model, OLD)
    assert [id(p) for p in sprand.parameters(model)] == [id(p) for p in before]


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.norm(self.first(x)))


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def net(classes: int = 3) -> Net:
    torch.manual_seed(0)
    return Net(classes)


def fresh(classes: int, seed: int = 3) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(8, classes)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for _ in range(3):
        outputs = model(X)
        F.cross_entropy(outputs, torch.arange(16) % outputs.shape[1]).backward()
        optimizer.step()
        optimizer.zero_grad()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X)


@pytest.mark.parametrize("fields", [{}, {"target_modules": ["first"]}, {"modules_to_save": ["head"]}], ids=str)
@pytest.mark.parametrize("classes", [3, 5])
def test_a_new_head(fields: dict, classes: int, tmp_path: Path):
    model = sprand.apply(net(), density=0.3, **fields)
    if fields:
        model.head = fresh(classes)
    else:
        with pytest.warns(UserWarning, match="head.weight, of which sprand trained 7 entries, was replaced .*are dropped"):
            model.head = fresh(classes)
    base = outputs(model)
    fit(model, sprand.SparseAdamW(model, lr=0.05))
    trained = outputs(model)
    assert not torch.equal(model.head.weight, fresh(classes).weight)
    sprand.save(model, tmp_path)
    assert torch.equal(outputs(sprand.load(net(classes), tmp_path)), trained)
    with sprand.disabled(model):
        assert torch.equal(outputs(model), base)
    sprand.switch(model, None)
    assert torch.equal(outputs(sprand.switch(model, "default")), trained)
    sprand.unmerge(model)
    assert torch.equal(outputs(model), base)
    assert torch.equal(model.head.weight, fresh(classes).weight) and model.head.weight.requires_grad


def test_an_adapter_of_another_head_is_refused():
    model = sprand.apply(net(), density=0.3, modules_to_save=["head"], name="three")
    fit(model, sprand.SparseAdamW(model, lr=0.05))
    sprand.apply(model, density=0.3, target_modules=["first"], name="five")
    model.head = fresh(5)
    fit(model, sprand.SparseAdamW(model, lr=0.05))
    five = outputs(model)
    with pytest.raises(ValueError, match=r"adapter 'three' trained head.weight as \[3, 8\], and it is \[5, 8\] now"):
        sprand.switch(model, "three")
    assert torch.equal(outputs(model), five)


@pytest.mark.parametrize("fields", [{}, {"target_modules": ["first"], "modules_to_save": ["head"]}], ids=str)
@pytest.mark.parametrize("meanwhile", ["nothing", "a switch"])
def test_a_module_that_is_taken_out_and_put_back(fields: dict, meanwhile: str, tmp_path: Path):
    model = sprand.apply(net(), density=0.3, **fields)
    optimizer = sprand.SparseAdamW(model, lr=0.05)
    fit(model, optimizer)
    trained, head = outputs(model), model.head
    with pytest.warns(UserWarning, match="head.weight.* was taken out of the model: it holds its base now"):
        model.head = nn.Identity()
    assert model(X).shape[1] == 8
    with pytest.warns(UserWarning, match="save: head.weight .*is not in the model"):
        sprand.save(model, tmp_path)
    if meanwhile == "a switch":
        sprand.switch(model, None)
        model.head = head
        assert torch.equal(outputs(model), outputs(net()))
        sprand.switch(model, "default")
    else:
        model.head = head
    assert torch.equal(outputs(model), trained)
    fit(model, optimizer)
    assert not torch.equal(outputs(model), trained)
    assert_same_bits(sprand.unmerge(model).state_dict(), net().state_dict())


def test_a_norm_that_is_replaced_brings_its_statistics(tmp_path: Path):
    model = sprand.apply(net(), density=0.3)
    fit(model, sprand.SparseAdamW(model, lr=0.05))
    norm = nn.BatchNorm1d(8)
    norm.running_mean.fill_(2.0)
    model.norm = norm
    fit(model, sprand.SparseAdamW(model, lr=0.05))
    sprand.save(model, tmp_path)
    assert torch.equal(outputs(sprand.load(net(), tmp_path)), outputs(model))
    with sprand.disabled(model):
        assert torch.equal(model.norm.running_mean, torch.full((8,), 2.0))  # as it was when it came


def test_a_module_that_is_wrapped_is_the_same():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model = sprand.apply(net(), density=0.3)
    before = sprand.parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.head = Wrapper(model.head)
        assert [id(p) for p in sprand.parameters(model)] == [id(p) for p in before]
        model.head = model.head.inner
    assert [id(p) for p in sprand.parameters(model)] == [id(p) for p in before]
    fit(model, sprand.SparseAdamW(model, lr=0.05))
    assert_same_bits(sprand.unmerge(model).state_dict(), net().state_dict())
