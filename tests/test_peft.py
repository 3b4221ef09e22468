"""SprandConfig as a PEFT method: the same entries and bits as sprand.apply, any optimizer, switching, merging, tied weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sprand
from models import MLP, EveryLayer, Tied, assert_same_bits, bits, built, points_and_labels, tokens_and_labels
from peft_models import adapted, base_weights, deltas, llama, logits, peft, positions, train, trainable
from sprand.peft import SprandConfig, SprandLayer


@pytest.mark.parametrize(
    "fields",
    [{"density": 0.1}, {"budget": 333}, {"budget": 0.02}, {"strategy": "uniform"}, {"layout": "columns", "density": 0.2}],
)
def test_both_doors_choose_the_same_entries(fields):
    ours, theirs = llama(), llama()
    sprand.apply(ours, seed=7, **fields)
    wrapped = peft.get_peft_model(theirs, SprandConfig(seed=7, **fields))
    assert_same_bits(positions(wrapped), dict(ours._sprand.current.indices))
    wrapped.add_adapter("second", SprandConfig(seed=7, **fields))
    assert_same_bits(positions(wrapped, "second"), positions(wrapped))


@pytest.mark.parametrize("optimizer", [sprand.SparseAdamW, torch.optim.AdamW])
def test_both_doors_train_the_same_bits(optimizer):
    ours, theirs = sprand.apply(llama(), density=0.1), peft.get_peft_model(llama(), SprandConfig(density=0.1))
    first, second = optimizer(trainable(ours), lr=1e-2), optimizer(trainable(theirs), lr=1e-2)
    assert train(ours, first, 4) == train(theirs, second, 4)
    assert torch.equal(logits(ours), logits(theirs))
    next(m for m in theirs.modules() if isinstance(m, SprandLayer)).sprand_refresh()
    weights = bits(ours)
    assert_same_bits(
        {name: value for name, value in base_weights(theirs).items()}, {name: weights[name] for name in base_weights(theirs)}
    )


def test_the_fused_optimizer_is_fused(monkeypatch):
    model = peft.get_peft_model(llama(), SprandConfig(density=0.1))
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    monkeypatch.setattr(
        optimizer, "_dense_step", lambda params, *rest: pytest.fail("a delta took the dense step") if params else None
    )
    train(model, optimizer, 2)


@pytest.mark.parametrize("fused", [True, False, "sgd"])
def test_other_optimizers_train_the_same_losses(fused):
    losses = []
    for door in (lambda: sprand.apply(llama(), density=0.1), lambda: peft.get_peft_model(llama(), SprandConfig(density=0.1))):
        model = door()
        kind = torch.optim.SGD if fused == "sgd" else torch.optim.AdamW
        losses.append(train(model, kind(trainable(model), lr=1e-2, **({} if fused == "sgd" else {"fused": fused})), 4))
    assert losses[0] == losses[1]


def test_print_trainable_parameters_counts_the_entries(capsys):
    peft.get_peft_model(llama(), SprandConfig(budget=500)).print_trainable_parameters()
    assert "trainable params: 500 ||" in capsys.readouterr().out


def test_disabled_is_the_base_bit_for_bit_and_back():
    base, model = logits(llama()), adapted()
    trained = logits(model)
    assert not torch.equal(base, trained)
    with model.disable_adapter():
        assert_same_bits(base_weights(model), {name: value for name, value in base_weights(llama()).items()})
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), trained)
    assert all(p.requires_grad for name, p in model.named_parameters() if "sprand_delta" in name)


def test_fifty_merges_and_unmerges_change_no_bit():
    model = adapted(model=llama().bfloat16())
    trained, base = logits(model), base_weights(llama().bfloat16())
    merged = None
    for _ in range(50):
        model.merge_adapter()
        merged = base_weights(model) if merged is None else merged
        assert_same_bits(base_weights(model), merged)
        assert torch.equal(logits(model), trained)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert_same_bits(base_weights(model), base)
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("safe_merge", [True, False])
def test_merge_and_unload_leaves_the_model_class_and_the_trained_weights(safe_merge):
    model = adapted()
    trained, before = logits(model), llama()
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert [(name, type(module)) for name, module in merged.named_modules()] == [
        (name, type(module)) for name, module in before.named_modules()
    ]
    assert torch.equal(logits(merged), trained)
    assert merged.state_dict().keys() == before.state_dict().keys()


def test_unload_gives_the_base_back():
    base = adapted().unload()
    assert_same_bits(dict(base.state_dict()), dict(llama().state_dict()))
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear


def test_safe_merge_refuses_what_is_not_finite():
    model = adapted()
    next(p for p in model.parameters() if p.requires_grad).data[0] = float("inf")
    with pytest.raises(ValueError, match="would not be finite"):
        model.merge_adapter(safe_merge=True)


def test_adapters_are_switched_and_deleted():
    model = adapted(seed=1)
    first = logits(model)
    model.add_adapter("second", SprandConfig(density=0.05, seed=2, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("second")
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 2)
    second = logits(model.eval())
    assert not torch.equal(first, second)
    for _ in range(3):
        model.set_adapter("default")
        assert torch.equal(logits(model), first)
        model.set_adapter("second")
        assert torch.equal(logits(model), second)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert "second" not in model.peft_config


def test_two_active_adapters_are_summed_in_float32_and_rounded_once():
    model = adapted(seed=1, model=llama().bfloat16())
    model.add_adapter("second", SprandConfig(density=0.1, seed=2))
    model.set_adapter("second")
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 2)
    model.base_model.set_adapter(["default", "second"])
    base, found, own = base_weights(llama().bfloat16()), base_weights(model), positions(model)
    for name, delta in deltas(model).items():
        total = torch.zeros(base[name].numel())
        total[own[name].long()] += delta
        total[positions(model, "second")[name].long()] += deltas(model, "second")[name]
        expected = (base[name].flatten().float() + total).bfloat16()
        untouched = total == 0
        expected[untouched] = base[name].flatten()[untouched]
        assert torch.equal(found[name].flatten(), expected), name
    before = {name: (deltas(model)[name], deltas(model, "second")[name]) for name in own}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, 1)
    for name, (first, second) in before.items():
        assert not torch.equal(first, deltas(model)[name]) and not torch.equal(second, deltas(model, "second")[name])
    trained = logits(model.eval())
    model.merge_adapter()
    assert torch.equal(logits(model), trained)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_same_bits(base_weights(model), base)


def test_gradients_of_two_active_adapters_are_those_of_the_dense_weight():
    model = peft.get_peft_model(built(MLP).double(), SprandConfig(density=0.3, seed=1, target_modules=["second"]))
    model.add_adapter("other", SprandConfig(density=0.3, seed=2, target_modules=["second"]))
    model.base_model.set_adapter(["default", "other"])
    x, y = points_and_labels(dtype=torch.float64)
    nn.functional.cross_entropy(model(x), y).backward()
    dense = built(MLP).double()
    nn.functional.cross_entropy(dense(x), y).backward()
    target = model.base_model.model.second.sprand_targets["weight"]
    for name in ("default", "other"):
        expected = dense.second.weight.grad.flatten()[target.indices[name].long()]
        torch.testing.assert_close(target.deltas[name].grad.double(), expected)


def test_every_kind_of_parameter_trains_as_by_apply():
    fields = {
        "target_modules": ["embed", "linear", "conv"],
        "target_parameters": ["linear.bias", "norm.weight", "norm.bias", "rnn.weight_ih_l0"],
        "density": 0.2,
    }
    ours = sprand.apply(built(EveryLayer), **fields)
    theirs = peft.get_peft_model(built(EveryLayer), SprandConfig(**fields))
    assert_same_bits(positions(theirs), dict(ours._sprand.current.indices))
    tokens, labels = tokens_and_labels()
    for model in (ours, theirs):
        optimizer = sprand.SparseAdamW(model, lr=1e-2)
        for _ in range(3):
            nn.functional.cross_entropy(model(tokens), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        assert torch.equal(ours(tokens), theirs(tokens))
    assert_same_bits(deltas(theirs), {name: d.detach() for name, d in ours._sprand.current.deltas.items()})
    assert torch.equal(ours(tokens), theirs.merge_and_unload()(tokens))


def test_fused_experts_are_named_as_target_parameters():
    transformers = pytest.importorskip("transformers", reason="a mixture of experts is made by transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
        num_local_experts=4, max_position_embeddings=32,
    )  # fmt: skip
    base = transformers.MixtralForCausalLM(config).eval()
    before = logits(base)
    with pytest.raises(ValueError, match=r"target_parameters=\['experts.gate_up_proj', 'experts.down_proj'\]"):
        peft.get_peft_model(base, SprandConfig(target_modules=["experts"]))
    model = peft.get_peft_model(
        base, SprandConfig(target_modules=None, target_parameters=["experts.gate_up_proj", "experts.down_proj"], density=0.05)
    )
    assert torch.equal(logits(model), before)
    train(model, sprand.SparseAdamW(model, lr=1e-2), 3)
    trained = logits(model.eval())
    assert not torch.equal(trained, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.merge_and_unload()), trained)


def test_a_tied_weight_has_one_delta_that_both_layers_train():
    tokens = torch.arange(20).reshape(4, 5)
    ours = sprand.apply(built(Tied), density=0.2, target_modules=["embed", "mix"])
    theirs = peft.get_peft_model(built(Tied), SprandConfig(density=0.2, target_modules=["embed", "mix", "out"]))
    for model in (ours, theirs):
        optimizer = sprand.SparseAdamW(model, lr=1e-2)
        for _ in range(3):
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(ours(tokens), theirs(tokens))
    merged = theirs.merge_and_unload()
    assert merged.out.weight is merged.embed.weight and type(merged.out) is nn.Linear
    assert torch.equal(ours(tokens), merged(tokens))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(copied):
    model = adapted()
    twin = copied(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    train(twin, sprand.SparseAdamW(twin, lr=1e-2), 2)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)


def test_state_dict_holds_the_base_and_goes_into_another_model():
    model = adapted()
    trained, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    base = llama().state_dict()
    for name, value in state.items():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert own not in base or torch.equal(value, base[own])
    other = peft.get_peft_model(llama(seed=5), SprandConfig(density=0.1))
    logits(other)
    other.load_state_dict(state)
    assert torch.equal(logits(other), trained)
    with other.disable_adapter():
        assert torch.equal(logits(other), logits(llama()))


def test_deltas_that_others_cast_to_bfloat16_still_train():
    model = peft.get_peft_model(llama().bfloat16(), SprandConfig(density=0.1))
    assert all(p.dtype == torch.float32 for p in trainable(model))
    for p in trainable(model):
        p.data = p.data.bfloat16()
    before = deltas(model)
    train(model, sprand.SparseAdamW(model, lr=1e-3), 3)
    for name, delta in deltas(model).items():
        assert delta.dtype == torch.bfloat16 and (delta != before[name]).float().mean() > 0.9


def test_a_cast_model_keeps_float32_deltas_and_an_exact_base():
    model = adapted()
    logits(model)
    model.bfloat16()
    assert all(p.dtype == torch.float32 for p in trainable(model))
    with model.disable_adapter():
        assert_same_bits(base_weights(model), base_weights(llama().bfloat16()))


def test_the_config_of_the_user_is_not_changed_and_a_missing_seed_is_drawn_once():
    config = SprandConfig(density=0.1, seed=None)
    assert isinstance(config.seed, int) and config.seed != SprandConfig(density=0.1, seed=None).seed
    first, second = peft.get_peft_model(llama(), config), peft.get_peft_model(llama(seed=3), config)
    assert_same_bits(positions(first), positions(second))
    assert config.target_modules == "all-linear" and config.targets is None
    first.add_adapter("ref", first.peft_config["default"])
    assert_same_bits(positions(first, "ref"), positions(first))


def test_ddp_broadcasts_neither_indices_nor_base():
    model = adapted(target_parameters=["embed_tokens.weight"])
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    sprand_buffers = {name for name, _ in model.named_buffers() if "sprand" in name}
    assert ignored == sprand_buffers and ignored


def test_gradient_checkpointing_and_a_reference_forward_before_backward():
    plain, checked = (peft.get_peft_model(llama(), SprandConfig(density=0.1)) for _ in range(2))
    checked.get_base_model().gradient_checkpointing_enable()
    checked.enable_input_require_grads()
    checked.train()
    tokens = torch.arange(12)[None]
    for model in (plain, checked):
        for p in trainable(model):
            p.data.normal_(0, 1e-2, generator=torch.Generator().manual_seed(1))
        loss = model(input_ids=tokens, labels=tokens).loss
        with model.disable_adapter(), torch.no_grad():
            model(input_ids=tokens)
        loss.backward()
    for a, b in zip(trainable(plain), trainable(checked), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_layers_to_transform_and_excluded_modules():
    model = peft.get_peft_model(
        llama(), SprandConfig(target_modules=["q_proj", "k_proj"], layers_to_transform=[1], exclude_modules=["k_proj"])
    )
    assert list(positions(model)) == ["model.layers.1.self_attn.q_proj.weight"]


def test_an_adapter_is_copied_by_its_parameter_names():
    model = adapted()
    trained = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, p in model.named_parameters():  # as TRL makes the reference of a trained adapter
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(p.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model), trained)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()


def applied(model: nn.Module) -> nn.Module:
    return sprand.apply(model, density=0.1, target_modules=["linear1"])


def wrapped_twice(model: nn.Module) -> nn.Module:
    wrapped = peft.get_peft_model(model, SprandConfig(density=0.1, target_modules=["linear1"]))
    wrapped.add_adapter("second", SprandConfig(density=0.2, target_modules=["linear2"]))
    return wrapped


def accelerated(model: nn.Module) -> nn.Module:
    return sprand.peft.accelerate(peft.get_peft_model(model, peft.ShiraConfig(r=2, target_modules=["linear1"])))


@pytest.mark.parametrize("enter", [applied, wrapped_twice, accelerated])
def test_an_inference_path_that_reads_weights_itself_sees_what_was_trained(enter, monkeypatch):
    """That of `TransformerEncoderLayer`, which is taken where no gradient is wanted."""
    model, x, taken = encoder().double(), torch.randn(2, 3, 16, dtype=torch.float64), []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: taken.append("fast") or fast(*args))
    with torch.no_grad():
        base = model(x)
    entered = enter(model)
    for p in trainable(entered):
        p.data.normal_()
    taken.clear()
    with torch.no_grad():
        trained = entered(x)
    assert taken == ["fast"] and not torch.allclose(trained, base)
    torch.testing.assert_close(trained, entered(x), rtol=1e-10, atol=1e-12)
    assert taken == ["fast"]
