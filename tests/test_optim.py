"""`SparseAdamW` is a torch optimizer in every convention, and equal to AdamW on the deltas."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sprand
from models import MLP, built, points_and_labels


def backward(model, scale=1.0, seed=0):
    x, y = points_and_labels(seed, dtype=next(model.parameters()).dtype)
    (scale * F.cross_entropy(model(x), y)).backward()


def pair(**fields):
    """Two equal float64 models: one for SparseAdamW, one for torch's AdamW."""
    return tuple(sprand.apply(built(MLP).double(), **({"density": 0.3} | fields)) for _ in range(2))


def assert_equal_models(a, b, rtol=1e-12):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}")


def run(model, optimizer, steps=6, **options):
    for step in range(steps):
        backward(model, seed=step, **options)
        optimizer.step()
        optimizer.zero_grad()
    sprand.write(model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True},
        {"weight_decay": 0.3},
        {"betas": (0.5, 0.99)},
        {"eps": 1e-3},
        {"lr": torch.tensor(0.02)},
        {"capturable": True},
    ],
    ids=lambda o: next(iter(o), "default"),
)
def test_equals_adamw(options):
    ours, theirs = pair()
    options = {"lr": 0.02} | options
    run(ours, sprand.SparseAdamW(ours, **options))
    options.pop("capturable", None)
    run(
        theirs,
        torch.optim.AdamW(
            sprand.parameters(theirs), **{k: float(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        ),
    )
    assert_equal_models(ours, theirs)


def test_a_step_leaves_every_weight_written():
    model = sprand.apply(built(MLP), density=0.3)
    optimizer = sprand.SparseAdamW(model, lr=0.1)
    backward(model)
    optimizer.step()
    for module in (model.first, model.second, model.third):
        expected = module.sprand_base + module.sprand_delta
        assert torch.equal(module.weight.flatten()[module.sprand_indices.long()], expected)


def test_groups_named_parameters_and_heads():
    ours, theirs = pair(modules_to_save=["third"])

    def groups(model):
        first, rest = model.first.sprand_delta, [model.second.sprand_delta, *model.third.parameters()]
        return [{"params": [first], "lr": 0.05, "weight_decay": 0.2}, {"params": rest}]

    run(ours, sprand.SparseAdamW(groups(ours), lr=0.01))
    run(theirs, torch.optim.AdamW(groups(theirs), lr=0.01))
    assert_equal_models(ours, theirs)
    named = sprand.SparseAdamW(sprand.named_parameters(ours), lr=0.01)
    assert "first.sprand_delta" in named.state_dict()["param_groups"][0]["param_names"]
    assert "first.sprand_delta" in sprand.SparseAdamW(ours).state_dict()["param_groups"][0]["param_names"]


def test_add_param_group():
    ours, theirs = pair()
    a = sprand.SparseAdamW([ours.first.sprand_delta], lr=0.02)
    b = torch.optim.AdamW([theirs.first.sprand_delta], lr=0.02)
    for optimizer, model in ((a, ours), (b, theirs)):
        optimizer.add_param_group({"params": [model.second.sprand_delta, model.third.sprand_delta], "lr": 0.005})
        run(model, optimizer)
    assert_equal_models(ours, theirs)


def test_scheduler_closure_and_hooks():
    ours, theirs = pair()
    calls = []
    for model, optimizer in (
        (ours, sprand.SparseAdamW(ours, lr=0.02)),
        (theirs, torch.optim.AdamW(sprand.parameters(theirs), lr=0.02)),
    ):
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=5)
        optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *args: calls.append("post"))

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            backward(model)
            return torch.tensor(7.0)

        for _ in range(5):
            assert optimizer.step(closure) == 7.0
            scheduler.step()
    sprand.write(theirs)
    assert calls == ["pre", "post"] * 10
    assert_equal_models(ours, theirs)


@pytest.mark.parametrize("direction", ["to AdamW", "to SparseAdamW"])
def test_state_dict_moves_both_ways(direction):
    """Half the steps with one optimizer, half with the other, equals all steps with AdamW."""
    ours, theirs = pair()
    run(theirs, torch.optim.AdamW(sprand.parameters(theirs), lr=0.02), steps=4)
    makers = [sprand.SparseAdamW, torch.optim.AdamW]
    first, second = makers if direction == "to AdamW" else makers[::-1]
    before = first(sprand.parameters(ours), lr=0.02)
    for seed in (0, 1):
        backward(ours, seed=seed)
        before.step()
        before.zero_grad()
    after = second(sprand.parameters(ours), lr=0.5)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for seed in (2, 3):
        backward(ours, seed=seed)
        after.step()
        after.zero_grad()
    sprand.write(ours)
    assert_equal_models(ours, theirs)


