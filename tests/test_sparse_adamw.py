"""The fused AdamW step against `torch.optim.AdamW` on dense tensors, dispatched and in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from problems import (
    LARGE,
    ORDINARY,
    PROBLEMS,
    AdamWProblem,
    adamw_on_dense,
    assert_within,
    bits,
    dtypes,
    guarded,
    guards_hold,
    implementations,
    index_dtypes,
    make_adamw,
    problem_table,
    skip_unsupported,
    sum_dtype,
    tolerance,
)

DEFAULTS = {"lr": 2**-7, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": False}


def run_adamw(ops, made: AdamWProblem, lr_tensor=None, grad_coef=None, found_inf=None, **options) -> None:
    """All steps of `made` in place."""
    chosen = DEFAULTS | options
    for grads in made.grads:
        for step in made.steps:
            step += 1
        ops.sparse_adamw_(
            made.weights, made.indices, made.bases, made.deltas, grads, made.exp_avgs, made.exp_avg_sqs,
            made.steps, made.scales, chosen["lr"], *chosen["betas"], chosen["eps"], chosen["weight_decay"], chosen["maximize"],
            lr_tensor, grad_coef, found_inf,
        )  # fmt: skip


def check_adamw(made: AdamWProblem, dtype: torch.dtype, coef: float = 1.0, **options) -> None:
    """Deltas and moments of all targets against dense AdamW, weights against the patch of those deltas."""
    oracle = adamw_on_dense(made, torch.float64, coef, **DEFAULTS | options)
    plain = adamw_on_dense(made, torch.float32, coef, **DEFAULTS | options)
    for name, values in (("delta", made.deltas), ("exp_avg", made.exp_avgs), ("exp_avg_sq", made.exp_avg_sqs)):
        exact, ordinary = (torch.cat([target[name] for target in targets]) for targets in (oracle, plain))
        limit = tolerance(ordinary, exact, sum_dtype(dtype), roundings=len(made.grads))
        assert_within(torch.cat(values), exact, limit)
    for weight, index, base, delta, scale in zip(made.weights, made.indices, made.bases, made.deltas, made.scales, strict=True):
        assert torch.equal(weight.flatten()[index.long()], (base.to(delta.dtype) + delta * scale).to(dtype))


@problem_table
@dtypes
@index_dtypes
@implementations
def test_sparse_adamw_is_dense_adamw_at_the_chosen_entries(ops, problem, dtype, index_dtype, device):
    skip_unsupported(device, dtype)
    made = make_adamw([problem, ORDINARY], dtype, index_dtype, device)
    run_adamw(ops, made)
    check_adamw(made, dtype)


@implementations
@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"weight_decay": 0.0},
        {"weight_decay": 0.5, "lr": 0.25},
        {"betas": (0.0, 0.5)},
        {"betas": (0.95, 0.99999)},
        {"eps": 1e-3},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_sparse_adamw_takes_the_options_of_adamw(ops, options, device):
    made = make_adamw(PROBLEMS, torch.float32, torch.int32, device, steps=5)
    run_adamw(ops, made, **options)
    check_adamw(made, torch.float32, **options)


@implementations
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])
@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_adamw_reads_lr_and_coefficient_from_tensors(ops, shape, maximize, device):
    made = make_adamw([ORDINARY, LARGE], torch.bfloat16, torch.int64, device)
    made.steps = [step.reshape(shape) for step in made.steps]
    lr, coef = (torch.full(shape, value, device=device) for value in (2**-5, 0.25))
    run_adamw(ops, made, lr=123.0, lr_tensor=lr, grad_coef=coef, maximize=maximize)
    check_adamw(made, torch.bfloat16, coef=0.25, lr=2**-5, maximize=maximize)


@implementations
def test_sparse_adamw_with_found_inf_changes_nothing(ops, device):
    made = make_adamw([ORDINARY, LARGE], torch.bfloat16, torch.int32, device, steps=2)
    untouched = make_adamw([ORDINARY, LARGE], torch.bfloat16, torch.int32, device, steps=2)
    made.grads[0][0][3], made.grads[1][1][5] = float("inf"), float("nan")
    run_adamw(ops, made, found_inf=torch.ones((), device=device))
    for name in ("weights", "deltas", "exp_avgs", "exp_avg_sqs"):
        for value, before in zip(getattr(made, name), getattr(untouched, name), strict=True):
            assert torch.equal(bits(value), bits(before))


@implementations
def test_sparse_adamw_with_found_inf_zero_is_a_step(ops, device):
    made = make_adamw([ORDINARY], torch.float32, torch.int32, device)
    run_adamw(ops, made, found_inf=torch.zeros(1, device=device))
    check_adamw(made, torch.float32)


@implementations
def test_sparse_adamw_of_no_target_is_nothing(ops):
    assert ops.sparse_adamw_([], [], [], [], [], [], [], [], [], 0.1, 0.9, 0.999, 1e-8, 0.0, False) is None


@dtypes
@implementations
def test_sparse_adamw_stays_inside_its_memory(ops, dtype, device):
    skip_unsupported(device, dtype)
    made = make_adamw([ORDINARY, LARGE], dtype, torch.int32, device)
    memories = []
    for values in (made.weights, made.deltas, made.exp_avgs, made.exp_avg_sqs):
        for target, value in enumerate(values):
            values[target], memory = guarded(value)
            memories.append(memory)
    run_adamw(ops, made)
    check_adamw(made, dtype)
    assert all(map(guards_hold, memories))


@dtypes
@implementations
def test_adamw_repeats_bit_for_bit_on_any_number_of_threads(ops, dtype, threads, device):
    skip_unsupported(device, dtype)
    results = []
    for count in (1, 2, 2):
        threads(count)
        made = make_adamw([ORDINARY, LARGE], dtype, torch.int32, device)
        run_adamw(ops, made)
        results.append([bits(value) for value in (*made.weights, *made.deltas, *made.exp_avgs, *made.exp_avg_sqs)])
    for repeat in results[1:]:
        assert all(map(torch.equal, results[0], repeat))
