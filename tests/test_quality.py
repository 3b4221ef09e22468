"""The quality suite: grids that go on where they stopped, rates past an edge, paired intervals, and the fit of rates."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sprand
from tiny_models import WORDS, save_llama

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def suite(quality: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script with one tiny task in both grids, and its runs in this process."""
    import concurrent.futures

    (tmp_path / "shared" / "models").mkdir(parents=True)
    (tmp_path / "shared" / "data").mkdir()
    save_llama(tmp_path / "shared" / "models" / "tiny")
    for name in ("train", "dev", "test"):
        text = "\n".join(" ".join(WORDS[i % 7 : i % 7 + 12]) for i in range(30))
        (tmp_path / "shared" / "data" / f"{name}.txt").write_text(text)
    from quality import grids, suite

    options = {"max_steps": 2, "batch_size": 4, "max_length": 16}
    plan = grids.TaskPlan("tiny", "train.txt", "dev.txt", "test.txt", options, old="dev.txt")
    monkeypatch.setitem(grids.FIRST_LOOK.tasks, "shakespeare", dataclasses.replace(plan, old=None))
    monkeypatch.setitem(grids.SUITE.tasks, "shakespeare", plan)
    threads = concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda workers, context: threads(1))
    return suite


def asked(tmp_path: Path, *more: str) -> list[str]:
    places = ["--shared", str(tmp_path / "shared"), "--masks", str(tmp_path / "masks"), "--out", str(tmp_path / "out")]
    return ["--tasks", "shakespeare", "--budgets", "0.01", *places, *more]


def test_variants_train_as_many_weights_and_their_masks_move(suite: ModuleType, tmp_path: Path) -> None:
    from quality import variants

    moved: dict[str, int] = {}
    step = sprand.DynamicMask.step

    def counted(mask: sprand.DynamicMask) -> bool:
        changed = step(mask)
        moved[mask.mode] = moved.get(mask.mode, 0) + changed
        return changed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sprand.DynamicMask, "step", counted)
        suite.main(asked(tmp_path, "--methods", "random", *variants.VARIANTS, "--rates", "0.1", "--seeds", "0"))
    lines = [line for line in read(tmp_path / "out" / "suite.csv") if line["method"] != "untrained"]
    assert {line["method"] for line in lines} == {"random", *variants.VARIANTS}
    assert len({line["trained"] for line in lines if line["method"] != "diagonal blocks"}) == 1
    assert moved["regrow"] > 0 and moved["recompute"] > 0


