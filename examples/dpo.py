"""TRL's DPOTrainer and a SprandConfig: a tiny Llama that counts up as often as down learns to prefer up, with no second model."""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import DPOConfig, DPOTrainer

import sprand
from sprand.peft import SprandConfig

NUMBERS = [str(i) for i in range(40)]
UP, DOWN = ([" " + " ".join(NUMBERS[i + step : i + 4 * step : step]) for i in range(4, 36)] for step in (1, -1))


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<end>", *NUMBERS])}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def pretrained() -> LlamaForCausalLM:
    """A model that has seen as many sentences up as down."""
    sizes = {"vocab_size": 42, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(pad_token_id=0, eos_token_id=1, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.tensor([tokenizer().encode(a + b) for a, b in zip(NUMBERS[4:36] * 2, UP + DOWN, strict=True)])
    for _ in range(100):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main(folder: str) -> None:
    """Train the preference of a model, and ask the trained model and its reference."""
    set_seed(0)
    model = get_peft_model(pretrained(), SprandConfig(density=0.05))
    args = DPOConfig(
        folder, max_steps=40, per_device_train_batch_size=16, learning_rate=sprand.suggest_lr(model), report_to="none", seed=0,
        use_cpu=True, disable_tqdm=True, logging_steps=20, logging_first_step=True, save_strategy="no", bf16=False,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": NUMBERS[4:36], "chosen": UP, "rejected": DOWN})
    words = tokenizer()
    trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=words)
    trainer.train()
    print(f"the first loss, which should be ln 2: {trainer.state.log_history[0]['loss']:.6f}")
    prompt = {"input_ids": torch.tensor([words.encode("20")]), "max_new_tokens": 3, "do_sample": False}
    print("trained:      ", words.decode(trainer.model.generate(**prompt)[0]))
    with trainer.model.disable_adapter():
        print("its reference:", words.decode(trainer.model.generate(**prompt)[0]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as output:
        main(output)
