"""An inference copy follows a training model by its trained values alone, to the bit, in this process and between two."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

import sprand
from checkpoints import assert_same, llama, tensors_of
from models import EVERY_TARGET, MLP, EveryLayer, Tied, assert_same_bits, bits, built, tokens_and_labels
from sprand.serving import DeltaReceiver, DeltaSync
from sprand.serving.messages import VALUES_HEADER


def trainer(dtype=torch.float32, **fields):
    model = sprand.apply(built(EveryLayer).to(dtype), **({"density": 0.1} | EVERY_TARGET | fields))
    return model, sprand.SparseAdamW(model, lr=1e-2)


def step(model, optimizer, seed: int = 0) -> None:
    x, y = tokens_and_labels(seed)
    F.cross_entropy(model(x).float(), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def of_trainer(model) -> dict[str, torch.Tensor]:
    sprand.write(model)
    return bits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["tensors", "bytes"])
def test_the_copy_holds_the_trained_weights_after_every_message(dtype, form):
    model, optimizer = trainer(dtype)
    sync, receiver = DeltaSync(model), DeltaReceiver(copied := built(EveryLayer).to(dtype))

    def carried(message):
        return message.numpy().tobytes() if form == "bytes" else message

    index_message = sync.indices()
    assert receiver.receive(carried(index_message)) == 0
    assert_same_bits(bits(copied), bits(built(EveryLayer).to(dtype)))
    for version in (1, 2, 3):
        step(model, optimizer, version)
        message = sync.values()
        assert receiver.receive(carried(message)) == version == receiver.version
        assert_same_bits(bits(copied), of_trainer(model))
        assert message.numel() == sync.values_bytes
    entries = sum(site.entries.indices.numel() for site in sprand.layers.sites.sites_of(model))
    head = sum(p.numel() for p in model.head.parameters())
    assert sync.values_bytes == VALUES_HEADER.size + dtype.itemsize * (entries + head)
    assert index_message.numel() == sync.index_bytes > 4 * entries
    assert sync.dense_bytes == sum(p.nbytes for p in built(EveryLayer).to(dtype).parameters())
    receiver.revert()
    assert_same_bits(bits(copied), bits(built(EveryLayer).to(dtype)))
    step(model, optimizer)
    receiver.receive(sync.values())
    assert_same_bits(bits(copied), of_trainer(model))
    receiver.close()
    assert "forward" not in copied.__dict__


def test_messages_that_do_not_fit_change_nothing():
    model, optimizer = trainer()
    sync, receiver = DeltaSync(model), DeltaReceiver(copied := built(EveryLayer))
    with pytest.raises(RuntimeError, match="call indices\\(\\) first"):
        sync.values()
    first = sync.indices()
    one = sync.values()
    with pytest.raises(ValueError, match="values before positions"):
        receiver.receive(one)
    flipped = first.clone()
    flipped[-2] ^= 1
    for damaged in (first[:-1], first[:100], first[:9], torch.cat([first, first[:4]]), flipped):
        with pytest.raises(ValueError, match="truncated or damaged"):
            receiver.receive(damaged)
    for other in (b"", b"other bytes altogether", first[1:]):
        with pytest.raises(ValueError, match="got other bytes"):
            receiver.receive(other)
    with pytest.raises(ValueError, match="expected bytes, or a uint8 tensor"):
        receiver.receive(first.float())
    receiver.receive(first)
    step(model, optimizer)
    two = sync.values()
    for damaged in (two[:-1], two[:20], torch.cat([two, two[:1]])):
        with pytest.raises(ValueError, match="truncated"):
            receiver.receive(damaged)
    assert receiver.version == 0
    assert_same_bits(bits(copied), bits(built(EveryLayer)))
    receiver.receive(two)
    held = bits(copied)
    for old in (one, two):
        with pytest.raises(ValueError, match="after those of version 2"):
            receiver.receive(old)
    other_model, _ = trainer(seed=5)
    other_sync = DeltaSync(other_model)
    other_first, other_one = other_sync.indices(), other_sync.values()
    with pytest.raises(ValueError, match="for other positions"):
        receiver.receive(other_one)
    assert_same_bits(bits(copied), held)
    receiver.receive(other_first)  # the base again, under other positions
    assert_same_bits(bits(copied), bits(built(EveryLayer)))
    receiver.receive(other_one)
    assert_same_bits(bits(copied), of_trainer(other_model))


def test_another_base_or_model_is_refused():
    message = DeltaSync(trainer()[0]).indices()
    for model, words in (
        (built(EveryLayer, seed=1), "trained on another base"),
        (built(EveryLayer).bfloat16(), "in one dtype"),
        (built(MLP), "none of that name"),
    ):
        with pytest.raises(ValueError, match=words):
            DeltaReceiver(model).receive(message)
    with pytest.raises(ValueError, match="trains entries itself|trains entries"):
        DeltaReceiver(trainer()[0])


def test_a_redrawn_mask_is_noticed_and_followed():
    model, optimizer = trainer(modules_to_save=None, target_parameters=None)
    mask = sprand.DynamicMask(model, optimizer, every=3, fraction=0.5)
    sync, receiver = DeltaSync(model), DeltaReceiver(copied := built(EveryLayer))
    receiver.receive(sync.indices())
    sent_again = 0
    for number in range(8):
        x, y = tokens_and_labels(number)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        changed = mask.step()
        optimizer.zero_grad()
        if changed:
            sent_again += 1
            with pytest.raises(RuntimeError, match="call indices\\(\\) again"):
                sync.values()
            receiver.receive(sync.indices())
        receiver.receive(sync.values())
        assert_same_bits(bits(copied), of_trainer(model))
    assert sent_again == 2


def test_values_that_are_no_numbers_are_not_sent():
    model, _ = trainer()
    sync = DeltaSync(model)
    sync.indices()
    model.linear.sprand_delta.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        sync.values()
    assert sync.version == 0


def test_no_values_are_written_under_a_running_forward():
    model, optimizer = trainer()
    sync, receiver = DeltaSync(model), DeltaReceiver(copied := built(EveryLayer))
    receiver.receive(sync.indices())
    step(model, optimizer)
    message, reached, go = sync.values(), threading.Event(), threading.Event()

    def pause(*_) -> None:
        reached.set()
        assert go.wait(20)

    copied.norm.register_forward_hook(pause)
    outputs = []
    x, _ = tokens_and_labels()
    forward = threading.Thread(target=lambda: outputs.append(copied(x)), daemon=True)
    forward.start()
    assert reached.wait(20)
    update = threading.Thread(target=receiver.receive, args=(message,), daemon=True)
    update.start()
    update.join(0.2)
    assert update.is_alive() and receiver.version == 0
    go.set()
    forward.join(20), update.join(20)
    assert receiver.version == 1
    assert torch.equal(outputs[0], built(EveryLayer)(x))


@pytest.mark.parametrize("kind", ["qwen3_moe", "vit"])
def test_names_of_a_checkpoint_are_sent_as_transformers_stores_them(tmp_path, kind):
    """A matrix for each expert, or names of an earlier transformers, where the model has others."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            head_dim=8,
            vocab_size=40,
            num_key_value_heads=1,
            **sizes,
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **sizes))
    model.save_pretrained(tmp_path / "base")
    sprand.apply(model, density=0.3, target_modules=None, target_parameters=[name for name, _ in model.named_parameters()])
    sync, copy = DeltaSync(model, checkpoint=tmp_path / "base"), tensors_of(tmp_path / "base")
    for p in sprand.parameters(model):
        p.data.normal_()
    sync.indices()
    for patch in sync.patches():
        assert torch.equal(copy[patch.name].view(-1)[patch.indices.long()], patch.base)
        copy[patch.name].view(-1)[patch.indices.long()] = patch.values
    sprand.merge(model).save_pretrained(tmp_path / "tuned")
    assert_same(copy, tensors_of(tmp_path / "tuned"))


