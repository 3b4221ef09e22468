"""Columns that are chosen by gradients of the first steps of training, in which nothing moves: by which, and what they leave."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import sprand
from models import MLP, assert_same_bits, bits, built
from peft_models import peft, positions, trainable
from sprand.peft import SprandConfig
from test_columns_choice import columns_of, gpt2
from test_columns_waiting import MODELS, batches_of, indices_of, loss_of, parts

FIELDS = {"strategy": "token_fisher", "layout": "columns", "density": 0.3, "score_steps": 3}
STEPS = FIELDS["score_steps"]
TARGETS = ("first.weight", "second.weight", "third.weight")


def scores(examples):
    """Of each weight's columns, by dense gradients in float64, of one example at a time: each is one token."""
    model = built(MLP).double()
    totals = {name: torch.zeros(model.get_parameter(name).shape[1], dtype=torch.float64) for name in TARGETS}
    for x, y in examples:
        grads = torch.autograd.grad(F.cross_entropy(model(x[None].double()), y[None]), [model.get_parameter(n) for n in TARGETS])
        for name, grad in zip(TARGETS, grads, strict=True):
            totals[name] += grad.square().sum(0)
    return totals


def assert_largest(model, examples):
    """The columns that train are those with the largest scores."""
    for name, total in scores(examples).items():
        columns = columns_of(built(MLP).get_parameter(name).shape, 1, indices_of(model)[name])
        assert set(columns) == set(total.topk(len(columns)).indices.tolist()), name


def applied(model, **fields):
    return sprand.apply(model, **FIELDS | fields).train()


def wrapped(model, **fields):
    return peft.get_peft_model(model, SprandConfig(**FIELDS | fields)).train()


DOORS = {"apply": applied, "peft": wrapped}


def adamw(model):
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def step(model, optimizer, batch):
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def examples_of(batches):
    return [pair for x, y in batches for pair in zip(x, y, strict=True)]


def without_dropout():
    model = gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("kind", ["mlp", "llama", "gpt2"])
@pytest.mark.parametrize("door", DOORS)
def test_training_is_that_of_the_columns_of_data(door, kind, caplog):
    """Of the batches of the first steps; from there on to the bit, as if it began there."""
    make = MODELS[kind] if kind != "gpt2" else without_dropout
    batches = batches_of(make())[:STEPS]
    fields = {name: value for name, value in FIELDS.items() if name != "score_steps"}
    loss_fn = loss_of if kind == "mlp" else None
    mask = sprand.select(make(), **fields, data=batches, loss_fn=loss_fn)
    given = sprand.apply(make(), strategy=mask) if door == "apply" else peft.get_peft_model(make(), SprandConfig(mask=mask))
    model = DOORS[door](make())
    optimizer, other = adamw(model), adamw(given.train())
    before, drawn = {name: p.clone() for name, p in model.named_parameters()}, copy.deepcopy(indices_of(model))
    with caplog.at_level(logging.INFO, "sprand"):
        for batch in batches:
            assert_same_bits(indices_of(model), drawn)
            step(model, optimizer, batch)
            assert not optimizer.state
    assert_same_bits(indices_of(model), dict(mask))
    assert_same_bits({name: p.detach() for name, p in model.named_parameters()}, before)
    said = [record.getMessage() for record in caplog.records if record.name == "sprand"]
    columns = sum(len(columns_of(mask.shapes[name], int(kind != "gpt2"), indices)) for name, indices in mask.items())
    assert said == [
        f"{columns} columns of {len(mask)} weights were chosen by the gradients of the first 3 steps, in which nothing trained"
    ]
    for batch in batches:
        step(model, optimizer, batch), step(given, other, batch)
    for one, two in zip(trainable(model), trainable(given), strict=True):
        assert torch.equal(one, two) and one.any()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("door", DOORS)
def test_the_columns_have_the_largest_gradients_example_by_example(door):
    """Steps of unlike sizes, one of them in two parts, whose losses are means over the step."""
    model = DOORS[door](built(MLP), modules_to_save=["third"], exclude_modules=["third"])
    head = {name: p.clone() for name, p in model.named_parameters() if "third" in name}
    optimizer, batches = adamw(model), parts()
    sizes = [(8,), (4, 2), (3,)]
    used = []
    for (x, y), split in zip(batches, sizes, strict=False):
        rows = list(zip(x[: sum(split)].split(split), y[: sum(split)].split(split), strict=True))
        for part, labels in rows:
            (F.cross_entropy(model(part), labels, reduction="sum") / sum(split)).backward()
        used += examples_of(rows)
        optimizer.step()
        optimizer.zero_grad()
    exact = scores(used)
    for name in TARGETS[:2]:
        columns = columns_of(built(MLP).get_parameter(name).shape, 1, indices_of(model)[name])
        assert columns and set(columns) == set(exact[name].topk(len(columns)).indices.tolist())
    assert not optimizer.state
    assert_same_bits({name: p.detach() for name, p in model.named_parameters() if "third" in name}, head)


