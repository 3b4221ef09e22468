"""gpu_check.sh with programs that only say what they were asked, and the GPU benchmarks on the CPU."""

from __future__ import annotations

import csv
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def check(tmp_path: Path):
    """Runs gpu_check.sh with a Python that records its arguments, and fails on those that hold a given word."""
    bash = ["/bin/bash", "/usr/bin/bash"]
    if not any(map(os.path.exists, bash)):
        pytest.skip("gpu_check.sh needs bash")
    calls = tmp_path / "calls"

    def run(*arguments: str, fail: str = "nothing", sanitizer: bool = False) -> tuple[int, str, list[str]]:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        python = programs / "python"
        python.write_text(f'#!/bin/bash\necho "$*" >>"{calls}"\nif [[ "$*" == *"{fail}"* ]]; then exit 3; fi\n')
        python.chmod(0o755)
        if sanitizer:
            tool = programs / "compute-sanitizer"
            tool.write_text(f'#!/bin/bash\necho "compute-sanitizer $*" >>"{calls}"\n')
            tool.chmod(0o755)
        timeout = programs / "timeout"  # after `-k seconds`: the limit, and what is run
        timeout.write_text(f'#!/bin/bash\necho "limit $3" >>"{calls}"\nshift 3\nexec "$@"\n')
        timeout.chmod(0o755)
        calls.write_text("")
        environment = {**os.environ, "PYTHON": str(python), "PATH": f"{programs}:/usr/bin:/bin"}
        script = BENCHMARKS / "gpu_check.sh"
        done = subprocess.run(["bash", str(script), *arguments], env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return run


WORDS = {
    "tests": "-m pytest -q -p no:cacheprovider -m gpu", "sanitizers": "compute-sanitizer", "ops": "gpu/ops.py",
    "step": "gpu/step.py", "selection": "bench_selection.py", "switching": "bench_switch.py",
}  # fmt: skip


def steps_of(calls: list[str]) -> list[str]:
    """The steps that ran, in order."""
    found = []
    for call in calls:
        found += [name for name, word in WORDS.items() if call.startswith(word) or f"benchmarks/{word}" in call]
    return list(dict.fromkeys(found))


def test_every_step_runs_in_order(check):
    code, said, calls = check("results-here", sanitizer=True)
    assert code == 0
    assert "All passed" in said
    steps = [next(i for i, call in enumerate(calls) if word in call) for word in (
        "torch.cuda.is_available", "build_ext --inplace", "native", "pytest -q -p no:cacheprovider -m gpu", "--tool memcheck",
        "--tool racecheck", "gpu/ops.py", "gpu/step.py", "bench_selection.py", "bench_switch.py",
    )]  # fmt: skip
    assert steps == sorted(steps)
    assert all("--out results-here" in call for call in calls if "benchmarks/gpu/" in call)


def test_all_limits_together_leave_a_ten_minute_session_room_to_start_and_end(check):
    _, _, calls = check(sanitizer=True)
    limits = [int(call.removeprefix("limit ")) for call in calls if call.startswith("limit ")]
    assert len(limits) == 9
    assert sum(limits) <= 9.5 * 60


@pytest.mark.parametrize("only", ["tests", "sanitizers", "ops,step", "switching,selection", ",".join(WORDS)])
def test_steps_can_be_chosen(check, only):
    code, said, calls = check("--no-build", "--only", only, "results-here", sanitizer=True)
    assert code == 0 and "All passed" in said
    assert steps_of(calls) == [name for name in WORDS if name in only.split(",")]
    assert all("--out results-here" in call for call in calls if "benchmarks/gpu/" in call)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "ops,speed"], "got speed"),
        (["--only", "--no-build"], "got --no-build"),
        (["--only"], "expected steps after --only"),
    ],
)
def test_unknown_steps_are_refused_with_the_usage(check, arguments, message):
    code, said, calls = check(*arguments)
    assert code == 2 and not calls
    assert message in said and "steps: tests sanitizers ops step selection switching" in said