def test_a_peft_model_is_followed(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from sprand.integrations import vllm
    from sprand.peft import SprandConfig

    base = llama(tmp_path, torch.bfloat16)
    load = transformers.LlamaForCausalLM.from_pretrained
    model = peft.get_peft_model(load(base, dtype=torch.bfloat16), SprandConfig(density=0.1))
    sync, receiver = DeltaSync(model, checkpoint=base), DeltaReceiver(copied := load(base, dtype=torch.bfloat16))
    receiver.receive(sync.indices())
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.1)
    receiver.receive(sync.values())
    assert {patch.name for patch in vllm.sparse_patches(sync.patches())} <= set(copied.state_dict())
    assert sync.dense_bytes == sum(p.nbytes for p in copied.parameters())
    assert_same_bits(bits(copied), bits(copy.deepcopy(model).merge_and_unload()))
    model.merge_adapter()
    assert receiver.receive(sync.values()) == 2
    assert_same_bits(bits(copied), bits(model.merge_and_unload()))


@pytest.mark.parametrize("door", ["apply", "peft"])
def test_a_tied_weight_is_sent_once_and_moves_both_layers(door):
    fields = {"density": 0.2, "target_modules": ["mix", "out"]}
    if door == "apply":
        model = sprand.apply(built(Tied), **fields)
    else:
        peft = pytest.importorskip("peft")
        from sprand.peft import SprandConfig

        model = peft.get_peft_model(built(Tied), SprandConfig(**fields))
    sync, receiver = DeltaSync(model), DeltaReceiver(copied := built(Tied))
    receiver.receive(sync.indices())
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.1)
    receiver.receive(sync.values())
    assert sorted(patch.name for patch in sync.patches()) == ["embed.weight", "mix.weight"]
    tokens = torch.arange(20).reshape(4, 5)
    assert copied.out.weight is copied.embed.weight
    assert torch.equal(copied(tokens), model(tokens))
    assert not torch.equal(copied(tokens), built(Tied)(tokens))


@pytest.mark.parametrize("kind", ["shira", "supertuning"])
def test_an_accelerated_model_of_peft_is_followed(kind):
    pytest.importorskip("peft"), pytest.importorskip("transformers")
    import peft_models
    from sprand.peft import accelerate

    fields = {"shira": {"r": 2, "random_seed": 1}, "supertuning": {"sparsity": 0.9}}[kind]
    config = {"shira": peft_models.peft.ShiraConfig, "supertuning": peft_models.peft.SupertuningConfig}[kind]
    targets = {"target_modules": ["q_proj", "down_proj"]}
    model = accelerate(peft_models.peft.get_peft_model(peft_models.llama(), config(**targets, **fields)))
    peft_models.train(model, torch.optim.AdamW(peft_models.trainable(model), lr=1e-2))
    sync, receiver = DeltaSync(model), DeltaReceiver(copied := peft_models.llama())
    receiver.receive(sync.indices())
    receiver.receive(sync.values())
    assert torch.equal(peft_models.logits(copied), peft_models.logits(model))
    assert not torch.equal(peft_models.logits(copied), peft_models.logits(peft_models.llama()))
