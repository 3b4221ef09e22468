"""Fine-tuning on MetaMathQA, tested on GSM8K, by the protocol of Hugging Face PEFT's method comparison (for a real model, a GPU).

What that comparison fixes (huggingface/peft, method_comparison/MetaMathQA), and this script follows: Llama-3.2-3B in bfloat16;
the rows of MetaMathQA of at most 1,300 characters in their order, in buckets of 20 batches sorted by falling length; 5,000 steps
of 4 rows of at most 768 tokens; loss over question, answer and one end token, divided by the tokens of the batch; AdamW, a tenth
of the steps warm-up, then cosine to 0, gradients clipped to 1; GSM8K's test rows answered greedily up to 768 tokens; the number
after the last "The answer is" counts. Its rows are one seed each; the standard error of an accuracy there is 1.4 points. Its
"forgetting" is of another text and another formula than `old_before` and `old_after` here (mean loss per token of --old). A run
that stands in the CSV is not run again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sprand
from quality.math_answers import Question, accuracy, load
from quality.peers import sparse_shira
from report import RESULTS, progress, write_csv
from sprand.cli.finetune.models import pick_device

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
MOST_CHARACTERS = 1300
BUCKET = 20
PEERS = ("lora", "shira", "full", "untrained")
PEER_RATES = {
    "lora": (1e-4, 0.1),
    "shira": (3e-4, 0.01),
    "full": (1e-5, 0.1),
}  # rate and weight decay of the comparison's own rows
COLUMNS = (
    "model", "method", "layout", "rank", "lr", "weight_decay", "seed", "steps", "batch_size", "max_length", "trained",
    "train_loss", "valid", "test", "old_before", "old_after", "train_seconds", "peak_mib", "adapter_mib",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    file = options.out / "metamath.csv"
    rows: list[dict[str, Any]] = []
    if file.exists():
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    for method, seed in itertools.product(options.methods, options.seeds):
        key = key_of(method, seed, options)
        if any(all(str(row[name] or "") == key[name] for name in key) for row in rows):
            print(f"{method}, seed {seed}: stands in {file}", file=sys.stderr)
            continue
        rows.append(run(method, seed, options))
        write_csv(file, rows, COLUMNS)
        print(json.dumps(rows[-1]), flush=True)
    return 0


def key_of(method: str, seed: int, options: argparse.Namespace) -> dict[str, str]:
    """What a line of the CSV is known by; the learning rate only where it is given."""
    names = ["model", "layout", "rank", "batch_size", "max_length", "steps"]
    names += ["lr"] if options.lr and method != "untrained" else []
    return {name: str(getattr(options, name)) for name in names} | {"method": method, "seed": str(seed)}


def run(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One line: load, attach, train, answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    device = pick_device(options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, valid, test = load(options.train, options.valid, options.test)
    train = [question for question in train if len(f"{question.query} {question.response}") <= MOST_CHARACTERS]
    old = options.old.read_text(encoding="utf-8") if options.old else None
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    line = {name: getattr(options, name) for name in ("model", "layout", "rank", "batch_size", "max_length", "steps")}
    line |= {"method": method, "seed": seed, "old_before": old_loss(model, tokenizer, old, options)}
    if method != "untrained":
        trainer = attach(model, method, seed, options, batches(train[: options.limit_train], tokenizer, options))
        model = trainer.model
        line |= {"lr": trainer.lr, "weight_decay": trainer.weight_decay, "trained": sum(p.numel() for p in trainer.trained)}
        supply = itertools.chain.from_iterable(
            batches(train[: options.limit_train], tokenizer, options) for _ in itertools.count()
        )
        line |= learn(trainer, supply, valid, tokenizer, options)
        line["adapter_mib"] = saved_size(model, method, options) / 2**20
    line["test"] = accuracy(answers(model, tokenizer, test[: options.limit_test], options), test[: options.limit_test])
    line["old_after"] = old_loss(model, tokenizer, old, options)
    line["peak_mib"] = torch.cuda.max_memory_reserved(device) / 2**20 if device.type == "cuda" else None
    return line


@dataclasses.dataclass
class Trainer:
    """A model made ready.

    Attributes:
        model: to call.
        trained: what trains.
        optimizer: over it.
        lr: its highest rate.
        weight_decay: of the optimizer.
    """

    model: nn.Module
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr: float
    weight_decay: float


def attach(model: nn.Module, method: str, seed: int, options: argparse.Namespace, data: Iterator[dict[str, Tensor]]) -> Trainer:
    """The model with a method of the comparison, or with sprand at the count that LoRA of that rank has on the same layers."""
    targets = list(options.targets)
    if method in PEERS:
        lr, decay = PEER_RATES[method]
        if method == "lora":
            import peft

            config = peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets)
            model = peft.get_peft_model(model, config)
        elif method == "shira":
            model = sparse_shira(model, options.rank, targets, seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        lr, decay = options.lr or lr, decay if options.weight_decay is None else options.weight_decay
        return Trainer(model, trained, torch.optim.AdamW(trained, lr=lr, weight_decay=decay), lr, decay)
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets]
    count = options.rank * sum(layer.in_features + layer.out_features for layer in layers)
    config = sprand.SparseConfig(
        strategy=method,
        budget=count,
        target_modules=targets,
        seed=seed,
        layout=options.layout if method == "random" else "unstructured",
    )
    scored = {} if method in ("random", "uniform") else {"data": itertools.islice(data, options.calibration), "loss_fn": loss_of}
    sprand.apply(model, config, **scored)
    lr, decay = options.lr or sprand.suggest_lr(model), options.weight_decay or 0.0
    return Trainer(model, sprand.parameters(model), sprand.SparseAdamW(model, lr=lr, weight_decay=decay), lr, decay)


def batches(rows: Sequence[Question], tokenizer: Any, options: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """One pass: `input_ids`, `attention_mask` and `labels` [rows, tokens], buckets sorted by falling length."""
    size = options.batch_size * BUCKET
    for start in range(0, len(rows), size):
        texts = [TEMPLATE.format(query=row.query) + row.response for row in rows[start : start + size]]
        tokens = sorted((ids[: options.max_length] for ids in tokenizer(texts)["input_ids"]), key=len, reverse=True)
        for first in range(0, len(tokens), options.batch_size):
            yield batch_of(tokens[first : first + options.batch_size], tokenizer.pad_token_id)


def batch_of(tokens: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    """Rows padded on the right; the first token of padding is one to learn: it is how the model ends an answer."""
    width = max(map(len, tokens))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in tokens])
    place, lengths = torch.arange(width), torch.tensor([len(row) for row in tokens])[:, None]
    labels = ids.masked_fill(place > lengths, -100)
    return {"input_ids": ids, "attention_mask": (place < lengths).long(), "labels": labels}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The summed loss of the next tokens over the number of tokens of the batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    flat = logits[:, :-1].flatten(0, 1).float()
    total = nn.functional.cross_entropy(flat, batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return total / batch["attention_mask"].sum()


def learn(
    trainer: Trainer, supply: Iterator[dict[str, Tensor]], valid: Sequence[Question], tokenizer: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """Train to the end; the last validation accuracy, the mean loss of the last steps, and the seconds without evaluation."""
    model, warmup = trainer.model, int(0.1 * options.steps)
    device = next(model.parameters()).device
    losses, seconds, found = [], 0.0, None
    model.train()
    with progress(options.steps, "metamath") as bar:
        for step in range(options.steps):
            started = time.perf_counter()
            done = (step - warmup) / max(1, options.steps - warmup)
            factor = step / max(1, warmup) if step < warmup else 0.5 + 0.5 * math.cos(math.pi * done)
            for group in trainer.optimizer.param_groups:
                group["lr"] = trainer.lr * factor
            loss = loss_of(model, {name: part.to(device) for name, part in next(supply).items()})
            loss.backward()
            nn.utils.clip_grad_norm_(trainer.trained, 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            losses.append(float(loss.detach()))
            seconds += time.perf_counter() - started
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"step {step + 1}: the loss became {losses[-1]}; try a lower --lr than {trainer.lr:g}")
            bar.advance()
            if options.eval_every and (step + 1) % options.eval_every == 0:
                found = accuracy(answers(model, tokenizer, valid, options), valid)
                bar.say(f"step {step + 1}: loss {sum(losses[-options.eval_every :]) / options.eval_every:.4f}, valid {found:.3f}")
    last = losses[-(options.eval_every or 250) :]
    return {"train_loss": sum(last) / len(last), "train_seconds": seconds, "valid": found}


@torch.inference_mode()
def answers(model: nn.Module, tokenizer: Any, questions: Sequence[Question], options: argparse.Namespace) -> list[str]:
    """What the model says to each question, greedily; the question itself included."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    texts: list[str] = []
    for start in range(0, len(questions), options.eval_batch_size):
        prompts = [TEMPLATE.format(query=q.query) for q in questions[start : start + options.eval_batch_size]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(device)
        batch.pop("token_type_ids", None)
        output = model.generate(
            **batch,
            max_length=max(options.max_length, batch["input_ids"].shape[1] + 1),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(output, skip_special_tokens=True)
    model.train(training)
    return texts


@torch.inference_mode()
def old_loss(model: nn.Module, tokenizer: Any, text: str | None, options: argparse.Namespace) -> float | None:
    """The mean loss per token of a text, in blocks of the longest row."""
    if text is None:
        return None
    training, device = model.training, next(model.parameters()).device
    model.eval()
    ids = tokenizer(text, verbose=False)["input_ids"]
    blocks = [ids[start : start + options.max_length] for start in range(0, len(ids), options.max_length)]
    total, count = 0.0, 0
    for block in (torch.tensor([block], device=device) for block in blocks if len(block) > 1):
        logits = model(input_ids=block).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, block[0, 1:], reduction="sum"))
        count += block.shape[1] - 1
    model.train(training)
    return total / max(1, count)


