"""The choice between the row kernel and dense chunks: the table of costs, its file, and what follows from it."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import sprand
from emulation import FENCES, fenced_results
from sprand.kernels import cost_model, ops, tuning
from sprand.kernels.cost_model import EVERY, Costs
from sprand.kernels.schedule import Limits, make_schedule
from sprand.kernels.tuning import fit, read_or_measure
from sprand.layers.entries import Schedules
from sprand.selection import pattern

COSTS = Costs(
    rows_start=3e-5, rows_cycle=7e-10, rows_load=1e-11, dense_start=5e-6,
    dense_product=2.4e-15, dense_entry=2e-12,
)  # fmt: skip


def scheduled(density: float, features: int = 1024):
    nnz = round(features * features * density) // 8 * 8
    indices = pattern.draw("random", "weight", (features, features), nnz, seed=0)
    return indices, make_schedule(indices, features, features, torch.bfloat16)


@pytest.mark.parametrize("density", [0.0005, 0.01, 0.03, 0.2])
def test_the_fastest_way_is_chosen_for_every_number_of_tokens(density):
    _, schedule = scheduled(density)
    for costs in (COSTS, replace(COSTS, rows_start=5e-5), replace(COSTS, rows_cycle=6e-9)):
        chosen, kernel = costs.choose(schedule, 1024, 1024), costs.rows(schedule)
        dense = costs.dense(schedule, 1024, 1024)
        first, last = chosen.dense_tokens
        for tokens in (1, 16, 100, 512, 2048, 10_000, 1_000_000):
            assert (first <= tokens < last) == (dense.at(tokens) < kernel.at(tokens))


@pytest.mark.parametrize("blocks", [1, 4, 132])
def test_splits_are_counted_as_the_launches_do(blocks, emulated):
    """A launch shows its splits by the size of its workspace, which there is none of for one."""
    rows, cols, nnz = 64, 96, 480
    indices = pattern.draw("random", "weight", (rows, cols), nnz, seed=0)
    schedule = make_schedule(indices, rows, cols, torch.bfloat16, Limits(processors=blocks))
    count = cost_model.row_splits
    for tokens in (1, 63, 64, 127, 128, 600, 1025):
        grad_output, input = (torch.ones(tokens, size, dtype=torch.bfloat16) for size in (rows, cols))
        with fenced_results() as memories:
            emulated.sddmm(grad_output, input, indices, schedule.table, schedule.launch)
        _, workspace = (memory.numel() - FENCES for memory in memories)
        assert max(workspace // nnz, 1) == count(schedule, tokens)
    assert (count(schedule, tokens) > 1) == (blocks > 1)


def test_fit_finds_the_costs_that_made_the_times():
    wanted = [3e-6, 2e-7, 5e-6]
    cases = [[1.0, 10.0 * i, float(i % 3)] for i in range(1, 9)]
    measured = [(case, sum(c * w for c, w in zip(case, wanted, strict=True))) for case in cases]
    assert fit(measured) == pytest.approx(wanted, rel=1e-6)


def test_fit_gives_no_negative_cost():
    assert min(fit([([1.0, float(i)], 5.0 - i) for i in (1, 2, 3, 4)])) >= 0


def test_measuring_finds_the_costs_of_a_card(monkeypatch):
    called = []
    monkeypatch.setattr(ops, "sddmm", lambda a, b, i, s: called.append(("rows", s, a.shape, b.shape[1])))
    monkeypatch.setattr(ops, "sddmm_dense", lambda a, b, i, s: called.append(("dense", s, a.shape, b.shape[1])))

    def seconds(call) -> float:
        call()
        way, schedule, (tokens, out_features), in_features = called[-1]
        if way == "dense":
            return COSTS.dense(schedule, out_features, in_features).at(tokens)
        cycles, loads = cost_model.row_work(schedule, tokens)
        return COSTS.rows_start + COSTS.rows_cycle * cycles + COSTS.rows_load * loads

    found = tuning.measure(torch.device("cpu"), torch.bfloat16, seconds)
    for name, wanted in dataclasses.asdict(COSTS).items():
        assert getattr(found, name) == pytest.approx(wanted, rel=0.05), name


def test_the_table_is_measured_once_and_kept(tmp_path):
    path, calls = tmp_path / "deep" / "table.json", []

    def measure() -> Costs:
        calls.append(1)
        time.sleep(0.2)
        return COSTS

    found = []
    threads = [threading.Thread(target=lambda: found.append(read_or_measure(path, measure))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [COSTS] * 4 and len(calls) == 1
    assert Costs(**json.loads(path.read_text())) == COSTS
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def test_a_damaged_table_is_measured_anew(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"rows_start": ')
    assert read_or_measure(path, lambda: COSTS) == COSTS
    assert Costs(**json.loads(path.read_text())) == COSTS


def test_a_lock_whose_owner_died_does_not_stop_anyone(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "WAIT_SECONDS", 0.1)
    path = tmp_path / "table.json"
    path.with_suffix(".lock").touch()
    assert read_or_measure(path, lambda: COSTS) == COSTS
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_a_folder_that_cannot_be_written_to_costs_a_measurement(tmp_path):
    (tmp_path / "file").touch()
    assert read_or_measure(tmp_path / "file" / "table.json", lambda: COSTS) == COSTS


@pytest.mark.parametrize("way, dense", [("dense", (0, EVERY)), ("sparse", (0, 0)), ("auto", (7, 9))])
def test_the_environment_overrides_the_table(way, dense, monkeypatch):
    monkeypatch.setattr(Limits, "of", lambda device: Limits(99 << 10, 20))
    monkeypatch.setattr(Costs, "choose", lambda costs, made, *_: replace(made, dense_tokens=(7, 9)))
    monkeypatch.setattr(tuning, "costs", lambda device, dtype: COSTS)
    monkeypatch.setenv("SPRAND_SDDMM", way)
    indices, _ = scheduled(0.01)
    schedule = tuning.schedule_for(indices, 1024, 1024, torch.bfloat16)
    assert schedule.dense_tokens == dense
    assert schedule.blocks == 20 and schedule.variant.shared_bytes <= 99 << 10
    monkeypatch.setenv("SPRAND_SDDMM", "fast")
    with pytest.raises(ValueError, match="SPRAND_SDDMM: expected auto, sparse or dense, got 'fast'"):
        tuning.schedule_for(indices, 1024, 1024, torch.bfloat16)


@pytest.mark.parametrize("dense_tokens", [(0, 0), (0, EVERY)])
def test_a_layer_with_a_schedule_trains_as_without_eager_and_compiled(dense_tokens, monkeypatch):
    """What a layer does on a GPU, on the CPU, whose kernel ignores the schedule."""
    torch.manual_seed(0)
    grads = []
    for scheduled_too in (False, True):
        model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).requires_grad_(False)
        model.load_state_dict(grads[0][1]) if grads else None
        state = {name: value.clone() for name, value in model.state_dict().items()}
        sprand.apply(model, density=0.1, target_modules=["0", "2"])
        if scheduled_too:
            for layer in (model[0], model[2]):
                made = make_schedule(layer.sprand_indices, *layer.weight.shape, torch.bfloat16)
                scheduled_so = dataclasses.replace(made, dense_tokens=dense_tokens)
                monkeypatch.setattr(sprand.layers.entries, "schedule_for", lambda *_, made=scheduled_so: made)
                schedules = layer._sprand_targets["weight"].schedules = Schedules(layer.sprand_indices, *layer.weight.shape)
                assert schedules.of(layer.weight.dtype) is scheduled_so
        input = torch.linspace(-1, 1, 5 * 32).view(5, 32)
        for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            model.zero_grad()
            run(input).square().sum().backward()
            grads.append((torch.cat([layer.sprand_delta.grad.clone() for layer in (model[0], model[2])]), state))
    for grad, _ in grads[1:]:
        torch.testing.assert_close(grad, grads[0][0])


@pytest.mark.parametrize("door", ["apply", "peft"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, None])
def test_a_layer_samples_by_the_schedule_for_the_dtype_of_its_operands(door, cast, monkeypatch):
    """Under autocast that is not the weight's. Each is made once."""
    asked, used = [], []
    sddmm = ops.sddmm
    monkeypatch.setattr(sprand.layers.entries, "is_sampled_on_gpu", lambda weight: True)
    monkeypatch.setattr(sprand.layers.entries, "schedule_for", lambda *args: asked.append(args[-1]) or str(args[-1]))
    monkeypatch.setattr(ops, "sddmm", lambda left, right, indices, schedule: used.append(schedule) or sddmm(left, right, indices))
    model = nn.Sequential(nn.Linear(32, 48))
    if door == "apply":
        sprand.apply(model, density=0.1)
    else:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = peft.get_peft_model(model, pytest.importorskip("sprand.peft").SprandConfig(density=0.1, target_modules=["0"]))
    for _ in range(3):
        with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
            loss = model(torch.randn(5, 32)).float().sum()
        loss.backward()
    assert used == [str(cast or torch.float32)] * 3
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_makes_the_schedules_of_its_own_card(copied, monkeypatch):
    monkeypatch.setattr(sprand.layers.entries, "is_sampled_on_gpu", lambda weight: True)
    monkeypatch.setattr(sprand.layers.entries, "schedule_for", lambda *args: f"old card, {args[-1]}")
    model = sprand.apply(nn.Sequential(nn.Linear(32, 48)), density=0.1)
    schedules = model[0]._sprand_targets["weight"].schedules
    assert schedules.of(torch.float32) == "old card, torch.float32"
    monkeypatch.setattr(sprand.layers.entries, "schedule_for", lambda *args: f"new card, {args[-1]}")
    assert copied(model)[0]._sprand_targets["weight"].schedules.of(torch.float32) == "new card, torch.float32"
    assert schedules.of(torch.float32) == "old card, torch.float32"