def test_the_page_of_claims_says_better_only_where_all_seeds_and_the_interval_do(quality: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the page has a figure")
    from quality import claims, results
    from quality.training import Run

    generator = torch.Generator().manual_seed(0)
    losses = {"random": 3.0, "lora": 2.5, "run2": 3.0, "regrow": 3.001, "run8": 4.0}
    for seed in range(3):
        rows = torch.rand(200, generator=generator, dtype=torch.float64)
        for method, mean in losses.items():
            if method == "run8" and seed == 2:  # a cell that has not run to its end
                continue
            own = rows + mean + (0.05 * torch.rand(200, generator=generator, dtype=torch.float64) if method != "random" else 0)
            outcome = {"metric": "perplexity", "dev": mean, "test": float(own.mean().exp()), "trained": 100}
            results.append(tmp_path / "suite.csv", Run("shakespeare", method, 0.01, 0.1, seed), outcome, own)
    page = tmp_path / "claims.md"
    assert claims.main(["--results", str(tmp_path / "suite.csv"), "--page", str(page)]) == 0
    text = page.read_text()
    assert "- `random` against `lora`: better in 0, worse in 1, not told apart in 0 of 1." in text
    assert "- `run2` against `random`" in text and "`gradient` against" not in text
    assert "run8 |" not in text
    assert (tmp_path / "claims.png").stat().st_size > 0
    with pytest.raises(SystemExit):
        claims.main(["--results", str(tmp_path / "none.csv"), "--page", str(page)])


def test_the_first_look_fills_a_table_and_goes_on_where_it_stopped(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["first_look", *asked(tmp_path, "--methods", "random", "snip", "lora", "--quick")]
    assert suite.main(arguments) == 0
    rows = read(tmp_path / "out" / "first_look.csv")
    assert len(rows) == 1 + 3 * 3
    assert {row["method"] for row in rows} == {"untrained", "random", "snip", "lora"}
    assert all(float(row["dev"]) > 0 and float(row["test"]) > 0 for row in rows)
    table = (tmp_path / "out" / "first_look.md").read_text()
    assert "snip = taylor_fo" in table and "rank 2, value" in table
    assert (tmp_path / "out" / "first_look.png").read_bytes().startswith(b"\x89PNG")
    last = rows[-1]
    kept = (tmp_path / "out" / "first_look.csv").read_text().splitlines()[:-1]
    (tmp_path / "out" / "first_look.csv").write_text("\n".join(kept) + "\n")
    done = []
    perform = suite.perform
    monkeypatch.setattr(suite, "perform", lambda run, *rest: done.append(run) or perform(run, *rest))
    assert suite.main(arguments) == 0
    assert [(run.method, str(run.seed)) for run in done] == [(last["method"], last["seed"])]
    again = read(tmp_path / "out" / "first_look.csv")[-1]
    timed = ("seconds", "calibration_seconds")
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in last.items() if k not in timed}


def test_every_method_of_the_suite_trains_its_budget(suite: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("peft_sparta", reason="peft-sparta is one of the methods")
    from quality import grids

    assert suite.main(["suite", *asked(tmp_path, "--rates", "0.01", "--seeds", "0")]) == 0
    rows = read(tmp_path / "out" / "suite.csv")
    assert {row["method"] for row in rows} == {"untrained", *grids.NARROW}
    trained = {row["method"]: int(row["trained"]) for row in rows if row["budget"]}
    budget = trained["random"]
    assert all(trained[name] == budget for name in ("uniform", "gradient", "snip"))
    assert trained["lora"] == trained["shira"]
    assert 0.5 * budget < trained["peft-sparta"] < 2 * budget
    before = float(next(row["old"] for row in rows if row["method"] == "untrained"))
    assert all(float(row["old"]) != before for row in rows if row["method"] == "full")
    table = (tmp_path / "out" / "suite.md").read_text()
    assert "vs LoRA" in table and "old text" in table and "paired bootstrap" in " ".join(table.split())
    for name in ("suite.png", "suite_forgetting.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_another_model_and_files_get_rates_around_the_default(suite: ModuleType, tmp_path: Path, capsys) -> None:
    data = tmp_path / "shared" / "data"
    files = [part for name in ("train", "dev", "test") for part in (f"--{name}", str(data / f"{name}.txt"))]
    arguments = ["own", "--model", str(tmp_path / "shared" / "models" / "tiny"), *files, "--old", str(data / "dev.txt")]
    arguments += ["--methods", "random", "--budgets", "0.05", "--seeds", "0", "--name", "mine"]
    arguments += ["--out", str(tmp_path / "out"), "--masks", str(tmp_path / "masks"), "--shared", str(tmp_path / "nowhere")]
    assert suite.main([*arguments, "--set", "max_steps=2", "batch_size=4", "max_length=16"]) == 0
    rows = read(tmp_path / "out" / "mine.csv")
    assert {row["steps"] for row in rows if row["lr"]} == {"2"} and all(row["old"] for row in rows)
    tried = sorted(float(row["lr"]) for row in rows if row["method"] == "random")
    model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "shared" / "models" / "tiny")
    middle = sprand.suggest_lr(sprand.apply(model, density=0.05))
    assert tried[0] < middle < tried[-1] and len(tried) in (4, 5)
    with pytest.raises(SystemExit):
        suite.main(["suite", *asked(tmp_path), "--set", "max_steps=2"])
    assert "give a --name" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "shira"])
def test_a_count_that_a_peer_cannot_reach_is_said(quality: None, tmp_path: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM

    from quality import peers
    from sprand.cli.finetune.settings import Settings

    model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "tiny"))
    made = peers.attach(method, model, 0.01, 0.0003, Settings("tiny", tmp_path, tmp_path))
    assert made.lr == 0.01 and made.optimizer.param_groups[0]["weight_decay"] == 0
    assert made.count == 32 + 16 and made.note.startswith("rank 1, value, last 1 layers; nearest it can do to 6")


def test_one_rate_past_the_edge_is_tried_then_the_other_seeds(suite: ModuleType, tmp_path: Path) -> None:
    from quality.grids import SUITE
    from quality.training import Run

    options = suite.parse(asked(tmp_path))
    cell = ("shakespeare", "random", 0.01)
    rates = SUITE.rates(*cell)
    assert [run.lr for run in suite.missing(cell, SUITE, options, {})] == rates
    done = {Run(*cell, lr, 0): {"metric": "perplexity", "dev": 10 - place} for place, lr in enumerate(rates)}
    assert suite.missing(cell, SUITE, options, done) == [Run(*cell, 1.0, 0)]  # half a decade above 0.32
    done[Run(*cell, 1.0, 0)] = {"metric": "perplexity", "dev": 50.0}
    assert suite.missing(cell, SUITE, options, done) == [Run(*cell, rates[-1], 1), Run(*cell, rates[-1], 2)]
    done[Run(*cell, rates[1], 0)] = {"metric": "perplexity", "dev": 1.0}
    assert suite.missing(cell, SUITE, options, done) == [Run(*cell, rates[1], 1), Run(*cell, rates[1], 2)]