@pytest.mark.parametrize("name, table", [("bench_selection", "selection"), ("bench_switch", "switch")])
def test_what_was_measured_is_written_when_the_time_is_up(name, table, tmp_path, monkeypatch):
    module, measured = gpu_benchmark(name, monkeypatch), []

    def measure(*arguments):
        if measured:
            os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does
            time.sleep(5)
        measured.append(1)
        if name == "bench_selection":
            return {"seconds": 1.0, "peak_mib": 2.0, "targets": 3, "chosen": 0, "largest_mib": 1.0}
        _, width, dtype, _ = arguments
        return [{"device": "cpu", "width": width, "layers": 1, "dtype": dtype, "method": "pool", "label": "pool", "seconds": 1.0}]

    monkeypatch.setattr(module, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        module.main(["--out", str(tmp_path), *(["--widths", "8", "16"] if name == "bench_switch" else ["--quick"])])
    (row,) = read(tmp_path / f"{table}.csv")
    assert row["seconds"] == "1"
    assert (tmp_path / f"{table}.md").exists()


def test_built_modules_can_be_used(check):
    assert not any("build_ext" in call for call in check("--no-build")[2])


def test_a_failing_step_does_not_stop_the_others_and_is_told_at_the_end(check):
    code, said, calls = check(fail="pytest")
    assert code == 1
    assert "Tests (exit status 3)" in said.split("FAILED after")[1]
    assert any("gpu/step.py" in call for call in calls)


def test_a_missing_sanitizer_is_said(check):
    if os.path.exists("/usr/local/cuda/bin/compute-sanitizer") or os.path.exists("/usr/bin/compute-sanitizer"):
        pytest.skip("there is a compute-sanitizer here")
    code, said, _ = check()
    assert code == 0
    assert "memcheck: left out, no compute-sanitizer here" in said


def test_without_a_gpu_nothing_is_checked(check):
    code, said, calls = check(fail="torch.cuda.is_available")
    assert code == 1
    assert "no CUDA device is visible" in said
    assert len(calls) == 1


def test_an_unknown_option_is_refused_with_the_usage(check):
    code, said, calls = check("--fast")
    assert code == 2 and "unknown option --fast" in said
    assert "gpu_check.sh [--no-build]" in said
    assert not calls


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def gpu_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "gpu")
    return __import__(name)


def test_ops_are_timed_against_cublas_and_peers(tmp_path, monkeypatch):
    ops = gpu_benchmark("ops", monkeypatch)
    assert ops.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "ops.csv")
    assert {row["op"] for row in rows} == {"cuBLAS", "sddmm", "gather", "patch_", "sparse_adamw_"}
    measured = [row for row in rows if not row["note"]]
    assert all(float(row["us"]) > 0 for row in measured)
    assert {row["dtype"] for row in measured if row["op"] == "sddmm"} == {"bf16", "fp16", "fp32"}
    assert all(row["note"].startswith("does not run here") for row in rows if row["note"])
    assert all(float(row["error"]) < 1e-5 for row in measured if row["error"])
    assert "benchmarks/gpu/ops.py --device cpu --quick" in (tmp_path / "ops.md").read_text()


def test_an_operator_that_fails_is_a_row_and_an_exit_status(tmp_path, monkeypatch):
    from sprand.kernels import ops as operators

    ops = gpu_benchmark("ops", monkeypatch)

    def broken(*arguments):
        raise RuntimeError("gather: launch failed")

    monkeypatch.setattr(operators, "gather", broken)
    assert ops.main(["--device", "cpu", "--quick", "--parts", "cublas", "entries", "--out", str(tmp_path)]) == 1
    rows = read(tmp_path / "ops.csv")
    assert any("gather: launch failed" in row["note"] for row in rows)
    assert any(row["contestant"] == "dW" and row["us"] for row in rows)


def test_what_a_budget_leaves_out_is_said(tmp_path, monkeypatch):
    ops = gpu_benchmark("ops", monkeypatch)
    assert ops.main(["--device", "cpu", "--quick", "--budget", "0", "--parts", "cublas", "--out", str(tmp_path)]) == 0
    assert [row["note"] for row in read(tmp_path / "ops.csv")] == ["the budget of 0 s was spent: the rest was not measured"]


def test_the_step_is_set_against_the_frozen_model(tmp_path, monkeypatch):
    step = gpu_benchmark("step", monkeypatch)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert step.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = {row["method"]: row for row in read(tmp_path / "step.csv")}
    assert set(rows) == {"frozen", "sprand", "lora", "lora-bf16", "shira", "full"}
    assert all(rows[method]["note"] == "not installed: peft" for method in ("lora", "lora-bf16", "shira"))
    for method in ("sprand", "full"):
        assert float(rows[method]["ratio"]) > 0
        assert float(rows[method]["loss_last"]) < float(rows[method]["loss_first"])
    assert int(rows["full"]["trained"]) > int(rows["sprand"]["trained"]) > 0


