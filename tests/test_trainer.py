"""A plain Hugging Face `Trainer` on models of `sprand.apply`: optimizers, clean checkpoints, exact resume, the best model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sprand
from models import assert_same_bits, bits
from trainers import assert_close, everything, llama, losses, rows, sparse, trained, trainer_of

transformers = pytest.importorskip("transformers", reason="these tests train with transformers.Trainer")

from sprand.integrations.transformers import (  # noqa: E402
    DynamicMaskCallback,
    SparseCheckpointCallback,
    VisibleShareCallback,
    sparse_adamw,
)


@pytest.mark.parametrize(
    "other", [{"optim": "adamw_torch_fused"}, {"optim": "adamw_torch"}], ids=lambda options: options["optim"]
)
def test_the_optimizer_is_the_trainers_adamw(tmp_path, other):
    """Groups, weight decay and all: biases and norms of a head that trains in full do not decay."""
    options = {"weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_grad_norm": 0.5}
    fields = {"dtype": torch.float64, "modules_to_save": ["lm_head", "model.norm"]}
    ours, trainer = trained(tmp_path, sparse(**fields), **options)
    assert isinstance(trainer.optimizer.optimizer, sprand.SparseAdamW)
    theirs, reference = trained(tmp_path, sparse(**fields), None, **options, **other)
    assert [len(group["params"]) for group in trainer.optimizer.param_groups] == [15, 1]
    for a, b in zip(losses(trainer), losses(reference), strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_options_are_read_from_the_arguments_and_others_pass():
    args = transformers.TrainingArguments(learning_rate=3e-3, adam_beta1=0.8, adam_epsilon=1e-5, report_to="none", use_cpu=True)
    cls, options = sparse_adamw(args, max_grad_norm=0.3)
    assert cls is sprand.SparseAdamW
    assert options == {"lr": 3e-3, "betas": (0.8, 0.999), "eps": 1e-5, "max_grad_norm": 0.3}
    with pytest.raises(ValueError, match="expected weight_decay in the training arguments; set weight_decay there"):
        sparse_adamw(args, weight_decay=0.1)


def test_clipping_in_the_fused_step_is_the_trainers(tmp_path):
    ours, _ = trained(
        tmp_path, sparse(dtype=torch.float64), lambda args: sparse_adamw(args, max_grad_norm=0.04), max_grad_norm=0.0
    )
    theirs, trainer = trained(tmp_path, sparse(dtype=torch.float64), max_grad_norm=0.04)
    assert all(entry["grad_norm"] > 0.04 for entry in trainer.state.log_history if "grad_norm" in entry)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


def test_gradient_accumulation_is_one_large_batch(tmp_path):
    fields = {"dtype": torch.float64}
    whole, a = trained(tmp_path, sparse(**fields), per_device_train_batch_size=8, max_steps=3)
    parts, b = trained(
        tmp_path, sparse(**fields), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=3
    )  # fmt: skip
    assert losses(a) == pytest.approx(losses(b), rel=1e-6)
    assert_close(whole, parts, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", [sparse_adamw, None], ids=["sparse", "default"])
def test_a_checkpoint_is_a_clean_merged_model_and_resumes_to_the_bit(tmp_path, dtype, optimizer):
    fields = {"dtype": dtype, "modules_to_save": ["lm_head"]}
    model, trainer = trained(tmp_path, sparse(**fields), optimizer, save_strategy="steps", save_steps=3)
    reloaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint-6", output_loading_info=True, dtype=dtype
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_bits(reloaded.state_dict(), bits(model))
    resumed, other = trained(tmp_path, sparse(**fields), optimizer, resume=str(tmp_path / "checkpoint-3"), save_strategy="no")
    assert other.state.global_step == 6
    assert_same_bits(everything(resumed, other), everything(model, trainer))
    assert_same_bits(bits(sprand.unmerge(resumed)), bits(llama(dtype)))


def tied():
    return sprand.apply(llama(tie_word_embeddings=True), density=0.05, target_modules=["embed_tokens", "q_proj"])


def test_tied_weights_are_saved_once_and_resume_to_the_bit(tmp_path):
    model, trainer = trained(tmp_path, tied(), save_strategy="steps", save_steps=3)
    assert model.lm_head.sprand_delta is model.model.embed_tokens.sprand_delta
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert_same_bits(reloaded.state_dict(), bits(model))
    resumed, other = trained(tmp_path, tied(), resume=str(tmp_path / "checkpoint-3"), save_strategy="no")
    assert_same_bits(everything(resumed, other), everything(model, trainer))
    assert_same_bits(bits(sprand.unmerge(resumed)), bits(llama(tie_word_embeddings=True)))


def test_tied_weights_resume_to_the_bit_without_the_callback(tmp_path):
    """What several layers share is in a checkpoint once; one that has it twice, as sprand wrote them before, loads too."""
    options = {"save_strategy": "steps", "save_steps": 3}
    models = [tied(), tied()]
    trainers = [trainer_of(model, tmp_path, optimizer=sparse_adamw, **options) for model in models]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_bits(everything(models[1], trainers[1]), everything(models[0], trainers[0]))
    again, state = tied(), models[0].state_dict()
    state |= {name.replace("model.embed_tokens", "lm_head"): value for name, value in state.items() if "embed_tokens" in name}
    again.load_state_dict(state)
    assert_same_bits(again.state_dict(), models[0].state_dict())
    for name in ("sprand_delta", "sprand_indices", "sprand_base"):
        assert getattr(again.lm_head, name) is getattr(again.model.embed_tokens, name)


def test_a_saved_model_is_clean_and_its_adapter_loads_into_the_base(tmp_path):
    model, trainer = trained(tmp_path, save_strategy="steps", save_steps=6)
    trainer.save_model(tmp_path / "final")
    assert_same_bits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict(), bits(model))
    again = sprand.load(llama(), tmp_path / "checkpoint-6" / "sprand")
    assert_same_bits(bits(again), bits(model))


def test_training_goes_on_where_a_checkpoint_without_the_callback_left_off(tmp_path):
    """Without the callback the tensors of sprand are part of what the model saves."""
    options = {"save_strategy": "steps", "save_steps": 3}
    models = [sparse(), sparse()]
    trainers = [trainer_of(model, tmp_path, optimizer=sparse_adamw, **options) for model in models]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_bits(everything(models[1], trainers[1]), everything(models[0], trainers[0]))


def test_the_best_model_comes_back_with_its_entries(tmp_path):
    """The loss falls, and the highest counts as the best here: the best checkpoint is not the last one."""
    model, trainer = trained(
        tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2, load_best_model_at_end=True,
        greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert_same_bits(bits(model), bits(best))
    tokens = rows(1)[0]["input_ids"][None]
    assert torch.equal(model.eval()(tokens).logits, best.eval()(tokens).logits)
    with sprand.disabled(model):
        assert_same_bits(bits(model), bits(llama()))
    assert_same_bits(bits(sprand.merge(model)), bits(best))


@pytest.mark.parametrize("mode", ["regrow", "recompute"])
def test_a_moving_mask_resumes_from_a_clean_checkpoint(tmp_path, mode):
    from dynamic_masks import MODES

    def run(seed=0, changes=0, **options):
        model = sparse(density=0.2, seed=seed)
        mask = sprand.DynamicMask(model, **MODES[mode](changes))
        callbacks = [SparseCheckpointCallback(), DynamicMaskCallback(mask)]
        if mode == "recompute":  # in whatever order
            callbacks.reverse()
        trainer = trainer_of(model, tmp_path, callbacks, sparse_adamw, max_steps=15, save_strategy="steps", save_steps=8)
        trainer.train(**options)
        return model, trainer, mask

    model, trainer, mask = run()
    resumed, other, again = run(seed=1, changes=1, resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert mask.changes == again.changes == 2
    assert_same_bits(everything(resumed, other), everything(model, trainer))


def test_the_share_of_visible_deltas_is_logged(tmp_path):
    model = sparse(dtype=torch.bfloat16)
    trainer = trainer_of(model, tmp_path, optimizer=sparse_adamw, learning_rate=3e-5, lr_scheduler_type="constant", max_steps=8)
    trainer.add_callback(VisibleShareCallback(trainer))
    assert sprand.visible_share(model) == 0.0
    trainer.train()
    shares = [entry["visible_share"] for entry in trainer.state.log_history if "visible_share" in entry]
    assert len(shares) == 8
    assert 0 < shares[0] < shares[-1] < 1
    changed = total = 0
    for name, weight in llama(torch.bfloat16).named_parameters():
        changed += (weight != model.get_parameter(name)).sum().item()
    total = sum(p.numel() for p in sprand.parameters(model))
    assert sprand.visible_share(model) == shares[-1] == changed / total


def test_nothing_to_train_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no trained entries; call sprand.apply"):
        trainer_of(llama(), tmp_path, [SparseCheckpointCallback()])
    trainer = trainer_of(llama(), tmp_path, optimizer=sparse_adamw)
    with pytest.raises(ValueError, match=r"no trained entries; call sprand.apply"):
        VisibleShareCallback(trainer)
    with pytest.raises(ValueError, match="none of these parameters is a sprand delta"):
        trainer.train()
    model = sprand.switch(sparse(), None)
    with pytest.raises(ValueError, match="no adapter is active"):
        sprand.visible_share(model)


def test_what_has_checkpoints_of_its_own_is_refused():
    callback, model = SparseCheckpointCallback(), sparse()
    args = transformers.TrainingArguments(report_to="none", use_cpu=True)
    sharded = dataclasses.replace(args)
    sharded.fsdp = True
    with pytest.raises(ValueError, match="use sprand.peft there"):
        callback.on_init_end(sharded, None, None, model=model)
    compiled = sparse()
    compiled.model.layers[0] = torch.compile(compiled.model.layers[0])
    for wrapped, name in ((torch.compile(model), "the model"), (compiled, r"model\.layers\.0")):
        with pytest.raises(ValueError, match=rf"torch.compile has wrapped {name}, .*torch_compile=True"):
            callback.on_init_end(args, None, None, model=wrapped)
    model.peft_config = {}
    with pytest.raises(ValueError, match="one of PEFT needs no callback"):
        callback.on_init_end(args, None, None, model=model)


def test_a_resume_from_the_wrong_place_is_an_error(tmp_path):
    trained(tmp_path / "a", save_strategy="steps", save_steps=3, max_steps=3)
    trained(tmp_path / "b", save_strategy="steps", save_steps=3, max_steps=3, learning_rate=2e-2)
    with pytest.raises(FileNotFoundError, match=r"no sprand/entries.safetensors in .*set args.resume_from_checkpoint"):
        trained(tmp_path / "c", resume=str(tmp_path / "a" / "checkpoint-3"))
    with pytest.raises(ValueError, match=r"the weights that the trainer loaded are not those of .*b/checkpoint-3"):
        trained(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"))
    with pytest.raises(ValueError, match=r"expected \d+ entries of .* make the model by the same sprand.apply"):
        trained(tmp_path / "a", sparse(density=0.1), resume=str(tmp_path / "a" / "checkpoint-3"))
    where = str(tmp_path / "a" / "checkpoint-3")
    _, trainer = trained(tmp_path / "b", resume=where, resume_from_checkpoint=where)
    assert trainer.state.global_step == 6