def test_a_run_that_diverges_is_a_line_and_loses(suite: ModuleType, tmp_path: Path) -> None:
    assert suite.main(["suite", *asked(tmp_path, "--methods", "random", "--rates", "1e30", "--seeds", "0")]) == 0
    (row,) = [row for row in read(tmp_path / "out" / "suite.csv") if row["method"] == "random"]
    assert row["note"] == "diverged" and row["dev"] == "inf"


def test_the_rows_of_a_run_come_back_from_the_side_file(quality: None, tmp_path: Path) -> None:
    from quality import results
    from quality.training import Run

    hits, losses = torch.tensor([0.0, 1, 1, 0, 1, 0, 0, 0, 0, 1], dtype=torch.float64), torch.tensor([1.5, 0.25, 3.0]).double()
    one, other = Run("a", "random", 0.01, 0.1, 0), Run("b", "full", None, 1e-3, 1)
    for run, metric, rows in ((one, "accuracy", hits), (other, "perplexity", losses)):
        results.append(tmp_path / "x.csv", run, {"metric": metric, "dev": 0.5, "test": 0.25, "trained": 7}, rows)
    with results.rows_file(tmp_path / "x.csv").open("a") as file:
        file.write('{"task": "a", "meth')  # a run that was stopped while it wrote
    found = results.read_rows(tmp_path / "x.csv")
    assert list(found) == [one, other] and torch.equal(found[one], hits) and torch.equal(found[other], losses)
    assert list(results.read(tmp_path / "x.csv")) == [one, other]


def test_the_interval_of_a_difference_covers_it_about_as_often_as_it_says(quality: None) -> None:
    from quality import paired

    source = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(60):
        base = torch.rand(200, generator=source)
        draws = [{seed: (base + torch.rand(200, generator=source) > bar).double() for seed in range(3)} for bar in (1.0, 0.9)]
        found = paired.difference(*draws, "accuracy")
        truth = -(1 - 0.9**2 / 2 - 0.5)  # of the chance that a sum of two uniforms is above 1, and above 0.9
        covered += found.low <= truth <= found.high
    assert covered >= 48
    same = paired.difference(draws[0], draws[0], "accuracy")
    assert (same.mean, same.low, same.high, same.better) == (0.0, 0.0, 0.0, 0)
    assert paired.difference({0: base}, {1: base}, "accuracy") is None


def test_a_lower_perplexity_is_better(quality: None) -> None:
    from quality import paired

    losses = torch.linspace(1, 2, 50).double()
    found = paired.difference({0: losses, 1: losses}, {0: losses + 0.1, 1: losses + 0.1}, "perplexity")
    assert found.better == 2 and found.high < 0 and str(found).startswith("**-")
    assert found.mean == pytest.approx(float(losses.mean().exp() * (1 - torch.tensor(0.1).exp())), rel=1e-5)


def test_the_fit_finds_a_law_that_made_the_data(quality: None) -> None:
    from quality import fit_lr

    law = [-2.1, -0.6, 1.2, -0.6]
    made = []
    for task in ("shakespeare", "sst2"):
        for method in ("random", "snip", "gradient"):
            for density in (1e-3, 1e-2, 5e-2):
                cell = fit_lr.Cell(task, method, density, "accuracy", [], 0.0, False)
                best = fit_lr.predicted(cell, law)
                tried = [(best + step, 0.9 - 0.05 * step**2) for step in (-0.9, -0.4, 0.1, 0.6)]
                made.append(dataclasses.replace(cell, tried=tried, best=fit_lr.best_of(tried)[0]))
    assert all(abs(cell.best - fit_lr.predicted(cell, law)) < 1e-9 for cell in made)
    assert all(abs(found - true) < 0.1 for found, true in zip(fit_lr.fit(made), law, strict=True))


