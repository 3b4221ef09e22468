"""Dynamic masks where they meet others: a Trainer, several ranks, and files of the adapter format with and without them."""

from __future__ import annotations

import json
import runpy
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ranks
import sprand
from dynamic_masks import LR, MODES, Drawn, train
from hostile import edited
from models import MLP, assert_same_bits, bits, built, points_and_labels
from sprand.adapters.file import CONFIG_FILE, WEIGHTS_FILE
from sprand.adapters.layout import key


class WithLoss(nn.Module):
    """What a Trainer wants of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = built(MLP)

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trained_by_trainer(folder, mode, seed=0, resume=None, changes=0):
    transformers = pytest.importorskip("transformers")
    from sprand.integrations.transformers import DynamicMaskCallback

    model = sprand.apply(WithLoss(), density=0.2, seed=seed)
    mask = sprand.DynamicMask(model, **MODES[mode](changes))
    x, y = points_and_labels()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    args = transformers.TrainingArguments(
        str(folder), max_steps=15, save_steps=8, per_device_train_batch_size=16, learning_rate=LR, report_to="none",
        disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=[DynamicMaskCallback(mask)])
    trainer.train(resume_from_checkpoint=resume)
    return model, mask


@pytest.mark.parametrize("mode", ["regrow", "recompute"])
def test_a_trainer_moves_the_mask_and_resumes_to_the_bit(tmp_path, mode):
    model, mask = trained_by_trainer(tmp_path, mode)
    assert (mask.count, mask.changes) == (15, 2)
    resumed, other = trained_by_trainer(tmp_path, mode, seed=1, resume=str(tmp_path / "checkpoint-8"), changes=1)
    assert (other.count, other.changes) == (15, 2)
    assert_same_bits(model.state_dict(), resumed.state_dict())
    sprand.save(resumed, tmp_path / "adapter")
    assert_same_bits(bits(sprand.load(WithLoss(), tmp_path / "adapter")), bits(model))


def one_rank(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for density in (0.2, 0.5):
        model = sprand.apply(built(MLP).double(), density=density)
        moved_in_training(model, DistributedDataParallel(model), slice(16 * rank, 16 * rank + 16))
        torch.save(model.state_dict(), f"{folder}/{rank} {density}.pt")
    dist.destroy_process_group()


def moved_in_training(model, called, rows):
    optimizer = sprand.SparseAdamW(model, lr=LR)
    mask = sprand.DynamicMask(model, optimizer, every=3, steps=2, fraction=0.3)
    for seed in range(7):
        x, y = points_and_labels(seed, torch.float64)
        F.cross_entropy(called(x[rows]), y[rows]).backward()
        optimizer.step()
        mask.step()
        optimizer.zero_grad()
    assert mask.changes == 2


def test_ranks_move_the_mask_alike_and_by_all_gradients(tmp_path):
    """Where every free position is a candidate, two ranks choose what one process does that sees the whole batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks.start(one_rank, (port, str(tmp_path)))
    for density in (0.2, 0.5):
        first, second = (torch.load(tmp_path / f"{rank} {density}.pt") for rank in range(2))
        assert_same_bits(first, second)
    alone = sprand.apply(built(MLP).double(), density=0.5)
    before = alone.second.sprand_indices.clone()
    moved_in_training(alone, alone, slice(None))
    assert not torch.equal(alone.second.sprand_indices, before)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-12)


def saved(path, mode):
    model = sprand.apply(built(MLP), density=0.2)
    optimizer = sprand.SparseAdamW(model, lr=LR)
    train(model, optimizer, sprand.DynamicMask(model, optimizer, **MODES[mode]()), 20)
    sprand.save(model, path)
    return model


@pytest.mark.parametrize(("mode", "frozen"), [("regrow", False), ("recompute", True)])
def test_an_adapter_says_where_it_keeps_entries_as_values(tmp_path, mode, frozen):
    """Whatever it holds, an earlier sprand refuses it: its tensors have other names since."""
    saved(tmp_path, mode)
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert description["versions"]["format_version"] == 4
    assert ("frozen" in description["targets"]["second.weight"]) == frozen


EDITS = {
    "no values": (lambda t, d: t.pop(key("frozen_values", "second.weight")), "integer indices and values of frozen entries"),
    "count": (lambda t, d: d["targets"]["second.weight"]["frozen"].update(nnz=3), "expected 3 integer indices"),
    "not finite": (lambda t, d: t[key("frozen_values", "second.weight")].fill_(float("nan")), "not finite"),
    "unsorted": (lambda t, d: t[key("frozen_indices", "second.weight")].fill_(7), "index 7 .* appears twice"),
    "out of range": (lambda t, d: t[key("frozen_indices", "second.weight")].add_(10**6), "out of range"),
    "elsewhere": (lambda t, d: t[key("frozen_indices", "second.weight")][:1].copy_(torch.tensor([0])), "another base|not above"),
}


@pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS.keys())
def test_bad_frozen_entries_are_refused_and_change_nothing(tmp_path, change, message):
    saved(tmp_path, "recompute")
    if message.startswith("another base"):
        with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as content:
            assert content.get_tensor(key("frozen_indices", "second.weight"))[0] > 0
    edited(tmp_path / WEIGHTS_FILE, change)
    model = built(MLP)
    with pytest.raises(ValueError, match=message):
        sprand.load(model, tmp_path)
    assert_same_bits(bits(model), bits(built(MLP)))


def test_another_base_is_seen_in_the_frozen_entries(tmp_path):
    """A base that differs only where nothing trains any more."""
    model = saved(tmp_path, "recompute")
    frozen = model._sprand.current.frozen["second.weight"].indices
    left = frozen[~torch.isin(frozen, model.second.sprand_indices)]
    base = built(MLP)
    base.second.weight.data.view(-1)[left[0].long()] += 1
    with pytest.raises(ValueError, match="trained on another base"):
        sprand.load(base, tmp_path)


def test_adapters_with_frozen_entries_stand_beside_others(tmp_path):
    model = saved(tmp_path / "a", "recompute")
    trained = bits(model)
    other = sprand.load(built(MLP), tmp_path / "a", name="a")
    plain = sprand.apply(built(MLP), density=0.1, seed=3)
    sprand.parameters(plain)[0].data.fill_(0.5)
    sprand.save(plain, tmp_path / "b")
    sprand.load(other, tmp_path / "b", name="b")
    assert_same_bits(bits(other), bits(plain))
    for _ in range(3):
        assert_same_bits(bits(sprand.switch(other, "a")), trained)
        assert_same_bits(bits(sprand.switch(other, "b")), bits(plain))
    with pytest.raises(ValueError, match="frozen entries .of a redrawn mask.*, which cannot be mixed"):
        sprand.switch(other, {"a": 0.5, "b": 0.5})
    assert_same_bits(bits(sprand.load(other, tmp_path / "a", name="a")), trained)
    assert_same_bits(bits(sprand.unmerge(other)), bits(built(MLP)))


def test_the_strategy_sees_the_trained_model():
    seen = []

    class Seeing(Drawn):
        def __call__(self, model):
            seen.append(bits(model))
            return super().__call__(model)

    model = sprand.apply(built(MLP), density=0.2)
    optimizer = torch.optim.AdamW(sprand.parameters(model), lr=LR)
    train(model, optimizer, sprand.DynamicMask(model, optimizer, every=4, mode="recompute", strategy=Seeing()), 4)
    assert_same_bits(seen[0], bits(model))


def test_a_new_pattern_gets_a_new_schedule(monkeypatch):
    """A GPU samples by a schedule of the pattern: it is made anew when the mask moves, and when a state dict moves it."""
    seen = []
    monkeypatch.setattr(
        type(sprand.apply(nn.Sequential(nn.Linear(4, 4)), density=0.5)[0]), "make_schedule",
        lambda module, parameter: seen.append(module.sprand_indices.clone()),
    )  # fmt: skip
    model = sprand.apply(built(MLP), density=0.2, target_modules=["second"])
    optimizer = sprand.SparseAdamW(model, lr=LR)
    train(model, optimizer, sprand.DynamicMask(model, optimizer, every=3), 3)
    assert len(seen) == 2
    assert torch.equal(seen[-1], model.second.sprand_indices)
    other = sprand.apply(built(MLP), density=0.2, target_modules=["second"])
    other.load_state_dict(model.state_dict())
    assert len(seen) == 4
    assert torch.equal(seen[-1], model.second.sprand_indices)
    other.load_state_dict(model.state_dict())
    assert len(seen) == 4


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "dynamic_mask.py"))["main"]()
    fixed, dynamic, equal = capsys.readouterr().out.splitlines()
    assert float(dynamic.split()[-1]) < float(fixed.split()[-1])
    assert equal.endswith("True")


@pytest.mark.parametrize("loaded", [False, True])
def test_a_new_base_under_frozen_entries_is_refused(tmp_path, loaded):
    model = saved(tmp_path, "recompute")
    model = sprand.load(built(MLP), tmp_path) if loaded else model
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"second.weight holds values that an earlier mask trained.*sprand.save"):
        model.load_state_dict(built(MLP).state_dict(), strict=False)
    assert_same_bits(bits(model), before)
