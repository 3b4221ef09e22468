"""What `sprand finetune` measures before and after: right numbers, texts and their scores, and words for what cannot be."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sprand.cli import main
from sprand.cli.finetune import generation, measures
from sprand.cli.finetune.settings import Settings
from tiny_models import WORDS, save_llama, save_rows

transformers = pytest.importorskip("transformers")
pytest.importorskip("sklearn")


def finetune(*arguments: object) -> int:
    return main.run(["finetune", *map(str, arguments)])


def first_result(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())["results"][0]


def write_prompts(path: Path, count: int = 60) -> Path:
    """Of each prompt the answer is the word after its last one."""
    source = random.Random(0)
    rows = []
    for _ in range(count):
        words = [source.randrange(8) for _ in range(source.randint(1, 4))]
        answer = f"w30 w{words[-1] + 1}"
        rows.append({"prompt": " ".join(f"w{word}" for word in words), "completion": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("rows") / "prompts.jsonl")


def test_the_confusion_matrix_counts_what_predict_says(bert, rows, tmp_path, capsys):
    held_out = save_rows(tmp_path / "eval.tsv", 31)
    asked = ("--epochs", 6, "--density", 0.2, "--lr", 0.01, "--class-weights", "balanced")
    assert finetune("--model", bert, "--train", rows, "--eval", held_out, "--out", tmp_path / "out", *asked) == 0
    printed = capsys.readouterr().out
    after, shown = first_result(tmp_path / "out")["after"], first_result(tmp_path / "out")["shown"]["after"]
    assert main.run(["predict", str(tmp_path / "out"), str(held_out), "--json"]) == 0
    said = [row["label"] for row in json.loads(capsys.readouterr().out)["rows"]]
    with held_out.open() as file:
        truth = [row["label"] for row in csv.DictReader(file, delimiter="\t")]
    counts = [[sum(pair == (a, b) for pair in zip(truth, said, strict=True)) for b in "ab"] for a in "ab"]
    assert shown["classes"] == ["a", "b"] and shown["confusion"] == counts
    (tp, fn), (fp, tn) = counts
    assert after["accuracy"] == pytest.approx((tp + tn) / 31)
    assert after["macro_f1"] == pytest.approx((2 * tp / (2 * tp + fn + fp) + 2 * tn / (2 * tn + fn + fp)) / 2)
    spread = math.sqrt((tp + fn) * (fp + tn) * (tp + fp) * (fn + tn))
    assert after["mcc"] == pytest.approx((tp * tn - fn * fp) / spread if spread else 0)
    with rows.open() as file:
        trained = [row["label"] for row in csv.DictReader(file, delimiter="\t")]
    assert after["majority_accuracy"] == pytest.approx(truth.count(max("ab", key=trained.count)) / 31)
    assert "majority_accuracy" in printed and "the class they are given" in printed


def test_several_classes_and_numbers():
    logits, labels = torch.tensor([[3.0, -1.0], [2.0, 1.0], [-2.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    numbers = measures.many_class_numbers(logits, labels)
    assert numbers["accuracy"] == pytest.approx(1 / 3) and numbers["macro_f1"] == pytest.approx((1 + 0) / 2)
    assert numbers["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 2))
    values, labels = torch.tensor([1.0, 2.0, 4.0, 3.0]).double(), torch.tensor([1.0, 3.0, 9.0, 7.0]).double()
    numbers = measures.number_numbers(values, labels, baseline=torch.tensor([4.0, 6.0]).double())
    assert numbers["rmse"] == pytest.approx(math.sqrt((0 + 1 + 25 + 16) / 4)) and numbers["spearman"] == pytest.approx(1)
    assert numbers["pearson"] == pytest.approx(float(torch.corrcoef(torch.stack([values, labels]))[0, 1]))
    assert numbers["mean_rmse"] == pytest.approx(math.sqrt((16 + 4 + 16 + 4) / 4))
    assert measures.number_numbers(torch.ones(4), labels, labels)["pearson"] == 0


def test_rows_of_several_classes_and_of_numbers_are_known_by_their_labels(bert):
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    settings = Settings(model="m", train=None, out=Path("out"))
    for label, problem in (([1.0, 0.0], measures.MANY_CLASSES), (0.25, measures.NUMBER), (1, measures.ONE_CLASS)):
        classes = 1 if problem == measures.NUMBER else 2
        model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=classes)
        rows = [{"input_ids": tokenizer(" ".join(WORDS[:size]))["input_ids"], "labels": label} for size in (5, 1, 3)]
        numbers = measures.measure(
            model, SimpleNamespace(eval=rows, train=[], tokenizer=tokenizer), settings, torch.device("cpu")
        )
        assert measures.problem_of(rows[0]) == problem and all(map(math.isfinite, numbers.numbers.values()))
        expected = []
        for row in rows:
            tokens = torch.tensor([row["input_ids"]])
            labels = torch.tensor([label]) if problem == measures.ONE_CLASS else torch.tensor([[label]]).view(1, -1)
            model.config.problem_type = problem
            expected.append(float(model.eval()(input_ids=tokens, labels=labels).loss.detach()))
        assert numbers.numbers["loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_balanced_weights_let_each_class_count_alike():
    labels = [0] * 6 + [1] * 3 + [2]
    weights = measures.class_weights(labels, 3)
    totals = [weights[label] * labels.count(label) for label in range(3)]
    assert totals == pytest.approx([10 / 3] * 3)


def test_long_rows_share_no_forward_whose_logits_would_not_fit(llama):
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(llama), transformers.LlamaForCausalLM.from_pretrained(llama)
    tokens = [tokenizer(" ".join(WORDS[:40]))["input_ids"][: 20 + number % 20] for number in range(150)]
    task = SimpleNamespace(eval=[{"input_ids": row, "labels": row} for row in tokens], train=[], tokenizer=tokenizer)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments, named: sizes.append(named["input_ids"].numel()), with_kwargs=True)
    losses = []
    for batch_size in (1, 1000):
        settings = Settings(model="m", train=None, out=Path("out"), batch_size=batch_size)
        losses.append(measures.measure(model, task, settings, torch.device("cpu")).numbers["loss"])
    assert len(sizes) == 150 + 2 and max(sizes) <= 4096 < sum(map(len, tokens))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_texts_are_those_of_each_prompt_alone(llama):
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(llama), transformers.LlamaForCausalLM.from_pretrained(llama)
    prompts = [tokenizer(" ".join(WORDS[start : start + size]))["input_ids"] for start, size in ((0, 1), (3, 9), (20, 4))]
    said = generation.generate(model.eval(), tokenizer, prompts, 6, batch_size=2)
    for prompt, text in zip(prompts, said, strict=True):
        tokens = prompt
        for _ in range(6):
            tokens = [*tokens, int(model(torch.tensor([tokens])).logits[0, -1].argmax())]
            if tokens[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)


def test_a_learned_answer_scores(llama, prompts, tmp_path, capsys):
    text = tmp_path / "old.txt"
    text.write_text(" ".join(WORDS * 5))
    out = tmp_path / "out"
    asked = ("--density", 0.5, "--lr", 0.02, "--epochs", 60, "--score", "exact", "--answer-pattern", r"w30 (w\d+)")
    more = ("--forgetting", text, "--max-new-tokens", 4)
    assert finetune("--model", llama, "--train", prompts, "--eval", prompts, "--out", out, *asked, *more) == 0
    row = first_result(out)
    assert row["before"]["exact_match"] < 0.2 < 0.9 < row["after"]["exact_match"]
    samples = row["shown"]["after"]["samples"]
    right = [sample["generated"].split()[:2] == sample["reference"].split()[:2] for sample in samples]
    assert sum(right) / len(right) == pytest.approx(row["after"]["exact_match"]) and len(samples) == 60
    assert [sample["prompt"] for sample in samples] == [sample["prompt"] for sample in row["shown"]["before"]["samples"]]
    assert row["after"]["token_accuracy"] > 0.9 > 0.2 > row["before"]["token_accuracy"]
    assert row["after"]["perplexity"] == pytest.approx(math.exp(row["after"]["loss"]))
    base, tokenizer = transformers.LlamaForCausalLM.from_pretrained(llama), transformers.AutoTokenizer.from_pretrained(llama)
    tokens = tokenizer(text.read_text(), return_tensors="pt")["input_ids"]
    blocks = tokens.split(base.config.max_position_embeddings, dim=1)
    losses = [float(base(block, labels=block).loss.detach()) * (block.shape[1] - 1) for block in blocks]
    expected = math.exp(sum(losses) / sum(block.shape[1] - 1 for block in blocks))
    assert row["before"]["forgetting_perplexity"] == pytest.approx(expected, rel=1e-4)
    printed = capsys.readouterr().out
    assert "held-out sample 3" in printed and "forgetting_perplexity" in printed


def test_a_function_of_the_users_scores(llama, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own_score.py").write_text(
        "def length(prompt, generated, reference):\n    return len(prompt.split()) + reference.count('w30')\n"
    )
    asked = ("--max-steps", 1, "--score", "own_score:length", "--score-rows", 5, "--max-new-tokens", 2)
    assert finetune("--model", llama, "--train", prompts, "--eval", prompts, "--out", "out", *asked) == 0
    row = first_result(tmp_path / "out")
    samples = row["shown"]["before"]["samples"]
    assert len(samples) == 5 and row["before"]["score"] == row["after"]["score"]
    assert row["before"]["score"] == pytest.approx(sum(len(sample["prompt"].split()) + 1 for sample in samples) / 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--score", "exact", "--answer-pattern", "(w"), "--answer-pattern: expected a regular expression, got '(w'"),
        (("--answer-pattern", "w"), "--answer-pattern belongs to --score exact"),
        (("--score", "no_such_module:f"), "--score: expected exact, or a function as package.module:function"),
        (("--score", "math:pi"), "--score: expected a function, got 'math:pi'"),
        (("--score-rows", 0), "--score-rows: expected a positive number"),
        (("--forgetting", "nowhere.txt"), "--forgetting: no file nowhere.txt"),
        (("--class-weights", "balanced"), "--class-weights is not for causal-lm"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(llama, prompts, tmp_path, capsys, options, said):
    out = tmp_path / "out"
    assert finetune("--model", llama, "--train", prompts, "--out", out, *options) == 2
    assert said in capsys.readouterr().err and not out.exists()


def test_a_score_is_not_for_classes_nor_for_rows_without_prompts(bert, llama, rows, tmp_path, capsys):
    assert finetune("--model", bert, "--train", rows, "--out", tmp_path / "out", "--score", "exact") == 2
    assert "--score is not for classification" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text((" ".join(WORDS) + "\n") * 20)
    assert finetune("--model", llama, "--train", tmp_path / "text.txt", "--out", tmp_path / "out", "--score", "exact") == 2
    assert "the rows have no prompts to generate from" in capsys.readouterr().err


def test_a_score_that_fails_names_itself(llama, prompts, tmp_path, capsys):
    asked = ("--score", "math:sqrt", "--max-steps", 1, "--max-new-tokens", 2)
    assert finetune("--model", llama, "--train", prompts, "--out", tmp_path / "out", *asked) == 2
    assert "--score math:sqrt: expected a number for each row, got TypeError" in capsys.readouterr().err
