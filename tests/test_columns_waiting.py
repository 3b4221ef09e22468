"""Columns that wait for the first training forward: chosen by its batch alone, before anything trains, through both doors."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ranks
import sprand
from models import MLP, EveryLayer, assert_same_bits, bits, built, points_and_labels
from peft_models import llama, peft, positions, trainable
from sprand.adapters.file import AdapterFile
from sprand.peft import SprandConfig
from test_columns_choice import gpt2

FIELDS = {"strategy": "activation", "layout": "columns", "density": 0.3}


class Lively(MLP):
    """Dropout and a batch norm, and a layer that is computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(24), nn.Dropout(0.3)

    def forward(self, x):
        hidden = self.drop(self.norm(torch.tanh(self.first(x))))
        return self.third(checkpoint(lambda value: torch.tanh(self.second(value)), hidden, use_reentrant=False))


def parts():
    x, y = points_and_labels()
    return list(zip(x.split(8), y.split(8), strict=True))


def batches_of(model):
    if isinstance(model, MLP):
        return parts()
    tokens = torch.arange(72).reshape(9, 8) % 19
    return [{"input_ids": rows, "labels": rows} for rows in tokens.split(3)]


def loss_of(model, batch):
    return model(**batch).loss if isinstance(batch, dict) else F.cross_entropy(model(batch[0]), batch[1])


def trained(model, optimizer, steps=4, start=0):
    model.train()
    torch.manual_seed(7)
    for step in range(start, start + steps):
        batches = batches_of(model.get_base_model() if hasattr(model, "get_base_model") else model)
        loss_of(model, batches[step % len(batches)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def first_choice(model):
    """What `select` chooses by the first batch alone."""
    batch = batches_of(model)[0]
    return sprand.select(model, **FIELDS, data=[batch if isinstance(batch, dict) else batch[0]])


MODELS = {"mlp": lambda: built(MLP), "lively": lambda: built(Lively), "llama": llama, "gpt2": gpt2}


@pytest.mark.parametrize("kind", MODELS)
def test_training_is_that_of_the_columns_of_the_first_batch(kind):
    """To the bit: random states, running statistics and gradients are as if the choice had been made before."""
    make = MODELS[kind]
    waiting, given = sprand.apply(make(), **FIELDS), sprand.apply(make(), strategy=first_choice(make()))
    deltas = sprand.parameters(waiting)
    trained(waiting, sprand.SparseAdamW(waiting, lr=1e-2))
    trained(given, sprand.SparseAdamW(given, lr=1e-2))
    assert all(one is other for one, other in zip(deltas, sprand.parameters(waiting), strict=True))
    assert_same_bits(waiting._sprand.current.indices, given._sprand.current.indices)
    sprand.write(waiting), sprand.write(given)
    assert_same_bits(bits(waiting), bits(given))
    assert not waiting._forward_pre_hooks
    assert_same_bits(bits(sprand.unmerge(waiting)), bits(sprand.unmerge(given)))


@pytest.mark.parametrize("kind", ["mlp", "llama", "gpt2"])
def test_peft_trains_the_same(kind, tmp_path):
    make = MODELS[kind]
    waiting = peft.get_peft_model(make(), SprandConfig(**FIELDS))
    given = peft.get_peft_model(make(), SprandConfig(mask=first_choice(make())))
    for model in (waiting, given):
        trained(model, torch.optim.AdamW(trainable(model), lr=1e-2))
        model.save_pretrained(tmp_path / ("waiting" if model is waiting else "given"))
    assert_same_bits(positions(waiting), positions(given))
    one, other = (AdapterFile.read(tmp_path / name) for name in ("waiting", "given"))
    assert one.selection == other.selection == first_choice(make()).selection
    assert one.config == other.config
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "waiting")
    assert_same_bits(bits(loaded.merge_and_unload()), bits(given.merge_and_unload()))


def applied(model):
    return sprand.apply(model, **FIELDS)


def wrapped(model):
    return peft.get_peft_model(model, SprandConfig(**FIELDS))


DOORS = {"apply": applied, "peft": wrapped}


def indices_of(model):
    return positions(model) if hasattr(model, "peft_config") else dict(model._sprand.current.indices)


@pytest.mark.parametrize("door", DOORS)
def test_only_a_forward_that_trains_chooses(door, caplog):
    model, chosen = DOORS[door](built(MLP)), first_choice(built(MLP))
    before, x = {name: value.clone() for name, value in indices_of(model).items()}, parts()[0][0]
    model.eval()(parts()[1][0])
    with torch.no_grad():
        model.train()(parts()[1][0])
    assert_same_bits(indices_of(model), before)
    with caplog.at_level(logging.INFO, "sprand"):
        model(x)
    assert_same_bits(indices_of(model), dict(chosen))
    assert [record.getMessage() for record in caplog.records] == ["19 columns of 3 weights were chosen by what came into them"]
    model(parts()[1][0])
    assert_same_bits(indices_of(model), dict(chosen))


@pytest.mark.parametrize("door", DOORS)
def test_choose_does_it_by_a_batch_of_its_own(door):
    chosen = sprand.select(built(MLP), **FIELDS, data=[parts()[2][0]])
    for batch in (parts()[2][0], parts()[2]):
        model = DOORS[door](built(MLP))
        assert sprand.choose(model, batch) is model
        trained(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), 2)
        assert_same_bits(indices_of(model), dict(chosen))
        with pytest.raises(ValueError, match="choose: no columns of this model wait to be chosen"):
            sprand.choose(model, batch)