def test_resume_equals_never_stopped():
    whole, half = pair()
    run(whole, sprand.SparseAdamW(whole, lr=0.02), steps=4)
    optimizer = sprand.SparseAdamW(half, lr=0.02)
    for seed in (0, 1):
        backward(half, seed=seed)
        optimizer.step()
        optimizer.zero_grad()
    resumed = sprand.apply(built(MLP).double(), density=0.3)
    resumed.load_state_dict(half.state_dict())
    again = sprand.SparseAdamW(resumed, lr=0.02)
    again.load_state_dict(optimizer.state_dict())
    for seed in (2, 3):
        backward(resumed, seed=seed)
        again.step()
        again.zero_grad()
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_clipping_equals_clip_grad_norm():
    ours, theirs = pair(modules_to_save=["third"])
    a = sprand.SparseAdamW(ours, lr=0.02, max_grad_norm=0.05)
    b = torch.optim.AdamW(sprand.parameters(theirs), lr=0.02)
    for seed in range(5):
        backward(ours, scale=3.0, seed=seed)
        backward(theirs, scale=3.0, seed=seed)
        norm = torch.nn.utils.clip_grad_norm_(sprand.parameters(theirs), 0.05)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, norm)
        a.zero_grad()
        b.zero_grad()
    sprand.write(theirs)
    assert_equal_models(ours, theirs)


def test_loss_scaling_and_skipped_steps():
    """A GradScaler's scale is taken out, and a step whose gradients overflowed changes nothing."""
    ours, theirs = (sprand.apply(built(MLP), density=0.3, modules_to_save=["third"]) for _ in range(2))
    a = sprand.SparseAdamW(ours, lr=0.02)
    b = torch.optim.AdamW(sprand.parameters(theirs), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for seed in range(6):
        overflow = seed == 3
        x, y = points_and_labels(seed)
        scaler.scale(F.cross_entropy(ours(x), y)).backward()
        if overflow:
            ours.first.sprand_delta.grad[0] = float("inf")
        kept = [p.clone() for p in ours.parameters()]
        scaler.step(a)
        scaler.update()
        if overflow:
            assert all(torch.equal(p, k) for p, k in zip(ours.parameters(), kept, strict=True))
        else:
            backward(theirs, seed=seed)
            b.step()
        a.zero_grad()
        b.zero_grad()
    sprand.write(theirs)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert a.state[ours.first.sprand_delta]["step"] == 5


def test_a_step_without_gradients_has_a_norm_of_zero():
    model = sprand.apply(built(MLP), density=0.1)
    optimizer = sprand.SparseAdamW(model, lr=0.02, max_grad_norm=0.05)
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    assert optimizer.grad_norm > 0
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm == 0


def test_refusals():
    model = built(MLP)
    with pytest.raises(ValueError, match="none of these parameters is a sprand delta"):
        sprand.SparseAdamW(model.parameters())
    with pytest.raises(ValueError, match="none of these parameters is a sprand delta"):
        sprand.SparseAdamW(model)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="trains nothing"):
        sprand.SparseAdamW(model)
    sprand.apply(model)
    with pytest.raises(ValueError, match="no amsgrad"):
        sprand.SparseAdamW(model, amsgrad=True)
    with pytest.raises(ValueError, match="max_grad_norm"):
        sprand.SparseAdamW(model, max_grad_norm=0.0)
    with pytest.raises(ValueError, match="learning rate"):
        sprand.SparseAdamW(model, lr=-1.0)


def test_an_evaluation_sees_values_written_behind_autograds_back():
    """Averages of weights are swapped in through `.data`; an evaluation and the training after it use what is there."""
    model = sprand.apply(built(MLP), density=0.3)
    optimizer = sprand.SparseAdamW(model, lr=0.1)
    x, _ = points_and_labels()
    backward(model)
    optimizer.step()
    after = model(x).detach()
    kept = [p.data.clone() for p in sprand.parameters(model)]
    for p in sprand.parameters(model):
        p.data.zero_()
    with torch.no_grad():
        assert torch.equal(model(x), built(MLP)(x))
    for p, k in zip(sprand.parameters(model), kept, strict=True):
        p.data.copy_(k)
    assert torch.equal(model(x), after)


def test_other_optimizers_in_the_same_program():
    """The weights are right also when torch's fused AdamW takes over, which moves no version."""
    model = sprand.apply(built(MLP), density=0.3)
    sparse, fused = sprand.SparseAdamW(model, lr=0.1), torch.optim.AdamW(sprand.parameters(model), lr=0.1, fused=True)
    x, _ = points_and_labels()
    for optimizer in (sparse, fused, sparse, fused):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        for module in (model.first, model.second):
            expected = (module.sprand_base + module.sprand_delta).detach()
            model(x)
            assert torch.equal(module.weight.flatten()[module.sprand_indices.long()], expected)


def test_dense_parameters_alone_take_torchs_path():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    sprand.apply(model, density=1.0, target_modules=["0"], modules_to_save=["1"])
    optimizer = sprand.SparseAdamW(model, lr=0.1)
    model[1](torch.randn(3, 4)).sum().backward()
    before = model[1].weight.clone()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
    assert model[0].sprand_delta.abs().sum() == 0
