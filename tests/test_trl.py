"""TRL's trainers with `peft_config=SprandConfig(...)`: SFT, DPO, GRPO, and the weights that its vLLM sync reads."""

from __future__ import annotations

import math

import pytest
import torch

import sprand
from models import assert_same_bits, bits
from tiny_models import WORDS, save_llama
from trainers import everything, losses

trl = pytest.importorskip("trl", reason="these tests train with TRL")
peft = pytest.importorskip("peft", reason="these tests train models of PEFT")
datasets = pytest.importorskip("datasets", reason="TRL takes datasets of this library")
transformers = pytest.importorskip("transformers")

from sprand.integrations.transformers import SparseCheckpointCallback, sparse_adamw  # noqa: E402
from sprand.peft import SprandConfig  # noqa: E402

DENSITY = 0.1
COUNTING = [" ".join(WORDS[start : start + 8]) for start in range(32)]
PREFERENCES = [{"prompt": text, "chosen": f" {WORDS[0]}", "rejected": f" {WORDS[1]} {WORDS[2]}"} for text in COUNTING]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("llama")))


def plain(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base)


def options(folder, **others):
    defaults = dict(
        output_dir=str(folder), max_steps=6, save_strategy="no", per_device_train_batch_size=4, learning_rate=1e-2, seed=0,
        report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1,
    )  # fmt: skip
    return defaults | others