@pytest.mark.parametrize("door", DOORS)
def test_a_copy_chooses_for_itself(door):
    model = DOORS[door](built(MLP))
    copied = copy.deepcopy(model)
    copied.train()(parts()[1][0])
    assert_same_bits(indices_of(copied), dict(sprand.select(built(MLP), **FIELDS, data=[parts()[1][0]])))
    model.train()(parts()[0][0])
    assert_same_bits(indices_of(model), dict(first_choice(built(MLP))))


@pytest.mark.parametrize("door", DOORS)
def test_a_run_that_is_resumed_keeps_its_columns(door):
    """The first forward after a state was loaded is of another batch."""
    made = []
    for _ in range(2):
        model = DOORS[door](built(MLP))
        made.append((model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)))
    (model, optimizer), (resumed, other) = made
    trained(model, optimizer, 3)
    if door == "apply":
        resumed.load_state_dict(model.state_dict())
    else:
        peft.set_peft_model_state_dict(resumed, peft.get_peft_model_state_dict(model))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(model, optimizer, 3, start=3), trained(resumed, other, 3, start=3)
    assert_same_bits(indices_of(resumed), indices_of(model))
    assert not (resumed.get_base_model() if door == "peft" else resumed)._forward_pre_hooks
    deltas = [[p.detach() for p in each.parameters() if p.requires_grad] for each in (model, resumed)]
    assert all(map(torch.equal, *deltas))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models_choose_or_say_what_to_do(door, whole):
    torch.compiler.reset()
    model, (x, _) = DOORS[door](built(MLP)), parts()[0]
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=whole)
    if whole and door == "peft":  # what PEFT calls inside of its own forward is compiled with it
        with pytest.raises(Exception, match=r"call sprand.choose\(model, batch\) first"):
            compiled(x)
        sprand.choose(model, x)
    compiled(x).square().mean().backward()
    assert_same_bits(indices_of(model), dict(first_choice(built(MLP))))
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad.any() for grad in grads)
    torch.compiler.reset()


def test_of_two_adapters_each_chooses_where_it_is_active():
    model = wrapped(built(MLP))
    model.add_adapter("other", SprandConfig(**FIELDS, seed=1))
    model.train()(parts()[0][0])
    model.set_adapter("other")
    model(parts()[1][0])
    for name, number in (("default", 0), ("other", 1)):
        chosen = sprand.select(built(MLP), **FIELDS, data=[parts()[number][0]])
        assert_same_bits(positions(model, name), dict(chosen))
    with pytest.raises(ValueError, match="save: the columns of this adapter are chosen at the first training forward"):
        model.add_adapter("later", SprandConfig(**FIELDS, seed=2))
        peft.get_peft_model_state_dict(model, adapter_name="later")
    peft.get_peft_model_state_dict(model, adapter_name="default")


