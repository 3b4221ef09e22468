"""sprand in a plain `transformers.Trainer`: a tiny BERT made on the spot learns which of two vocabularies a sentence is from."""

from __future__ import annotations

import random
import tempfile

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

import sprand
from sprand.integrations.transformers import SparseCheckpointCallback, VisibleShareCallback, sparse_adamw

WORDS = [f"word{i}" for i in range(100)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def rows(count: int, tokenize: PreTrainedTokenizerFast) -> list[dict]:
    """Sentences, three of four words from one half of the vocabulary; the label is the half."""
    labels = [random.randrange(2) for _ in range(count)]
    halves = {k: WORDS[50 * k : 50 * k + 50] for k in (0, 1)}
    texts = [" ".join(random.choice(halves[k] if random.random() < 0.75 else WORDS) for _ in range(12)) for k in labels]
    return [{"input_ids": tokens, "labels": k} for tokens, k in zip(tokenize(texts)["input_ids"], labels, strict=True)]


def main(folder: str) -> None:
    """Train, keep the best checkpoint, and load it as the plain model that it is."""
    set_seed(0)
    words = tokenizer()
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=2, **size))
    sprand.apply(model, density=0.05, target_parameters=["word_embeddings.weight"], modules_to_save=["classifier"])
    sprand.print_trainable_parameters(model)
    args = TrainingArguments(
        folder, num_train_epochs=4, per_device_train_batch_size=32, learning_rate=1e-2, eval_strategy="epoch", seed=0,
        save_strategy="epoch", load_best_model_at_end=True, report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=64,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=rows(1024, words), eval_dataset=rows(256, words), processing_class=words,
        optimizer_cls_and_kwargs=sparse_adamw(args), callbacks=[SparseCheckpointCallback()],
        compute_metrics=lambda out: {"accuracy": float((out.predictions.argmax(-1) == out.label_ids).mean())},
    )  # fmt: skip
    trainer.add_callback(VisibleShareCallback(trainer))
    trainer.train()
    plain = BertForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    equal = all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())
    print("the best checkpoint is a plain BERT, and its weights are the trained ones to the bit:", equal)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as output:
        main(output)
