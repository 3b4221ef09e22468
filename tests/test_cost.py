"""The cost suite, the regression check, long runs and the results page do what they say, and see what they look for."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmarks by name."""
    pytest.importorskip("transformers", reason="the model to train comes from transformers")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_growth_and_life_are_measured_once(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="the peers are PEFT's")
    suite, growth, report = (benchmark(name) for name in ("cost.suite", "cost.growth", "report"))
    asked = ["--quick", "--parts", "growth", "life", "--out", str(tmp_path)]
    monkeypatch.setattr(growth, "NAMES", ("frozen", "sprand"))
    values = {"density": (0.01, 0.1), "tokens": (32,), "length": (16,), "width": (64,), "layers": (1,)}
    monkeypatch.setattr(growth, "QUICK_VALUES", values)
    assert suite.main(asked) == 0
    rows = report.read_csv(tmp_path / "cost_growth.csv")
    assert {row["axis"] for row in rows} == set(growth.TITLES) and not any(row["note"] for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["method"] == "frozen")
    assert all(row["forward"] + row["backward"] + row["optimizer"] < 2 * row["seconds"] for row in rows)
    lives = {row["method"]: row for row in report.read_csv(tmp_path / "cost_life.csv")}
    assert set(lives) == {"sprand@0.01", "lora", "shira", "supertuning", "peft-sparta", "full"}
    present = [row for row in lives.values() if not row["note"]]
    assert all(row["set_up"] > 0 and row["bytes"] >= 4 * row["trained"] for row in present)
    for name in ("cost_growth", "cost_life"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    kept = (tmp_path / "cost_growth.csv").read_text()
    units = [row["unit"] for row in rows]
    cut = "\n".join(line for line in kept.splitlines() if not line.startswith(units[-1])) + "\n"
    (tmp_path / "cost_growth.csv").write_text(cut)  # stopped before the last point
    suite.main(["--quick", "--parts", "growth", "--out", str(tmp_path)])
    again = (tmp_path / "cost_growth.csv").read_text()
    assert again.startswith(cut) and [row["unit"] for row in report.read_csv(tmp_path / "cost_growth.csv")] == units


def test_rows_of_another_machine_are_not_joined(benchmark, tmp_path: Path) -> None:
    suite = benchmark("cost.suite")
    there = suite.Kept(tmp_path / "rows.csv", ("unit", "machine"), "an older CPU")
    there.add([{"unit": "width 64"}])
    assert there.rows() == [{"unit": "width 64", "machine": "an older CPU"}]
    with pytest.raises(SystemExit, match="expected rows of this one, got rows of an older CPU; measure anew with --again"):
        suite.Kept(tmp_path / "rows.csv", ("unit", "machine"), "this one").rows()


def test_every_part_of_the_suite_is_run(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = benchmark("cost.suite")
    asked: list[tuple[str, list[str]]] = []
    for module in ("bench_train_step", "bench_switch", "cost.instructions"):
        monkeypatch.setattr(benchmark(module), "main", lambda argv, module=module: asked.append((module, argv)) or 0)
    importlib.reload(suite)
    suite.main(["--quick", "--parts", "instructions", "memory", "switch", "step", "--out", str(tmp_path)])
    assert [module for module, _ in asked] == ["cost.instructions", "bench_train_step", "bench_switch", "bench_train_step"]
    assert all(argv[-3:] == ["--quick", "--out", str(tmp_path)] for _, argv in asked)


def test_instructions_are_counted_or_the_reason_is_told(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instructions = benchmark("cost.instructions")
    monkeypatch.setattr(instructions, "missing", lambda: "no valgrind here")
    assert instructions.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "no valgrind here" in (tmp_path / "instructions.csv").read_text()
    options = instructions.parse(["--quick"])
    counts = {
        "nothing": [100, 90], "gather|sprand|0.01|41|0|1": [1090, 1091], "gather|index_select|0.01|41|0|1": [2090, 2090],
        f"{instructions.LAYER}|frozen||0|32|1": [10090, 10090], f"{instructions.LAYER}|sprand 1 %|0.01|41|32|1": [11090, 11090],
    }  # fmt: skip
    rows = {(row["what"], row["contestant"]): row for row in instructions.rows_of(counts, options)}
    ours, plain = rows["gather", "sprand"], rows["gather", "index_select"]
    assert (ours["instructions"], ours["again"], ours["per_entry"], plain["ratio"]) == (1000, 1001, 1000 / 41, 2.0)
    assert rows[instructions.LAYER, "sprand 1 %"]["ratio"] == 1.1


@pytest.mark.slow
def test_callgrind_counts_the_same_twice(benchmark, tmp_path: Path) -> None:
    instructions, report = benchmark("cost.instructions"), benchmark("report")
    if "SPRAND_CALLGRIND" not in os.environ:
        pytest.skip("Python and PyTorch take a minute to start under valgrind: SPRAND_CALLGRIND=1 runs it")
    if instructions.missing():
        pytest.skip(f"nothing can be counted: {instructions.missing()}")
    assert instructions.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = report.read_csv(tmp_path / "instructions.csv")
    assert {row["contestant"] for row in rows} == {"sprand", "index_select", "frozen", "sprand 1 %", "full AdamW"}
    assert all(row["instructions"] > 100 and abs(row["again"] / row["instructions"] - 1) < 0.05 for row in rows)


@pytest.fixture
def regression(benchmark) -> ModuleType:
    return benchmark("cost.regression")


def test_a_step_has_not_become_longer(regression: ModuleType) -> None:
    assert regression.main([]) == 0


@pytest.mark.parametrize(
    ("measured", "code", "turns"), [([1.2], 0, 1), ([1.3, 1.2], 0, 2), ([1.3, 1.3, 1.2], 0, 3), ([1.3, 1.3, 1.3], 1, 3)]
)
def test_a_longer_step_fails_when_three_measurements_say_so(regression, tmp_path, monkeypatch, capsys, measured, code, turns):
    file = tmp_path / "regression.json"
    file.write_text(json.dumps({regression.instruction_sets(): {"ratio": 1.1}}))
    left = list(measured)
    monkeypatch.setattr(regression, "measure", lambda: (left.pop(0), 2.0))
    assert regression.main(["--file", str(file)]) == code
    said = capsys.readouterr()
    assert said.out.count("at most 1.265") == turns and ("FAILED" in said.err) == bool(code)


@pytest.mark.parametrize(("full", "code"), [(1.6, 0), (1.4, 1)])
def test_on_another_machine_full_adamw_is_the_bound(regression, tmp_path, monkeypatch, capsys, full, code):
    monkeypatch.setattr(regression, "measure", lambda: (1.5, full))
    assert regression.main(["--file", str(tmp_path / "none.json")]) == code
    assert "no ratio is committed for torch" in capsys.readouterr().out


def test_a_long_run_holds(benchmark, tmp_path: Path) -> None:
    long_run, report = benchmark("long_run"), benchmark("report")
    assert long_run.main(["--steps", "100", "--out", str(tmp_path)]) == 0
    checks = report.read_csv(tmp_path / "long_run_checks.csv")
    assert {row["passed"] for row in checks} == {"yes"} and len(checks) == 20
    assert (tmp_path / "long_run.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_run_catches_drift_leaks_and_nan(benchmark) -> None:
    import copy

    import sprand

    long_run = benchmark("long_run")
    torch.manual_seed(0)
    base = long_run.Model()
    model = copy.deepcopy(base)
    long_run.sparse(model, 0.05, 1e-3)
    run = long_run.Run("sparse", "sprand", None)
    run.check_weights(model, base)
    assert [row["passed"] for row in run.checks] == ["yes", "NO", "yes"]  # nothing was trained
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    sprand.apply(model, density=0.05)
    free = torch.ones(layer.weight.numel(), dtype=torch.bool)
    free[layer.sprand_indices.long()] = False
    layer.weight.data.view(-1)[free.nonzero()[0]] += 1e-6
    run.checks.clear()
    run.check_weights(model, base)
    assert run.checks[0]["passed"] == run.checks[2]["passed"] == "NO"
    run.checks.clear()
    run.losses = torch.tensor([1.0, float("nan")])
    run.check_numbers(base, torch.optim.AdamW(base.parameters()))
    run.rows = [{"tensors": 5, "tensor_mib": 1.0, "rss_mib": float(mib)} for mib in range(10)]
    run.check_memory()
    assert [row["passed"] for row in run.checks] == ["NO", "yes", "NO"]
    run.rows[-1]["tensors"] = 6
    run.check_memory()
    assert run.checks[-2]["passed"] == "NO"


def test_the_page_is_what_the_results_make(benchmark) -> None:
    assert benchmark("page").main(["--check"]) == 0, "run python benchmarks/page.py"


def test_the_page_says_first_where_a_peer_wins(benchmark, tmp_path: Path) -> None:
    page = benchmark("page")
    results = tmp_path / "results"
    results.mkdir()
    for kind in ("csv", "md"):
        shutil.copy(page.RESULTS / f"train_step.{kind}", results)
    before = page.render(results, page.PAGE)
    assert "a peer's training step is shorter: **none of 33**" in before
    text = (results / "train_step.csv").read_text()
    ratio = next(line.split(",")[11] for line in text.splitlines() if line.startswith("768,2,fp32,2048,lora,"))
    (results / "train_step.csv").write_text(text.replace(f",{ratio},", ",1.001,"))
    after = page.render(results, page.PAGE)
    assert after.index("**1 of 33**") < after.index("## A training step")
    assert "PEFT LoRA 1.001 of the frozen step, sprand 1 %" in after
    (results / "train_step.md").unlink()
    with pytest.raises(FileNotFoundError, match="expected the command and machine of train_step.csv"):
        page.render(results, page.PAGE)
