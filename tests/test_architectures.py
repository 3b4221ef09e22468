"""A sample of benchmarks/architectures: every kind of model of transformers trains, saves, loads and merges as it must."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

from forks import one_thread, started, status_of

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


def test_the_sweep_writes_a_row_for_each_door_and_choice(tmp_path: Path) -> None:
    """As a program, in a copy of this process, which has imported what takes long."""
    pytest.importorskip("peft", reason="the second door")
    program = BENCHMARKS / "architectures" / "sweep.py"

    def run() -> None:
        sys.argv = [str(program), "--only", "gpt2", "timm_wrapper", "--out", str(tmp_path)]
        sys.path.insert(0, str(program.parent))
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(str(program), run_name="__main__")

    with one_thread():
        assert status_of(started(run)) == 0
    with (tmp_path / "architectures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["architecture"] for row in rows] == ["gpt2"] * 4 + ["timm_wrapper"]
    assert {row["outcome"] for row in rows[:4]} == {"equal"}
    assert rows[4]["outcome"] == "not built"
    assert "timm" in rows[4]["words"]
