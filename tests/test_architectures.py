"""A sample of benchmarks/architectures: every kind of model of transformers trains, saves, loads and merges as it must."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SAMPLE = (
    "llama", "bert", "t5", "gpt2", "mamba", "wavlm", "vit", "qwen3_moe", "clip", "whisper", "deberta", "gemma3",
)  # fmt: skip


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("transformers", reason="the models come from transformers")
    pytest.importorskip("peft", reason="the second door")
    monkeypatch.syspath_prepend(BENCHMARKS)
    from architectures import sweep

    monkeypatch.setattr(sys, "path", sys.path[:])
    return sweep


@pytest.mark.parametrize("name", SAMPLE)
def test_gradients_are_dense_autograds_and_adapters_come_back_to_the_bit(sweep: ModuleType, tmp_path: Path, name: str) -> None:
    door = ("apply", "peft")[SAMPLE.index(name) % 2]
    rows = sweep.examine(name, tmp_path, [door])
    assert [row["targets"] for row in rows] == ["all-linear", "every parameter"]
    for row in rows:
        assert (row["gradients"], row["load"], row["files"]) == ("equal", "equal", "equal"), row["words"]


@pytest.mark.slow
def test_the_sweep_writes_a_row_for_each_door_and_choice(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "architectures" / "sweep.py", "--only", "gpt2", "timm_wrapper", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    with (tmp_path / "architectures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["architecture"] for row in rows] == ["gpt2"] * 4 + ["timm_wrapper"]
    assert {row["outcome"] for row in rows[:4]} == {"equal"}
    assert rows[4]["outcome"] == "not built"
    assert "timm" in rows[4]["words"]