def test_a_quantized_base_chooses(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantizes the base")
    from test_peft_quantized import quantized

    model = peft.get_peft_model(quantized("nf4"), SprandConfig(**FIELDS))
    tokens = torch.arange(24).reshape(3, 8) % 19
    before = positions(model)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert any(not torch.equal(value, before[name]) for name, value in positions(model).items())
    model.save_pretrained(tmp_path)
    assert all(AdapterFile.read(tmp_path).columns(name)[0] == 1 for name in positions(model))
    loaded = peft.PeftModel.from_pretrained(quantized("nf4"), tmp_path)
    assert_same_bits(positions(loaded), positions(model))


def test_a_trainer_chooses_by_its_first_batch(tmp_path):
    from trainers import llama as small
    from trainers import trainer_of

    model = peft.get_peft_model(small(), SprandConfig(**FIELDS))
    trainer = trainer_of(model, tmp_path, max_steps=2, per_device_train_batch_size=16)
    trainer.train()
    rows = [row["input_ids"] for row in trainer.train_dataset]
    chosen = sprand.select(small(), **FIELDS, data=[{"input_ids": torch.stack(rows)}])  # one batch, whose order is of no matter
    assert_same_bits(positions(model), dict(chosen))


@pytest.mark.parametrize("door", DOORS)
def test_a_trainer_that_is_resumed_keeps_its_columns(tmp_path, door):
    import trainers

    fields = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    model, trainer = trainers.trained(tmp_path, DOORS[door](trainers.llama()), **fields)
    resume = str(tmp_path / "checkpoint-3")
    resumed, other = trainers.trained(tmp_path, DOORS[door](trainers.llama()), resume=resume, save_strategy="no", max_steps=6)
    assert_same_bits(indices_of(resumed), indices_of(model))
    assert_same_bits(trainers.everything(resumed, other), trainers.everything(model, trainer))


BAD = {
    "another score": (MLP, {"strategy": "gradient"}, "'gradient' needs data to calibrate on"),
    "another layout": (MLP, {"layout": "unstructured"}, "'activation' scores whole columns; give layout='columns'"),
    "global": (MLP, {"scope": "global"}, "without data chooses while the model trains, .* leave out scope='global'"),
    "disjoint": (MLP, {"disjoint": {"first.weight": torch.tensor([3])}}, "knows of no entries to leave out; leave out disjoint"),
    "an embedding": (EveryLayer, {"target_modules": ["embed"]}, "scores the inputs of linear layers, and embed.weight is in a"),
}  # fmt: skip


@pytest.mark.parametrize(("cls", "fields", "message"), BAD.values(), ids=BAD)
def test_what_cannot_wait_is_refused(cls, fields, message):
    model = built(cls)
    with pytest.raises(ValueError, match=message):
        sprand.apply(model, **FIELDS | fields)
    assert not hasattr(model, "_sprand") and not model._forward_pre_hooks


def test_what_waits_is_not_saved_and_can_be_taken_off(tmp_path):
    model = applied(built(MLP))
    with pytest.raises(ValueError, match="save: the columns of this adapter are chosen at the first training forward"):
        sprand.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    sprand.unmerge(model)
    assert_same_bits(bits(model), bits(built(MLP)))
    model.train()(parts()[0][0])
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="'activation' needs data"):
        sprand.select(built(MLP), **FIELDS)


class Unused(MLP):
    """Does not call its second layer."""

    def forward(self, x):
        return self.third(torch.tanh(self.first(x)))


def test_a_layer_that_is_not_called_is_named_before_anything_trains():
    model = applied(built(Unused))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="the layer of second.weight was not called on this data"):
        model.train()(parts()[0][0])
    assert_same_bits(model.state_dict(), before)


def ranks_agree_on_the_columns_of_all_their_rows(rank, folder):
    model = applied(built(MLP)).train()
    DistributedDataParallel(model)(parts()[rank][0]).square().mean().backward()
    rows = torch.cat([parts()[number][0] for number in range(ranks.WORLD)])
    assert_same_bits(dict(model._sprand.current.indices), dict(sprand.select(built(MLP), **FIELDS, data=[rows])))
    model = wrapped(built(MLP)).train()
    DistributedDataParallel(model)(parts()[rank][0]).square().mean().backward()
    assert_same_bits(positions(model), dict(sprand.select(built(MLP), **FIELDS, data=[rows])))


def a_layer_that_one_rank_calls_is_chosen_on_both(rank, folder):
    class Routed(MLP):
        def forward(self, x):
            hidden = torch.tanh(self.first(x))
            return self.third(torch.tanh(self.second(hidden)) if x[0, 0] > 0 else hidden)

    x = parts()[0][0]
    x[0, 0] = 1.0 if rank else -1.0
    model = applied(built(Routed)).train()
    model(x)
    mine = torch.cat(list(model._sprand.current.indices.values()))
    both = [torch.empty_like(mine) for _ in range(ranks.WORLD)]
    dist.all_gather(both, mine)
    assert torch.equal(both[0], both[1])


def sharded_models_choose_before(rank, folder):
    from torch.distributed.fsdp import fully_shard

    model = applied(built(MLP)).train()
    fully_shard(model)
    with pytest.raises(ValueError, match="the choice of columns: .* before the model is sharded call sprand.choose"):
        model(parts()[rank][0])
    model = sprand.choose(applied(built(MLP)).train(), parts()[rank][0])
    rows = torch.cat([parts()[number][0] for number in range(ranks.WORLD)])
    chosen = sprand.select(built(MLP), **FIELDS, data=[rows])
    fully_shard(model)
    model(parts()[rank][0]).square().mean().backward()
    assert_same_bits({name: entries.indices for name, entries in sprand_entries(model).items()}, dict(chosen))


def sprand_entries(model):
    return {site.name: site.entries for site in sprand.layers.sites.sites_of(model)}


test_two_ranks = ranks.test_of(
    [ranks_agree_on_the_columns_of_all_their_rows, a_layer_that_one_rank_calls_is_chosen_on_both, sharded_models_choose_before]
)