def sft(base, folder, resume=None, model=None, callbacks=None, config=None, **others):
    """A finished training of a language model on sentences that count."""
    args = trl.SFTConfig(**options(folder, max_length=16, **others))
    trainer = trl.SFTTrainer(
        model=base if model is None else model, args=args, train_dataset=datasets.Dataset.from_dict({"text": COUNTING}),
        eval_dataset=datasets.Dataset.from_dict({"text": COUNTING[:4]}), callbacks=callbacks,
        peft_config=(config or SprandConfig(density=DENSITY)) if model is None else None,
        processing_class=transformers.AutoTokenizer.from_pretrained(base), optimizer_cls_and_kwargs=sparse_adamw(args),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_sft_trains_saves_and_resumes_to_the_bit(base, tmp_path):
    trainer = sft(base, tmp_path, save_strategy="steps", save_steps=3)
    assert isinstance(trainer.model, peft.PeftModel)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert not (tmp_path / "checkpoint-6" / "model.safetensors").exists()
    resumed = sft(base, tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert_same_bits(everything(resumed.model, resumed), everything(trainer.model, trainer))
    loaded = peft.PeftModel.from_pretrained(plain(base), tmp_path / "checkpoint-6")
    assert_same_bits(bits(loaded.merge_and_unload()), bits(trainer.model.merge_and_unload()))


def test_sft_chooses_columns_in_its_first_steps(base, tmp_path, caplog):
    config = SprandConfig(strategy="token_fisher", layout="columns", density=0.2, score_steps=2)
    with caplog.at_level("INFO", "sprand"):
        trainer = sft(base, tmp_path, config=config, save_strategy="steps", save_steps=3)
    assert "by the gradients of the first 2 steps, in which nothing trained" in caplog.text
    assert all(p.any() for p in trainer.model.parameters() if p.requires_grad)
    resumed = sft(base, tmp_path, config=config, resume=str(tmp_path / "checkpoint-3"))
    assert_same_bits(everything(resumed.model, resumed), everything(trainer.model, trainer))


def test_sft_of_a_model_of_apply_is_the_same_training(base, tmp_path):
    by_peft = sft(base, tmp_path)
    model = sprand.apply(plain(base), density=DENSITY)
    by_apply = sft(base, tmp_path, model=model, callbacks=[SparseCheckpointCallback()], save_strategy="steps", save_steps=6)
    assert losses(by_apply) == losses(by_peft)
    assert_same_bits(bits(model), bits(by_peft.model.merge_and_unload()))
    assert_same_bits(plain(tmp_path / "checkpoint-6").state_dict(), bits(model))


def dpo(base, folder, model=None, **others):
    args = trl.DPOConfig(**options(folder, max_length=32, learning_rate=5e-2, max_steps=8, **others))
    trainer = trl.DPOTrainer(
        model=plain(base) if model is None else model, args=args, train_dataset=datasets.Dataset.from_list(PREFERENCES),
        peft_config=SprandConfig(density=DENSITY) if model is None else None,
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    trainer.optimizer_cls_and_kwargs = sparse_adamw(args)
    return trainer


def test_dpo_starts_at_ln_2_and_refers_to_the_disabled_adapter(base, tmp_path):
    trainer = dpo(base, tmp_path)
    assert trainer.ref_model is None
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainer)[-1] < 0.65
    tokens = torch.arange(4, 12)[None]
    with trainer.model.disable_adapter():
        assert torch.equal(trainer.model(tokens).logits, plain(base)(tokens).logits)


def test_dpo_of_a_trained_adapter_refers_to_a_copy_of_it(base, tmp_path):
    """TRL makes a second adapter "ref" from the same config and copies the first one's values into it."""
    sft(base, tmp_path).save_model(tmp_path / "sft")
    model = peft.PeftModel.from_pretrained(plain(base), tmp_path / "sft", is_trainable=True)
    before = bits(peft.PeftModel.from_pretrained(plain(base), tmp_path / "sft").merge_and_unload())
    trainer = dpo(base, tmp_path, model)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainer)[-1] < 0.65
    trainer.model.set_adapter("ref")
    assert_same_bits(bits(trainer.model.merge_and_unload(adapter_names=["ref"])), before)


@pytest.fixture
def grpo(base, tmp_path):
    """A trainer that has made two steps of reinforcement learning; the reward is the share of one word."""
    rewards = []

    def reward(completions, **_):
        rewards.append([text.split().count(WORDS[0]) / 4 for text in completions])
        return [value + 0.01 * len(set(text.split())) for value, text in zip(rewards[-1], completions, strict=True)]

    args = trl.GRPOConfig(**options(tmp_path, max_steps=2, max_completion_length=4, num_generations=4, beta=0.1))
    trainer = trl.GRPOTrainer(
        model=plain(base), args=args, reward_funcs=reward, peft_config=SprandConfig(density=DENSITY),
        train_dataset=datasets.Dataset.from_dict({"prompt": COUNTING}),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    trainer.optimizer_cls_and_kwargs = sparse_adamw(args)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, sprand.SparseAdamW)
    assert len(rewards) == 2
    return trainer


def test_grpo_trains_and_refers_to_the_disabled_adapter(base, grpo):
    assert grpo.ref_model is None
    logged = [entry for entry in grpo.state.log_history if "kl" in entry]
    assert logged[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in logged)
    assert sprand.visible_share(grpo.model) > 0.9
    with grpo.model.disable_adapter():
        assert_same_bits(
            {name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in grpo.model.named_parameters()
             if "sprand" not in name},
            dict(plain(base).named_parameters()),
        )  # fmt: skip


def test_the_vllm_sync_reads_merged_weights_under_the_models_own_names(base, grpo):
    """TRL's own loop over parameters; what is left out is the server at its other end."""
    from trl.distributed import DistributedBackend
    from trl.generation.vllm_generation import VLLMGeneration

    class Server:
        def update_named_params(self, metadata, parameters):
            self.received = {name: value.clone() for name, value in parameters}
            self.announced = [name for name, _, _ in metadata]

        def reset_prefix_cache(self):
            pass

    sync = VLLMGeneration.__new__(VLLMGeneration)
    sync.model, sync.accelerator, sync.mode, sync._weight_metadata = grpo.model, grpo.accelerator, "server", None
    sync._dist, sync.vllm_client = DistributedBackend(grpo.accelerator), Server()
    before = {name: value.clone() for name, value in grpo.model.state_dict().items()}
    for _ in range(3):
        sync.sync_weights()
        assert_same_bits(grpo.model.state_dict(), before)
    assert sync.vllm_client.announced == list(sync.vllm_client.received) == [name for name, _ in plain(base).named_parameters()]
    trained = grpo.model.merge_and_unload()
    assert_same_bits(sync.vllm_client.received, dict(trained.named_parameters()))
    assert any(not torch.equal(value, plain(base).get_parameter(name)) for name, value in sync.vllm_client.received.items())
