"""A Hugging Face `Trainer` on models of `sprand.peft`: adapter-only checkpoints, exact resume, the best model."""

from __future__ import annotations

import pytest
import torch

import sprand
from models import assert_same_bits, bits
from trainers import everything, llama, losses, rows, sparse, trained, trainer_of

peft = pytest.importorskip("peft", reason="these tests train models of PEFT")

from sprand.integrations.transformers import SparseCheckpointCallback, VisibleShareCallback, sparse_adamw  # noqa: E402
from sprand.peft import SprandConfig  # noqa: E402

TOKENS = rows(1)[0]["input_ids"][None]


def adapted(dtype=torch.float32, **fields):
    return peft.get_peft_model(llama(dtype), SprandConfig(**({"density": 0.05} | fields)))


def merged(model):
    """The plain model that a PEFT model is, with its trained weights."""
    return bits(model.merge_and_unload())


@pytest.mark.parametrize("optimizer", [sparse_adamw, None], ids=["sparse", "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_doors_train_alike_in_a_trainer(tmp_path, optimizer, dtype):
    by_peft, a = trained(tmp_path, adapted(dtype), optimizer)
    by_apply, b = trained(tmp_path, sparse(dtype=dtype), optimizer)
    assert losses(a) == losses(b)
    assert_same_bits(merged(by_peft), bits(by_apply))


@pytest.mark.parametrize("optimizer", [sparse_adamw, None], ids=["sparse", "default"])
def test_a_checkpoint_holds_the_adapter_alone_and_resumes_to_the_bit(tmp_path, optimizer):
    fields = {"modules_to_save": ["lm_head"]}
    model, trainer = trained(tmp_path, adapted(**fields), optimizer, save_strategy="steps", save_steps=3)
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert "model.safetensors" not in files
    where = str(tmp_path / "checkpoint-3")
    resumed, other = trained(tmp_path, adapted(**fields), optimizer, resume=where, save_strategy="no")
    assert other.state.global_step == 6
    assert_same_bits(everything(resumed, other), everything(model, trainer))
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-6")
    assert torch.equal(loaded.eval()(TOKENS).logits, model.eval()(TOKENS).logits)
    assert_same_bits(merged(loaded), merged(model))


def test_the_best_adapter_comes_back(tmp_path):
    """The loss falls, and the highest counts as the best here: the best checkpoint is not the last one."""
    model, trainer = trained(
        tmp_path, adapted(), save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2,
        load_best_model_at_end=True, greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = peft.PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-2")
    assert torch.equal(model.eval()(TOKENS).logits, best.eval()(TOKENS).logits)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, llama().eval()(TOKENS).logits)
    assert_same_bits(merged(model), merged(best))


def test_a_saved_adapter_loads(tmp_path):
    model, trainer = trained(tmp_path, adapted())
    trainer.save_model(tmp_path / "final")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "final")
    assert_same_bits(merged(loaded), merged(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path, reentrant):
    plain = everything(*trained(tmp_path, adapted()))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_same_bits(everything(*trained(tmp_path, adapted(), **options)), plain)


def test_the_share_of_visible_deltas_is_logged(tmp_path):
    model = adapted(torch.bfloat16)
    trainer = trainer_of(model, tmp_path, optimizer=sparse_adamw, learning_rate=3e-5)
    trainer.add_callback(VisibleShareCallback(trainer))
    assert sprand.visible_share(model) == 0.0
    trainer.train()
    share = trainer.state.log_history[-2]["visible_share"]
    assert 0 < share < 1
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    changed = sum(
        (weight != after).sum().item()
        for weight, after in zip(bits(llama(torch.bfloat16)).values(), merged(model).values(), strict=True)
    )
    assert share == changed / total


def test_its_checkpoints_need_no_callback(tmp_path):
    with pytest.raises(ValueError, match="one of PEFT needs no callback"):
        trainer_of(adapted(), tmp_path, [SparseCheckpointCallback()])
