"""sentence-transformers' trainer, which loads a checkpoint into a fresh model and hands its weights on, all or none."""

from __future__ import annotations

import pytest

import sprand
from models import assert_same_bits, bits
from tiny_models import WORDS, save_bert
from trainers import everything

sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

from sentence_transformers.sentence_transformer import losses  # noqa: E402

from sprand.integrations.transformers import SparseCheckpointCallback  # noqa: E402


@pytest.fixture
def made(tmp_path):
    folder = save_bert(tmp_path / "bert")

    def make(*more):
        parts = sentence_transformers.sentence_transformer.modules
        words = parts.Transformer(str(folder), max_seq_length=16)
        return sentence_transformers.SentenceTransformer(modules=[words, parts.Pooling(32), *more], device="cpu")

    return make


def trained(model, folder, callbacks=(), resume=None, **options):
    rows = {"a": WORDS[:16], "b": WORDS[16:32]}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(folder), max_steps=4, save_steps=2, save_strategy="steps", per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", use_cpu=True, disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    loss = losses.MultipleNegativesRankingLoss(model)
    data = datasets.Dataset.from_dict(rows)
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, loss=loss, callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_training_resumes_to_the_bit_from_plain_checkpoints(made, tmp_path):
    model = sprand.apply(made(), density=0.05)
    trainer = trained(model, tmp_path / "run", [SparseCheckpointCallback()])
    plain = sentence_transformers.SentenceTransformer(str(tmp_path / "run" / "checkpoint-4"), device="cpu")
    assert_same_bits(bits(plain), bits(model))
    resumed = sprand.apply(made(), density=0.05)
    again = trained(resumed, tmp_path / "run", [SparseCheckpointCallback()], str(tmp_path / "run" / "checkpoint-2"))
    assert again.state.global_step == 4
    assert_same_bits(everything(resumed, again), everything(model, trainer))
    assert_same_bits(bits(sprand.unmerge(resumed)), bits(made()))


def test_the_best_model_comes_back_with_its_entries(made, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    model = sprand.apply(made(), density=0.05)
    trainer = trained(model, tmp_path / "run", [SparseCheckpointCallback()], **options)
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    assert_same_bits(bits(model), bits(sentence_transformers.SentenceTransformer(best, device="cpu")))
    assert_same_bits(bits(sprand.unmerge(model)), bits(made()))


def test_a_resume_without_the_callback_is_refused_before_anything_is_loaded(made, tmp_path):
    trained(sprand.apply(made(), density=0.05), tmp_path / "run")
    model = sprand.apply(made(), density=0.05)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="none of the entries that train there.*give it SparseCheckpointCallback"):
        trained(model, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_bits(model.state_dict(), before)


def test_entries_in_a_part_that_it_loads_itself_are_refused(made, tmp_path):
    dense = sentence_transformers.sentence_transformer.modules.Dense(32, 8)
    with pytest.raises(ValueError, match=r"trained entries of 2\.linear in them.*exclude_modules=\['2\.linear'\]"):
        trained(sprand.apply(made(dense), density=0.05), tmp_path / "run", [SparseCheckpointCallback()])
