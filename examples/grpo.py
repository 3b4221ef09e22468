"""TRL's GRPOTrainer with a SprandConfig on sums of reasoning-gym: few weights learn from rewards, few bytes tell an engine.

Without arguments a tiny Llama that has seen a few sums; `python grpo.py HuggingFaceTB/SmolLM2-135M-Instruct` takes that one,
for a few steps. Needs `pip install 'sprand[examples]'`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from statistics import mean

import reasoning_gym
import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer

from sprand.peft import SprandConfig
from sprand.serving import DeltaSync

CHARACTERS = ["<pad>", "<end>", *"0123456789+-=. "]


def sums(size: int, seed: int):
    """Sums and differences of two digits, with their answers."""
    return reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=1)


def tiny(task) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A small model that answers some of the sums."""
    words = Tokenizer(models.WordLevel({character: i for i, character in enumerate(CHARACTERS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", padding_side="left")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(CHARACTERS), pad_token_id=0, eos_token_id=1, bos_token_id=None, **size))
    texts = [f"{asked(entry)}{entry['answer']}<end>" for entry in task]
    rows = tokenizer(texts, return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        batch = {key: value[step % 4 :: 4] for key, value in rows.items() if key != "token_type_ids"}
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def asked(entry) -> str:
    """The sum alone: `4 + 3 =`."""
    return entry["metadata"]["expression"] + " = "


def main(name: str | None, folder: str) -> None:
    """Train by rewards, and say what a step would send to an engine that samples."""
    set_seed(0)
    task = sums(256, seed=0)
    if name is None:
        model, tokenizer = tiny(task)
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16"), AutoTokenizer.from_pretrained(name)
    entries = list(task)
    prompts = [asked(e) if name is None else [{"role": "user", "content": e["question"]}] for e in entries]
    data = Dataset.from_dict({"prompt": prompts, "number": range(len(entries))})

    def reward(completions, number, **_) -> list[float]:
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return [float(re.findall(r"-?\d+", text)[-1:] == [entries[i]["answer"]]) for text, i in zip(texts, number, strict=True)]

    args = GRPOConfig(
        folder, max_steps=40 if name is None else 4, per_device_train_batch_size=64 if name is None else 8, num_generations=8,
        max_completion_length=4 if name is None else 12, learning_rate=3e-3 if name is None else 1e-3, report_to="none",
        use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no", bf16=False, seed=0, beta=0.0,
    )  # fmt: skip
    model = get_peft_model(model, SprandConfig(density=0.05 if name is None else 0.01))
    trainer = GRPOTrainer(model, reward, args, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    sync = DeltaSync(trainer.model, visible_only=True)
    sync.indices()
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    sync.values()
    print(f"reward: first steps {mean(rewards[:5]):.2f}, last steps {mean(rewards[-5:]):.2f}")
    print(
        f"changed since the start: {sync.sent_entries:,} entries, {sync.sent_bytes:,} bytes; all weights are {sync.dense_bytes:,}"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as output:
        main(sys.argv[1] if len(sys.argv) > 1 else None, output)
