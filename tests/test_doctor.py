"""`sprand doctor`: the report names every operator and its kernel, and a wrong or failing kernel is caught and told."""

from __future__ import annotations

import json

import pytest
import torch

from sprand import native
from sprand.cli import main
from sprand.kernels import ops, reference, selftest


def test_every_operator_is_tested_on_the_cpu_and_right():
    results = selftest.run(["cpu"])
    assert {result["op"] for result in results} == set(ops.SCHEMAS)
    assert [result for result in results if not result["ok"]] == []


def test_every_operator_is_right_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert [result for result in selftest.run(["cuda"]) if not result["ok"]] == []


def test_report(capsys):
    assert main.run(["doctor"]) == 0
    table, pasted, end = capsys.readouterr().out.split("```")
    for op in ops.SCHEMAS:
        row = next(line.split() for line in table.splitlines() if line.split()[:1] == [op])
        assert row[1:3] == [native.kernel_of(op, "cpu"), native.kernel_of(op, "cuda")]
        assert " ".join(row[3:5]).startswith("cpu ok")
    for line in (
        f"torch: {torch.__version__}",
        f"threads: {torch.get_num_threads()}",
        "instruction set:",
        "system:",
        "self test:",
    ):
        assert line in pasted
    assert not end.strip()


def test_json(capsys):
    assert main.run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["kernels"]["sddmm"]["cpu"] == native.kernel_of("sddmm", "cpu")
    assert report["versions"]["torch"] == torch.__version__


def test_a_wrong_kernel_fails_the_self_test(capsys, monkeypatch):
    right = reference.gather
    monkeypatch.setattr(reference, "gather", lambda weight, indices: right(weight, indices) + 1)
    assert main.run(["doctor"]) == 1
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.split()[:1] == ["gather"])
    assert "cpu FAILED" in row
    assert "gather float32 on cpu" in printed
    assert "result: off by 1" in printed


def test_a_kernel_that_raises_is_a_failed_test_and_no_crash(monkeypatch):
    def broken(**arguments):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(reference, "scatter_add_all_", broken)
    failed = [result for result in selftest.run(["cpu"]) if not result["ok"]]
    assert {result["op"] for result in failed} == {"scatter_add_all_"}
    assert failed[0]["problem"] == "RuntimeError: no such instruction"


def test_missing_kernels_come_with_advice(capsys, monkeypatch):
    monkeypatch.setitem(native.problems, "_C", "not built")
    assert main.run(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "The CPU kernels are missing (sprand._C: not built)" in printed
    assert "pip install --no-build-isolation" in printed


def test_missing_kernels_are_told_once(monkeypatch):
    monkeypatch.setitem(native.problems, "_C", "not built")
    native.warn_if_slow.cache_clear()
    with pytest.warns(UserWarning, match="without its compiled kernels") as warned:
        native.warn_if_slow()
        native.warn_if_slow()
    assert len(warned) == 1
    native.warn_if_slow.cache_clear()


def test_present_kernels_are_silent(recwarn):
    if not native.has_extension():
        pytest.skip("sprand._C is not built")
    native.warn_if_slow.cache_clear()
    native.warn_if_slow()
    assert not recwarn.list


def test_kernel_of_an_unknown_operator():
    with pytest.raises(ValueError, match="expected one of sddmm, .*, got 'matmul'"):
        native.kernel_of("matmul", "cpu")


def test_a_terminal_gets_a_drawn_table(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    main.run(["doctor"])
    assert "─" in capsys.readouterr().out
