"""What training changes beside entries: buffers, and parameters unfrozen by hand. They are saved, restored and taken off."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import sprand
from models import assert_same_bits
from sprand.checkpoint.merge import merge
from sprand.serving import DeltaReceiver, DeltaSync


class Counting(nn.Module):
    """A layer with buffers of its own: a mean that moves, one that does not, one that is replaced, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("fixed", torch.ones(8))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(8), persistent=False)

    def forward(self, x):
        if self.training:
            self.last = x.detach().mean(0)
            self.mean.lerp_(self.last, 0.1)
            self.seen = self.seen + len(x)
        return x * self.fixed + self.mean


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.counting, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), Counting(), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.last(self.counting(self.norm(self.first(x)))) * self.scale


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)) * 3 + 1
Y = torch.arange(16) % 3


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X)


def assert_comes_and_goes(model: nn.Module, folder: Path) -> None:
    """What was trained is loaded, disabled, switched and unmerged to the bit, and merged."""
    trained, base = outputs(model), outputs(net())
    assert not torch.equal(trained, base)
    sprand.save(model, folder)
    assert torch.equal(outputs(sprand.load(net(), folder)), trained)
    with sprand.disabled(model):
        assert torch.equal(outputs(model), base)
        with torch.no_grad():
            model.train()(X)  # a forward in here is not the adapter's, and does not change the base
    assert torch.equal(outputs(model), trained)
    sprand.switch(model, None)
    assert torch.equal(outputs(model), base)
    sprand.switch(model, "default")
    assert torch.equal(outputs(model), trained)
    merged = sprand.merge(sprand.load(net(), folder))
    assert torch.equal(outputs(merged), trained)
    assert_same_bits(sprand.unmerge(model).state_dict(), net().state_dict())


def test_buffers_of_frozen_modules(tmp_path: Path):
    model = sprand.apply(net(), density=0.3)
    train(model, sprand.SparseAdamW(model, lr=0.05))
    sprand.save(model, tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert not any(name.endswith(("counting.last", "norm.sprand_delta.weight")) for name in held)
    assert_comes_and_goes(model, tmp_path)


def test_a_model_in_evaluation_mode_has_no_buffers_to_save(tmp_path: Path):
    model = sprand.apply(net().eval(), density=0.3)
    model(X).sum().backward()
    sprand.SparseAdamW(model).step()
    sprand.save(model, tmp_path)
    assert not any("norm" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_buffers_by_adapter():
    model = sprand.apply(net(), density=0.3, name="a")
    train(model, sprand.SparseAdamW(model, lr=0.05))
    a = outputs(model)
    sprand.apply(model, density=0.3, seed=1, name="b")
    train(model, sprand.SparseAdamW(model, lr=0.05), steps=5)
    b = outputs(model)
    for name, wanted in (("a", a), ("b", b), ("a", a)):
        assert torch.equal(outputs(sprand.switch(model, name)), wanted)
    with pytest.raises(ValueError, match="adapter 'a' trained whole modules or buffers .norm.running_mean, .*cannot be mixed"):
        sprand.switch(model, {"a": 1.0, "b": 1.0})
    sprand.combine(model, {"a": 1.0, "b": 1.0}, drop_heads=True)
    assert torch.equal(model.norm.running_mean, net().norm.running_mean)


def test_a_buffer_whose_entries_share_memory(tmp_path: Path):
    def spread() -> Net:
        model = net()
        model.counting.fixed = torch.ones(1).expand(8)
        return model

    model = sprand.apply(spread(), density=0.3, modules_to_save=["counting"])
    train(model, sprand.SparseAdamW(model, lr=0.05))
    sprand.save(model, tmp_path)
    assert torch.equal(outputs(sprand.load(spread(), tmp_path)), outputs(model))
    with sprand.disabled(model):
        assert torch.equal(outputs(model), outputs(net()))


def test_a_cast_changes_no_buffer():
    model = sprand.apply(net().eval(), density=0.3, name="a").double()
    sprand.apply(model, density=0.3, seed=1, name="b")
    sprand.switch(model, {"a": 1.0, "b": 1.0})
    assert_same_bits(sprand.unmerge(model).state_dict(), net().double().state_dict())


def test_an_adapter_whose_values_are_replaced_takes_their_buffers(tmp_path: Path):
    model = sprand.apply(net(), density=0.3)
    sprand.save(model, tmp_path / "new")
    train(model, sprand.SparseAdamW(model, lr=0.05))
    sprand.save(model, tmp_path / "trained")
    trained = outputs(model)
    sprand.load(model, tmp_path / "new")
    assert torch.equal(outputs(model), outputs(net()))
    assert torch.equal(outputs(sprand.load(model, tmp_path / "trained")), trained)


@pytest.mark.parametrize(
    "made",
    [
        lambda model: sprand.SparseAdamW(model, lr=0.05),
        lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
    ],
)
def test_what_was_unfrozen_by_hand(made, tmp_path: Path):
    model = sprand.apply(net(), density=0.3, target_modules=["first"])
    for p in (*model.norm.parameters(), model.last.bias, model.scale):
        p.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, made(model))
    assert_comes_and_goes(model, tmp_path)
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_unfrozen_later(tmp_path: Path):
    model = sprand.apply(net(), density=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, optimizer)
    model.scale.requires_grad_()
    train(model, optimizer)
    model.norm.requires_grad_()
    train(model, torch.optim.SGD(model.norm.parameters(), lr=0.05))
    model.scale.requires_grad_(False)
    assert_comes_and_goes(model, tmp_path)


def test_what_was_unfrozen_belongs_to_one_adapter():
    model = sprand.apply(net(), density=0.3, name="a")
    model.scale.requires_grad_()
    train(model, sprand.SparseAdamW(model, lr=0.05))
    a = outputs(model)
    sprand.apply(model, density=0.3, seed=1, name="b")
    assert torch.equal(model.scale, torch.ones(3)) and not model.scale.requires_grad
    assert torch.equal(outputs(sprand.switch(model, "a")), a) and model.scale.requires_grad


def test_what_no_optimizer_has_stepped_is_refused(tmp_path: Path):
    model = sprand.apply(net(), density=0.3)
    model.scale.requires_grad_()
    with torch.no_grad():
        model.scale.mul_(2)
    with pytest.raises(ValueError, match="save: scale trains in full beside the adapter, .*name its module in modules_to_save"):
        sprand.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_weight_of_which_entries_train_does_not_train_in_full_as_well():
    model = sprand.apply(net(), density=0.3)
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, optimizer)  # it gets no gradient of its own
    model.first.weight.grad = torch.ones_like(model.first.weight)
    before = model.first.weight.detach().clone()
    with pytest.raises(ValueError, match="first.weight: its chosen entries train, and this optimizer would change it in full"):
        torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert torch.equal(model.first.weight, before)