def saved_size(model: nn.Module, method: str, options: argparse.Namespace) -> float:
    """Bytes of the adapter on disk, which stays in the output folder; of full fine-tuning, those of the weights."""
    if method == "full":
        return sum(p.numel() * p.element_size() for p in model.parameters())
    folder = options.out / "metamath_adapters" / f"{method}-{options.layout}-{options.rank}"
    model.save_pretrained(folder) if method in PEERS else sprand.save(model, folder)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", default=["random"], help="sprand's strategies, lora, shira, full or untrained (default random)")
    add("--model", default="meta-llama/Llama-3.2-3B", help="a directory or a name on the Hub")
    add("--train", type=Path, help="JSONL with query and response (default: meta-math/MetaMathQA, by the datasets package)")
    add("--valid", type=Path, help="JSONL with question and answer (default: 50 rows of openai/gsm8k's training rows)")
    add("--test", type=Path, help="JSONL with question and answer (default: the test rows of openai/gsm8k)")
    add("--old", type=Path, help="a text to measure forgetting on")
    add("--rank", type=int, default=32, help="the trained count is that of LoRA at this rank (default 32)")
    add("--targets", nargs="+", default=["q_proj", "v_proj"], help="layers (default q_proj v_proj)")
    add("--layout", default="unstructured", help="of a random draw: unstructured or columns")
    add("--lr", type=float, help="default: sprand.suggest_lr; of peers, that of the comparison")
    add("--weight-decay", type=float, help="default 0; of peers, that of the comparison")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", type=int, default=5000)
    add("--batch-size", type=int, default=4)
    add("--eval-batch-size", type=int, default=50)
    add("--max-length", type=int, default=768)
    add("--eval-every", type=int, default=250, help="steps between answers to the validation rows; 0: never")
    add("--calibration", type=int, default=256, help="batches that a strategy scores entries on")
    add("--limit-train", type=int, help="first rows only")
    add("--limit-test", type=int, help="first rows only")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--device", default="auto")
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
