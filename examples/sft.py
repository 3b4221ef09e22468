"""TRL's SFTTrainer with a SprandConfig: a tiny Llama that counts upwards learns to count downwards from 5 % of its weights."""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from sprand.peft import SprandConfig

NUMBERS = [str(i) for i in range(40)]
UP = [" ".join(NUMBERS[start : start + 8]) for start in range(33)]
DOWN = [" ".join(reversed(sentence.split())) for sentence in UP]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<end>", *NUMBERS])}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def train(folder: str, model: LlamaForCausalLM, sentences: list[str], lr: float, steps: int, config=None) -> SFTTrainer:
    """A finished training."""
    args = SFTConfig(
        folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=lr, max_length=16, report_to="none", use_cpu=True,
        disable_tqdm=True, logging_steps=50, save_strategy="no", bf16=False, seed=0,
    )  # fmt: skip
    data = Dataset.from_dict({"text": sentences})
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer(), peft_config=config)
    trainer.train()
    return trainer


def main(folder: str) -> None:
    """Pre-train the tiny model, fine-tune it, and load the adapter into the untouched base."""
    set_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=42, max_position_embeddings=32, pad_token_id=0, eos_token_id=1, **size))
    train(folder, base, UP, lr=5e-3, steps=100).save_model(f"{folder}/base")
    trainer = train(folder, base, DOWN, lr=1e-2, steps=200, config=SprandConfig(density=0.05))
    trainer.model.print_trainable_parameters()
    trainer.save_model(f"{folder}/adapter")

    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/adapter")
    prompt = {"input_ids": torch.tensor([tokenizer().encode("20")]), "max_new_tokens": 6, "do_sample": False}
    print("fine-tuned:", tokenizer().decode(model.generate(**prompt)[0]))
    with model.disable_adapter():
        print("its base:  ", tokenizer().decode(model.generate(**prompt)[0]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as output:
        main(output)