def test_the_fit_writes_its_page_from_the_committed_runs(quality: None, tmp_path: Path) -> None:
    from quality import fit_lr

    assert fit_lr.main([str(BENCHMARKS / "results" / "first_look.csv"), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "learning_rate.md").read_text()
    total = next(line for line in page.splitlines() if line.startswith("| all |")).split("|")
    within, cells = total[6].split(" of ")
    assert 0 < int(within) <= int(cells) == 26
    assert (tmp_path / "learning_rate.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_that_confirms_is_run_with_few_methods_and_with_any_that_is_asked_for(quality: None) -> None:
    from quality.grids import SUITE

    planned = list(SUITE.cells(list(SUITE.tasks)))
    assert len(planned) == len(set(planned))
    at_one = {task: {method for other, method, budget in planned if (other, budget) == (task, 0.01)} for task in SUITE.tasks}
    assert {"random", "lora", "gradient"} < at_one["subj"] < at_one["shakespeare"] < set(SUITE.methods)
    at_less = {method for task, method, budget in planned if (task, budget) == ("subj", 0.001)}
    assert {"random", "lora"} < at_less < at_one["subj"]
    assert ("subj", "snip", 0.003) not in planned
    assert ("subj", "snip", 0.003) in list(SUITE.cells(["subj"], ["snip"], [0.003]))
    assert {("subj", "untrained", None), ("subj", "full", None)} < set(SUITE.cells(["subj"], None, [0.003]))


def test_the_default_rate_is_held_against_the_tuned_one(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quality import default_rate

    assert suite.main(asked(tmp_path, "--methods", "random", "--rates", "0.1", "0.32")) == 0
    out = tmp_path / "out"
    arguments = ["--tasks", "shakespeare", "--suite", str(out / "suite.csv"), "--shared", str(tmp_path / "shared")]
    arguments += ["--masks", str(tmp_path / "masks"), "--out", str(out)]
    assert default_rate.main(arguments) == 0
    rows = read(out / "default_rate.csv")
    assert {float(row["lr"]) for row in rows} == {sprand.suggest_lr(density=0.01, rms=0.137, width=64)} and len(rows) == 3
    tuned = [row for row in read(out / "suite.csv") if row["method"] == "random" and row["seed"] == "1"]
    mean, default = (sum(float(row["test"]) for row in found) / 3 for found in (
        [row for row in read(out / "suite.csv") if row["lr"] == tuned[0]["lr"]], rows,
    ))  # fmt: skip
    assert f"| {100 * (default / mean - 1):+.1f} |" in (out / "default_rate.md").read_text()
    monkeypatch.setattr(default_rate, "perform", None)
    assert default_rate.main(arguments) == 0


def test_a_chat_is_learned_by_its_answers_and_rows_that_are_too_long_are_not_counted(quality: None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from quality.chat import Chat
    from sprand.cli.finetune.data import Dataset, Example
    from sprand.cli.finetune.settings import Settings

    folder = save_llama(tmp_path / "tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w1 ' if m['role'] == 'user' else 'w2 ' }}{{ m['content'] }} [SEP] {% endfor %}"
        "{% if add_generation_prompt %}w2 {% endif %}"
    )
    short = [Example("w4 w5", "w6 w7"), Example("w8", "w9"), Example("w10", "w11 w12 w13")]
    rows = [short[0], Example(" ".join(WORDS), "w9"), *short[1:]]
    settings = Settings(model=str(folder), train=None, out=tmp_path, max_length=12, limit_eval=2)
    task = Chat(Dataset("causal-lm", rows, rows), tokenizer, settings)
    assert len(task.train) == 3 and len(task.eval) == 2
    texts = ["w1 w4 w5 [SEP] w2 w6 w7 [SEP]", "w1 w8 [SEP] w2 w9 [SEP]"]
    expected = []
    for text, answer in zip(texts, (3, 2), strict=True):
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        chances = model(tokens[None]).logits[0].log_softmax(-1)
        expected.append(-sum(chances[i - 1, tokens[i]].item() for i in range(len(tokens) - answer, len(tokens))))
    losses, terms, _ = task.outcomes(model, 2, torch.device("cpu"))
    assert terms.tolist() == [3, 2]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_diagonal_blocks_are_as_many_as_the_density_asks_for_and_all_sizes_allow(quality: None) -> None:
    from quality import variants

    mask = variants.diagonal_blocks({"tall": (6, 4), "wide": (2, 12)}, 0.4)
    for name, block in {"tall": torch.ones(3, 2), "wide": torch.ones(1, 6)}.items():
        expected = torch.block_diag(block, block).flatten().nonzero()[:, 0]
        assert torch.equal(mask[name].long(), expected)


def test_relative_rates_are_shares_of_the_size_of_each_weight_in_every_step(quality: None) -> None:
    from quality import variants

    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        for layer, size in zip(model, (1.0, 3.0), strict=True):
            layer.weight.fill_(size)
    sprand.apply(model, sprand.SparseConfig(density=0.25))
    optimizer = sprand.SparseAdamW(model, lr=0.1, weight_decay=0.0)
    deltas = list(optimizer.param_groups[0]["params"])
    variants.scale_rates(optimizer, variants.relative_rms(model))
    for _ in range(2):
        before = [delta.detach().clone() for delta in deltas]
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for delta in deltas:
            delta.grad = torch.ones_like(delta)
        optimizer.step()
        moved = [float((delta - old).abs().mean()) for delta, old in zip(deltas, before, strict=True)]
        assert moved == pytest.approx([0.1 / 5**0.5, 0.3 / 5**0.5], rel=1e-4)
