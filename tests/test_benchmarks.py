"""The benchmarks run, and write the columns and methods that their tables and figures are made from."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ranks

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("transformers", reason="the model to train comes from transformers")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_train_step

    return bench_train_step


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_train_step_times_every_method(train_step: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_step.main(["--quick", "--parts", "time", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = {row["method"]: row for row in read(tmp_path / "train_step.csv")}
    assert set(rows) == {"frozen", "sprand@0.01", "sprand-columns@0.01", "lora", "shira", "peft-sparta", "supertuning", "full"}
    for row in rows.values():
        assert row["label"] in printed
        if row["note"]:
            assert row["note"].startswith("not installed: ")
            assert row["note"] in printed
            continue
        assert float(row["seconds_p20"]) <= float(row["seconds"]) <= float(row["seconds_p80"])
        assert float(row["ratio"]) > 0
        assert (int(row["trained"]) > 0) == (row["method"] != "frozen")
        assert (float(row["loss_last"]) < float(row["loss_first"])) == (row["method"] != "frozen")
    assert float(rows["frozen"]["ratio"]) == 1
    assert not rows["sprand@0.01"]["note"] and not rows["sprand-columns@0.01"]["note"]


def test_a_peer_that_is_not_installed_is_a_line_with_the_reason(
    train_step: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft_sparta", None)
    train_step.main(["--quick", "--parts", "time", "--methods", "frozen", "peft-sparta", "--out", str(tmp_path)])
    frozen, peer = read(tmp_path / "train_step.csv")
    assert frozen["seconds"]
    assert peer["note"] == "not installed: peft_sparta"
    assert peer["seconds"] == ""
    assert "not installed: peft_sparta" in capsys.readouterr().out


def test_memory_table_sets_every_method_against_the_frozen_model(
    train_step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    import peak_memory

    monkeypatch.setattr(train_step, "measure", lambda case, repeats: peak_memory.run(case))
    train_step.main(
        ["--quick", "--parts", "memory", "--methods", "frozen", "sprand", "sprand-columns", "full", "--out", str(tmp_path)]
    )
    rows = read(tmp_path / "memory.csv")
    assert [row["method"] for row in rows] == ["frozen", "sprand@0.01", "sprand-columns@0.01", "full"]
    _, ours, columns, full = rows
    for row in rows[1:]:
        assert not row["note"]
        assert int(row["trained"]) > 0
        for column in ("above_mib", "saved_above_mib", "state_mib", "bytes_per_weight", "own_bytes_per_weight"):
            assert row[column], column
    assert 0 < float(columns["saved_above_mib"]) < float(ours["saved_above_mib"]) / 4
    assert float(ours["state_mib"]) * 2**20 / int(ours["trained"]) < 26
    assert float(full["state_mib"]) * 2**20 / int(full["trained"]) == pytest.approx(12, rel=0.01)


def test_memory_is_measured_in_a_fresh_process(train_step: ModuleType) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    import peak_memory

    found = peak_memory.measure(peak_memory.Case("frozen", 64, 1, "fp32", 64, checkpointing=False, steps=1), repeats=1)
    assert "reason" not in found, found
    assert 0 < found["peak"] < 2**30
    assert found["saved"] > 0
    assert found["state"] == found["trained"] == 0


def test_shira_is_measured_before_and_after_acceleration(
    train_step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="SHiRA and Super-Tuning are PEFT's")
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    import bench_shira
    import peak_memory

    monkeypatch.setattr(train_step, "measure", lambda case, repeats: peak_memory.run(case))
    assert bench_shira.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "shira.csv")
    timed = {row["method"]: row for row in rows if row["seconds"]}
    weighed = {row["method"]: row for row in rows if row["peak_mib"]}
    assert set(timed) == set(weighed) == {
        "frozen", "shira", "shira-accelerated", "supertuning", "supertuning-accelerated", "sprand-peft",
    }  # fmt: skip
    for name in ("shira", "supertuning"):
        stock, ours = timed[name], timed[f"{name}-accelerated"]
        assert stock["trained"] == ours["trained"]
        assert float(ours["loss_last"]) == pytest.approx(float(stock["loss_last"]), rel=1e-4)
        assert float(weighed[f"{name}-accelerated"]["saved_above_mib"]) < float(weighed[name]["saved_above_mib"])


def test_ops_times_every_op_against_plain_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sprand.kernels import ops

    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_ops

    assert bench_ops.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "ops.csv")
    measured = set(ops.SCHEMAS)
    assert {row["op"] for row in rows} == measured
    for op in measured:
        here = [row for row in rows if row["op"] == op]
        ours = [row for row in here if row["layout"]]
        assert len({row["layout"] for row in ours}) == 1
        assert len(here) > len(ours) > 0
        assert all(float(row["seconds"]) > 0 for row in here)
        assert all(float(row["speedup"]) > 0 for row in ours)
        assert all(bool(row["gflops"]) == op.startswith("sddmm") for row in here)


def test_selection_measures_every_way_of_choosing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_selection

    monkeypatch.setattr(bench_selection, "measure", bench_selection.run)
    assert bench_selection.main(["--quick", "--out", str(tmp_path), "--density", "0.1"]) == 0
    rows = {row["method"]: row for row in read(tmp_path / "selection.csv")}
    assert next(iter(rows)) == "one pass" and {"grasp", "snip, bounded", "naive snip", "naive fisher"} < set(rows)
    assert not any(row["note"] for row in rows.values())
    assert {row["chosen"] for name, row in rows.items() if name != "one pass"} == {"6963"}
    assert all(float(row["ratio"]) > 0 for row in rows.values())


def test_merging_is_timed_against_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_merge

    assert bench_merge.main(["--quick", "--out", str(tmp_path / "out"), "--folder", str(tmp_path)]) == 0
    rows = {row["method"]: row for row in read(tmp_path / "out" / "merge.csv")}
    assert list(rows)[:2] == ["copy", "sprand merge"] and {"verify", "revert", "load, index_put_, save"} < set(rows)
    assert float(rows["copy"]["ratio"]) == 1 and all(float(row["seconds"]) > 0 for row in rows.values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wire_counts_what_each_method_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the model to train comes from transformers")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_wire

    monkeypatch.setattr(bench_wire.mp, "spawn", ranks.start)
    assert bench_wire.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = {(row["strategy"], row["method"]): row for row in read(tmp_path / "wire.csv")}
    assert set(rows) == {(strategy, method) for strategy in ("ddp", "fsdp2") for method in ("sprand@0.01", "lora", "full")}
    ours, full = rows["ddp", "sprand@0.01"], rows["ddp", "full"]
    assert int(ours["gradient_bytes"]) == int(ours["all_reduce_bytes"]) == 4 * int(ours["trained"])
    assert int(ours["broadcast_bytes"]) == int(full["broadcast_bytes"])
    sharded = rows["fsdp2", "sprand@0.01"]
    assert int(sharded["gradient_bytes"]) < int(rows["fsdp2", "full"]["gradient_bytes"]) / 20
    assert int(sharded["all_gather_bytes"]) < 1.05 * int(rows["fsdp2", "full"]["all_gather_bytes"])


def test_merging_is_measured_for_every_kind_and_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="LoRA is PEFT's")
    from tiny_models import save_bert, save_rows

    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_combine
    from quality.training import TaskPlan

    save_bert(tmp_path / "shared" / "models" / "tiny")
    (tmp_path / "shared" / "data").mkdir()
    for name in ("train", "dev", "test"):
        save_rows(tmp_path / "shared" / "data" / f"{name}.tsv", 40)
    options = {"batch_size": 8, "max_length": 16}
    plans = {name: TaskPlan("tiny", "train.tsv", "dev.tsv", "test.tsv", options) for name in ("one", "two", "three")}
    monkeypatch.setattr(bench_combine, "TASKS", plans)
    places = ["--shared", str(tmp_path / "shared"), "--kept", str(tmp_path / "kept"), "--out", str(tmp_path / "out")]
    asked = ["--quick", "--seeds", "0", "--budget", "0.05", "--kinds", "disjoint", "lora", *places]
    assert bench_combine.main(asked) == 0
    file = tmp_path / "out" / "combine.csv"
    rows = read(file)
    assert [row["kind"] for row in rows] == ["disjoint"] * 3 * 5 + ["lora"] * 3 * 7
    assert all((row["shared"] == "0") == (row["kind"] == "disjoint") for row in rows)
    assert "| sprand random, disjoint | sum |" in (tmp_path / "out" / "combine.md").read_text()
    assert (tmp_path / "out" / "combine.png").read_bytes().startswith(b"\x89PNG")
    before = file.read_text()
    file.write_text("\n".join(before.splitlines()[:-1]) + "\n")  # stopped in the midst of the last combination
    assert bench_combine.main(asked) == 0
    assert sorted(file.read_text().splitlines()) == sorted(before.splitlines())


def test_switching_is_timed_beside_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the model comes from transformers")
    pytest.importorskip("peft", reason="the peers are PEFT's")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_switch

    assert bench_switch.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = {row["method"]: row for row in read(tmp_path / "switch.csv")}
    assert list(rows) == ["pool", "pool same positions", "switch", "lora", "lora-unmerged", "shira"]
    assert all(float(row["seconds"]) > 0 and float(row["forward_ratio"]) > 0 and not row["note"] for row in rows.values())
    assert float(rows["pool"]["ratio"]) == 1
    for ours in ("pool", "pool same positions", "switch"):
        assert float(rows[ours]["changed"]) == 0
    assert float(rows["lora"]["changed"]) > 0  # bfloat16, added and subtracted
    assert rows["pool"]["trained"] == rows["switch"]["trained"] and rows["lora"]["trained"] == rows["shira"]["trained"]


def test_a_pool_under_load_answers_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason="the server of the example")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_serving

    assert bench_serving.main(["--quick", "--out", str(tmp_path)]) == 0
    http, disk = read(tmp_path / "serving.csv")
    assert http["wrong"] == disk["wrong"] == "0" and http["adapters"] == "3" and disk["adapters"] == "30"
    assert int(disk["reads"]) > 0 and float(disk["host_bytes"]) <= 1.1 * float(disk["host_limit"])
    assert all(0 < float(row["p50_seconds"]) <= float(row["p99_seconds"]) for row in (http, disk))