def test_a_short_budget_of_the_step_goes_to_what_is_compared(tmp_path, monkeypatch):
    step = gpu_benchmark("step", monkeypatch)
    options = step.parse(["--device", "cpu"])
    chosen = sorted(step.methods(options), key=step.urgency)
    first = [(method.key, method.layout, method.density) for method in chosen]
    assert set(first[:4]) == {("sprand", layout, density) for layout in ("unstructured", "columns") for density in (0.001, 0.01)}
    assert [key for key, *_ in first[4:8]] == ["lora", "lora-bf16", "shira", "full"]
    assert step.main(["--device", "cpu", "--quick", "--methods", "sprand", "full", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "step.csv")
    assert [row["method"] for row in rows] == ["frozen", *2 * ["sprand"], "full"]
    assert [row["layout"] for row in rows[1:3]] == ["unstructured", "columns"]


def test_the_choice_between_kernels_is_replayed_from_measured_times(tmp_path, monkeypatch):
    """Times that a card would have whose costs are known: a fit to a few of them chooses the fastest everywhere."""
    from sprand.kernels import cost_model, tuning

    choice, ops = gpu_benchmark("choice", monkeypatch), gpu_benchmark("ops", monkeypatch)
    monkeypatch.setattr(tuning, "MEASURED_SHAPES", ((64, 256), (256, 256)))
    monkeypatch.setattr(tuning, "MEASURED_TOKENS", (512, 8192))
    monkeypatch.setattr(tuning, "MEASURED_DENSITIES", (0.02, 0.1))
    costs = cost_model.Costs(3e-7, 1e-12, 1e-14, 1e-7, 2e-15, 1e-12)
    rows = []
    for shape, density, tokens in itertools.product([(64, 256), (256, 256)], (0.005, 0.02, 0.1), (512, 2048, 8192)):
        schedule, _ = tuning.drawn(shape, density, torch.bfloat16, torch.device("cpu"))
        cycles, loads = cost_model.row_work(schedule, tokens)
        times = {"sprand, row kernel": costs.rows_start + costs.rows_cycle * cycles + costs.rows_load * loads}
        times["sprand, dense chunks"] = costs.dense(schedule, *shape).at(tokens)
        times["sprand"] = 2 * max(times.values())
        facts = {"op": "sddmm", "out": shape[0], "in": shape[1], "tokens": tokens, "dtype": "bf16", "density": density}
        rows += [{**facts, "layout": "unstructured", "contestant": name, "us": 1e6 * taken} for name, taken in times.items()]
    ops.write_csv(tmp_path / "ops.csv", rows, ops.COLUMNS)
    assert choice.main([str(tmp_path)]) == 0
    found = read(tmp_path / "choice.csv")
    assert len(found) == 18 and {row["chosen"] for row in found} >= {"rows", "dense"}
    assert sum(row["chosen"] == row["fastest"] for row in found) >= 17
    assert all(float(row["measured_lost"]) > 0 for row in found)


def test_a_folder_without_times_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        gpu_benchmark("choice", monkeypatch).main([str(tmp_path)])
    assert "expected the ops.csv of benchmarks/gpu/ops.py" in capsys.readouterr().err


@pytest.mark.slow
def test_the_step_with_peft(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    step = gpu_benchmark("step", monkeypatch)
    assert step.main(["--device", "cpu", "--quick", "--methods", "lora", "lora-bf16", "shira", "--out", str(tmp_path)]) == 0
    rows = [row for row in read(tmp_path / "step.csv") if row["method"] != "frozen"]
    assert [row["note"] for row in rows] == ["", "", ""]
    assert rows[0]["trained"] == rows[1]["trained"]
    assert all(float(row["loss_last"]) < float(row["loss_first"]) for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["ops", "step"])
def test_without_a_gpu_the_benchmarks_say_so(name, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        gpu_benchmark(name, monkeypatch).main([])
    assert "no CUDA device is visible to torch" in capsys.readouterr().err


def test_predictions_are_found_for_the_shapes_that_are_measured(monkeypatch):
    timing = gpu_benchmark("timing", monkeypatch)
    of_ops, of_steps = timing.predictions("op"), timing.predictions("step")
    assert of_ops["sddmm", "unstructured", 0.01, 4096, 4096, 8192] == 178
    assert of_ops["dW + gather", None, None, 14336, 4096, 8192] == 1290
    assert of_ops["sparse_adamw_", None, 0.01, None, None, 70_000_000] == 2100
    assert of_steps["sprand", "unstructured", 0.01, None, None, 8192] == 1.19
    assert of_steps["lora", None, None, None, None, 8192] == 1.23