class Checkpointed(MLP):
    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.third(checkpoint(lambda value: torch.tanh(self.second(value)), hidden, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_counted_once(reentrant):
    Checkpointed.reentrant = reentrant
    model = applied(built(Checkpointed))
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    for batch in parts()[:STEPS]:
        step(model, optimizer, batch)
    assert_largest(model, examples_of(parts()[:STEPS]))


class Reused(MLP):
    """Calls a layer twice, and changes outputs in place."""

    def forward(self, x):
        hidden = self.second(self.first(x).relu_()).tanh_()
        return self.third(self.second(hidden).relu_())


def test_a_layer_may_be_called_twice_and_its_output_changed():
    fields = {name: value for name, value in FIELDS.items() if name != "score_steps"}
    mask = sprand.select(built(Reused), **fields, data=parts()[:STEPS], loss_fn=loss_of)
    model = applied(built(Reused))
    optimizer = adamw(model)
    for batch in parts()[:STEPS]:
        step(model, optimizer, batch)
    assert_same_bits(indices_of(model), dict(mask))


@pytest.mark.parametrize("door", DOORS)
def test_compiled_models_choose_the_same(door):
    torch.compiler.reset()
    model = DOORS[door](built(MLP))
    optimizer, compiled = adamw(model), torch.compile(model, backend="aot_eager")
    for batch in parts()[:STEPS]:
        step(compiled, optimizer, batch)
    assert_largest(model, examples_of(parts()[:STEPS]))
    step(compiled, optimizer, parts()[3])
    assert all(p.any() for p in trainable(model))
    torch.compiler.reset()


def test_a_whole_graph_says_what_to_do():
    torch.compiler.reset()
    model = applied(built(MLP))
    compiled = torch.compile(wrapped(built(MLP)), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"call sprand.choose\(model, batch\) first"):
        compiled(parts()[0][0])
    sprand.choose(model, parts()[1], loss_of)
    assert_largest(model, examples_of(parts()[1:2]))
    torch.compile(model, backend="aot_eager", fullgraph=True)(parts()[0][0]).square().mean().backward()
    assert all(p.grad.any() for p in trainable(model))
    torch.compiler.reset()


def test_several_optimizers_in_turn_make_one_step():
    model = applied(built(MLP))
    optimizers = [torch.optim.AdamW([p], lr=1e-2) for p in trainable(model)]
    for number, batch in enumerate(parts()):
        loss_of(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            assert bool(optimizer.state) == (number == STEPS)
        model.zero_grad()
    assert_largest(model, examples_of(parts()[:STEPS]))


def test_another_model_trains_meanwhile():
    model, other = applied(built(MLP)), built(MLP, seed=1)
    one, two = adamw(model), torch.optim.SGD(other.parameters(), lr=0.1)
    loss_of(model, parts()[0]).backward()
    before = bits(other)
    step(other, two, parts()[0])
    assert all(not torch.equal(before[name], value) for name, value in bits(other).items())
    for batch in parts()[1:STEPS]:
        one.step()
        loss_of(model, batch).backward()
    one.step()
    assert_largest(model, examples_of(parts()[:STEPS]))


def test_an_evaluation_in_between_counts_for_nothing():
    model = applied(built(MLP))
    optimizer = adamw(model)
    for batch in parts()[:STEPS]:
        step(model, optimizer, batch)
        with torch.no_grad():
            model.eval()(parts()[3][0])
        model.train()
    assert_largest(model, examples_of(parts()[:STEPS]))


@pytest.mark.parametrize("door", DOORS)
def test_a_copy_goes_on_by_itself(door):
    model = DOORS[door](built(MLP))
    step(model, adamw(model), parts()[0])
    copied = copy.deepcopy(model)
    for each, rest in ((copied, parts()[1:3]), (model, parts()[2:4])):
        optimizer = adamw(each)
        for batch in rest:
            step(each, optimizer, batch)
        assert_largest(each, examples_of([parts()[0], *rest]))


@pytest.mark.parametrize("door", DOORS)
def test_nothing_is_saved_before_the_choice_and_a_run_is_resumed_after(door, tmp_path):
    def save(model, folder):
        return sprand.save(model, folder) if door == "apply" else model.save_pretrained(folder)

    model, resumed = DOORS[door](built(MLP)), DOORS[door](built(MLP))
    optimizer, other = adamw(model), adamw(resumed)
    for batch in parts()[: STEPS - 1]:
        step(model, optimizer, batch)
        with pytest.raises(ValueError, match="save: .* in the first steps where gradients choose|are being chosen in the first"):
            save(model, tmp_path / "early")
        with pytest.raises(ValueError, match="state_dict: the columns of this model are being chosen in the first steps"):
            model.state_dict()
    assert not (tmp_path / "early" / "adapter_model.safetensors").exists()
    step(model, optimizer, parts()[2])
    step(model, optimizer, parts()[3])
    if door == "apply":
        resumed.load_state_dict(model.state_dict())
    else:
        peft.set_peft_model_state_dict(resumed, peft.get_peft_model_state_dict(model))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, own in ((model, optimizer), (resumed, other)):
        step(each, own, parts()[0])
    assert_same_bits(indices_of(resumed), indices_of(model))
    assert all(map(torch.equal, trainable(model), trainable(resumed)))
    save(model, tmp_path / "adapter")
    if door == "apply":
        loaded = sprand.load(built(MLP), tmp_path / "adapter")
        assert_same_bits(dict(loaded._sprand.current.indices), indices_of(model))
        assert_same_bits(bits(sprand.merge(loaded)), bits(sprand.merge(model)))
    else:
        loaded = peft.PeftModel.from_pretrained(built(MLP), tmp_path / "adapter")
        assert_same_bits(positions(loaded), positions(model))
        assert_same_bits(bits(loaded.merge_and_unload()), bits(model.merge_and_unload()))


def test_an_adapter_that_is_set_aside_begins_again():
    model = applied(built(MLP))
    step(model, adamw(model), parts()[0])
    sprand.switch(model, None)
    sprand.switch(model, "default")
    sprand.apply(model, name="other", **FIELDS | {"seed": 1})
    for name, used in (("other", parts()[:3]), ("default", parts()[1:4])):
        sprand.switch(model, name)
        optimizer = adamw(model.train())
        for batch in used:
            step(model, optimizer, batch)
        assert_largest(model, examples_of(used))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_bases_choose_as_they_do_by_one_batch(kind):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantizes the base")
    from test_peft_quantized import quantized

    tokens = torch.arange(24).reshape(3, 8) % 19
    batch = {"input_ids": tokens, "labels": tokens}
    model, other = (wrapped(quantized(kind), score_steps=1) for _ in range(2))
    sprand.choose(other, batch)
    before = positions(model)
    step(model, adamw(model), batch)
    assert any(not torch.equal(value, before[name]) for name, value in positions(model).items())
    assert_same_bits(positions(model), positions(other))


@pytest.mark.parametrize("door", DOORS)
def test_an_adapter_trains_while_another_one_waits(door):
    model = DOORS[door](built(MLP))
    if door == "apply":
        sprand.apply(model, name="other", **FIELDS | {"seed": 1})
        sprand.switch(model, "default")
    else:
        model.add_adapter("other", SprandConfig(**FIELDS, seed=1))
    optimizer = adamw(model.train())
    for batch in parts():
        step(model, optimizer, batch)
    assert_largest(model, examples_of(parts()[:STEPS]))
    assert all(p.any() for p in trainable(model))


def scaled(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, parts()[0])).backward()
    scaler.step(optimizer)


def with_closure(model, optimizer):
    loss_of(model, parts()[0]).backward()
    optimizer.step(lambda: loss_of(model, parts()[0]))


def inside_of_backward(model, optimizer):
    trainable(model)[0].register_post_accumulate_grad_hook(lambda p: optimizer.step())
    loss_of(model, parts()[0]).backward()


def by_hand(model, optimizer):
    for _ in range(2):
        loss_of(model, parts()[0]).backward()
        with torch.no_grad():
            for p in trainable(model):
                p -= 0.1 * p.grad


REFUSED = {
    scaled: "gradients that a GradScaler, or DeepSpeed, has scaled, cannot be summed; call sprand.choose",
    with_closure: "a step with a closure, which makes its gradients inside, cannot be summed",
    inside_of_backward: "a step inside of backward, cannot be summed",
    by_hand: "first.weight: its entries changed before its columns were chosen, by a step that is none of torch.optim",
}


@pytest.mark.parametrize("kind", ["AdamW", "SparseAdamW"])
@pytest.mark.parametrize(("train", "message"), REFUSED.items(), ids=[train.__name__ for train in REFUSED])
def test_steps_that_cannot_be_summed_are_refused(train, message, kind):
    model = applied(built(MLP))
    optimizer = adamw(model) if kind == "AdamW" else sprand.SparseAdamW(model, lr=1e-2)
    with pytest.raises(ValueError, match=message):
        train(model, optimizer)
    assert not optimizer.state
    sprand.unmerge(model)
    assert_same_bits(bits(model), bits(built(MLP)))


def test_a_scaler_that_is_off_is_none():
    model, scaler = applied(built(MLP)), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = adamw(model)
    for batch in parts()[:STEPS]:
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_largest(model, examples_of(parts()[:STEPS]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score_steps": 0}, "score_steps: expected at least 1 step, got 0"),
        ({"score_steps": True}, "score_steps: expected at least 1 step, got True"),
        ({"strategy": "activation"}, "score_steps: it is of strategy 'token_fisher' without data"),
        ({"scope": "global"}, "without data chooses while the model trains, .* leave out scope='global'"),
        ({"strategy": "gradient", "score_steps": None}, "'gradient' needs data to calibrate on"),
    ],
)
def test_bad_input_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        sprand.apply(built(MLP), **FIELDS | fields)