def test_buffers_are_merged_into_files(tmp_path: Path):
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    model = sprand.apply(net(), density=0.3)
    train(model, sprand.SparseAdamW(model, lr=0.05))
    sprand.save(model, tmp_path / "adapter")
    merge(tmp_path, [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
    merged = net()
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert torch.equal(outputs(merged), outputs(model))


def test_peft_loads_them(tmp_path: Path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("sprand.peft")
    model = sprand.apply(net(), density=0.3, target_modules=["first"])
    model.last.bias.requires_grad_()
    train(model, sprand.SparseAdamW(model, lr=0.05))
    sprand.save(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    with loaded.disable_adapter():
        assert torch.equal(outputs(loaded), outputs(net()))


def test_peft_cannot_hold_a_module_in_full_and_in_part(tmp_path: Path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("sprand.peft")
    model = sprand.apply(net(), density=0.3, target_modules=["first"])
    model.first.bias.requires_grad_()
    train(model, sprand.SparseAdamW(model, lr=0.05))
    sprand.save(model, tmp_path)
    assert torch.equal(outputs(sprand.load(net(), tmp_path)), outputs(model))
    with pytest.raises(ValueError, match="trained parameters or buffers of first in full, and entries of first.weight"):
        peft.PeftModel.from_pretrained(net(), tmp_path)


def test_a_copy_of_a_model_takes_what_is_unfrozen_as_well(tmp_path: Path):
    model = copy.deepcopy(sprand.apply(net(), density=0.3))
    model.scale.requires_grad_()
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05))
    assert_comes_and_goes(model, tmp_path)


def test_another_base_brings_its_buffers_and_heads():
    other = net()
    train(other, torch.optim.SGD(other.parameters(), lr=0.05))
    model = sprand.apply(net(), density=0.3, target_modules=["first"], modules_to_save=["last"])
    train(model, sprand.SparseAdamW(model, lr=0.05))
    model.load_state_dict(other.state_dict(), strict=False)
    train(model, sprand.SparseAdamW(model, lr=0.05))
    with sprand.disabled(model):
        assert torch.equal(outputs(model), outputs(other))
    assert_same_bits(sprand.unmerge(model).state_dict(), other.state_dict())
    assert not model._load_state_dict_pre_hooks


def test_a_base_that_is_loaded_after_the_meta_device_brings_its_buffers():
    with torch.device("meta"):
        model = net()
    sprand.apply(model, density=0.3)
    model.to_empty(device="cpu").load_state_dict(net().state_dict(), strict=False)
    train(model, sprand.SparseAdamW(model, lr=0.05))
    assert_same_bits(sprand.unmerge(model).state_dict(), net().state_dict())


def test_a_checkpoint_of_training_is_no_other_base():
    model, resumed = sprand.apply(net(), density=0.3), sprand.apply(net(), density=0.3)
    for one in (model, resumed):
        one.scale.requires_grad_()
    train(model, sprand.SparseAdamW(model, lr=0.05))
    resumed.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    train(resumed, sprand.SparseAdamW(resumed, lr=0.0))
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(outputs(resumed), outputs(model))
    assert_same_bits(sprand.unmerge(resumed).state_dict(), net().state_dict())


OPTIMIZERS = {
    "SparseAdamW": lambda model: sprand.SparseAdamW(model, lr=0.05),
    "SGD": lambda model: torch.optim.SGD(sprand.parameters(model), lr=0.1),
}


@pytest.mark.parametrize("made", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_averages_and_slow_weights(made, tmp_path: Path):
    """What stands in the deltas and buffers is what the next forward uses, saves and merges."""
    model = sprand.apply(net(), density=0.3)
    average, optimizer = AveragedModel(model), made(model)
    deltas = sprand.parameters(model)
    slow = [p.detach().clone() for p in deltas]
    for _ in range(3):
        train(model, optimizer, steps=1)
        average.update_parameters(model)
        for held, p in zip(slow, deltas, strict=True):
            p.data.copy_(held.lerp_(p.data, 0.5))
        merged = sprand.merge(copy.deepcopy(model))
        assert torch.equal(model(X).detach(), merged(X))
    update_bn([X], average)
    sprand.save(average.module, tmp_path)
    assert torch.equal(outputs(sprand.load(net(), tmp_path)), outputs(average))
    assert_same_bits(sprand.unmerge(average.module).state_dict(), net().state_dict())


def test_peft_says_what_it_does_not_save(tmp_path: Path):
    peft = pytest.importorskip("peft")
    from sprand.peft import SprandConfig

    model = peft.get_peft_model(net(), SprandConfig(density=0.3, target_modules=["first"]))
    model.base_model.model.scale.requires_grad_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with pytest.warns(UserWarning, match="scale trains beside the adapter of this PEFT model, .*modules_to_save of SprandConfig"):
        train(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)
    with pytest.warns(UserWarning, match=r"counting.mean \(and 4 more\) changed in training, and PEFT saves no buffers"):
        model.save_pretrained(tmp_path / "without")
    kept = SprandConfig(density=0.3, target_modules=["first"], modules_to_save=["norm", "counting"])
    model = peft.get_peft_model(net(), kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05))
        model.save_pretrained(tmp_path / "kept")
    assert torch.equal(outputs(sprand.load(net(), tmp_path / "kept")), outputs(model))


def test_an_engine_gets_changed_statistics_as_well():
    model, engine = sprand.apply(net(), density=0.3), net()
    sync, receiver = DeltaSync(model), DeltaReceiver(engine)
    receiver.receive(sync.indices())
    optimizer = sprand.SparseAdamW(model, lr=0.05)
    train(model, optimizer)
    with pytest.raises(RuntimeError, match="trains other entries than were sent; call indices"):
        sync.values()
    receiver.receive(sync.indices())
    train(model, optimizer)
    receiver.receive(sync.values())
    assert torch.equal(outputs(engine), outputs(model))
    receiver.revert()
    assert torch.equal(outputs(engine), outputs(net()))


def test_the_optimizer_of_another_model_settles_nothing():
    """What a parameter was before is what its own optimizer finds, not what it held at some other model's first step."""
    model, other = sprand.apply(net(), density=0.3, target_modules=["first"]), net()
    model.scale.requires_grad_(True)
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), 1)
    model.scale.data.fill_(2.0)
    train(model, sprand.SparseAdamW(model, lr=0.05))
    assert not torch.equal(model.scale.data, torch.full((3,), 2.0))
    sprand.unmerge(model)
    assert torch.equal(model.scale.data, torch.full((3,), 2.0))
