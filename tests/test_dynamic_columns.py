"""Columns that move while a model trains: against a literal reference, resumed, saved, on two ranks, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import ranks
import sprand
from dynamic_masks import OPTIMIZERS, Reference, train
from models import MLP, EveryLayer, assert_same_bits, bits, built, points_and_labels, tokens_and_labels
from sprand.adapters.file import AdapterFile
from test_columns_choice import columns_of, gpt2

FIELDS = {"density": 0.3, "layout": "columns"}
OPTIONS = {"every": 4, "fraction": 0.4, "steps": 3}


class ColumnReference(Reference):
    """Scores are those of each example's own dense gradient; a column is exchanged entry by entry."""

    def columns(self, name):
        width = self.model.get_parameter(name).shape[1]
        return width, sorted({position % width for position in self.delta[name]})

    def collect(self, seed):
        for x, y in zip(*points_and_labels(seed, torch.float64), strict=True):
            leaves = self.leaves()
            F.cross_entropy(torch.func.functional_call(self.model, leaves, (x[None],)), y[None]).backward()
            for name in self.delta:
                self.sums[name] = self.sums.get(name, 0.0) + leaves[name].grad.square().sum(0)

    def exchange(self, fraction):
        for name, delta in self.delta.items():
            width, held = self.columns(name)
            count = min(round(fraction * len(held)), width - len(held))
            rows = range(len(self.weights[name]) // width)
            moved = {j: sum(abs(delta[i * width + j] - self.anchor[name][i * width + j]) for i in rows) for j in held}
            dropped = sorted(held, key=lambda j: (moved[j], j))[:count]
            free = [j for j in range(width) if j not in held]
            grown = sorted(free, key=lambda j: (-float(self.sums[name][j]), j))[:count]
            for row in rows:
                for j in dropped:
                    del delta[row * width + j], self.moments[name][row * width + j]
                for j in grown:
                    delta[row * width + j], self.moments[name][row * width + j] = 0.0, (0.0, 0.0)
            self.anchor[name] = dict(delta)
        self.sums = {}


def moving(cls=MLP, optimizer="AdamW", dtype=torch.float32, fields=FIELDS, **options):
    model = sprand.apply(built(cls).to(dtype), **fields)
    optimizer = OPTIMIZERS[optimizer](model)
    return model, optimizer, sprand.DynamicMask(model, optimizer, **OPTIONS | options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moving_columns_are_those_of_the_reference(optimizer):
    model, optimizer, mask = moving(optimizer=optimizer, dtype=torch.float64)
    active = {name: indices.tolist() for name, indices in model._sprand.current.indices.items()}
    reference = ColumnReference(built(MLP).double(), active)
    for count in range(1, 25):
        if (count - 1) % 4 >= 1:
            reference.collect(count - 1)
        reference.step(count, False, None)
        if count % 4 == 0:
            reference.exchange(0.4)
        train(model, optimizer, mask, 1, start=count - 1)
        reference.check(model)
    assert mask.changes == 6
    for name, before in active.items():
        shape = model.get_parameter(name).shape
        now = columns_of(shape, 1, model._sprand.current.indices[name])
        assert len(now) == len(columns_of(shape, 1, torch.tensor(before))) and set(now) != {p % shape[1] for p in before}


@pytest.mark.parametrize("grow", ["gradient", "random"])
@pytest.mark.parametrize("stop", [4, 6, 7])
def test_resume_equals_never_stopped(grow, stop):
    model, optimizer, mask = moving(grow=grow)
    train(model, optimizer, mask, stop)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, mask)])
    resumed = moving(grow=grow)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    for parts in ((model, optimizer, mask), resumed):
        train(*parts, 9, start=stop)
    assert mask.changes == resumed[2].changes > 1
    assert_same_bits(model.state_dict(), resumed[0].state_dict())


def test_columns_that_are_dropped_go_back_to_their_base_and_the_rest_is_saved_by_number(tmp_path):
    model, optimizer, mask = moving()
    train(model, optimizer, mask, 13)
    base = bits(built(MLP))
    sprand.write(model)
    for name, indices in model._sprand.current.indices.items():
        kept = torch.ones(base[name].numel(), dtype=torch.bool).index_fill(0, indices.long(), False)
        assert torch.equal(model.get_parameter(name).detach().flatten()[kept], base[name].flatten()[kept])
    sprand.save(model, tmp_path)
    assert all(AdapterFile.read(tmp_path).columns(name)[0] == 1 for name in model._sprand.current.indices)
    assert_same_bits(bits(sprand.load(built(MLP), tmp_path)), bits(model))
    given = sprand.apply(built(MLP), strategy=sprand.Mask(model._sprand.current.indices, {n: v.shape for n, v in base.items()}))
    mask = sprand.DynamicMask(given, OPTIMIZERS["AdamW"](given), **OPTIONS)
    train(given, mask.optimizer, mask, 4)
    for name, indices in given._sprand.current.indices.items():
        assert columns_of(base[name].shape, 1, indices)
    sprand.unmerge(model)
    assert_same_bits(bits(model), base)


def test_rows_of_conv1d_move():
    model = sprand.apply(gpt2(), **FIELDS)
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    mask = sprand.DynamicMask(model, optimizer, every=2, fraction=0.3, steps=1)
    before = {name: value.clone() for name, value in model._sprand.current.indices.items()}
    tokens = torch.arange(24).reshape(3, 8)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        mask.step()
        optimizer.zero_grad()
    for name, indices in model._sprand.current.indices.items():
        shape = model.get_parameter(name).shape
        assert set(columns_of(shape, 0, indices)) != set(columns_of(shape, 0, before[name]))


def test_a_compiled_model_moves_the_same_columns():
    torch.compiler.reset()
    plain, compiled = moving(), moving()
    train(*plain, 8)
    compiled[0].compile(backend="aot_eager", fullgraph=True)
    train(*compiled, 8)
    assert_same_bits(dict(plain[0]._sprand.current.indices), dict(compiled[0]._sprand.current.indices))
    torch.compiler.reset()


def test_columns_of_other_layers_move_at_random_alone():
    fields = FIELDS | {"target_modules": ["embed", "linear"]}
    with pytest.raises(ValueError, match="embed.weight trains whole columns, and gradients grow those of linear layers alone"):
        moving(EveryLayer, fields=fields)
    model, optimizer, mask = moving(EveryLayer, fields=fields, grow="random", every=1, steps=1)
    before = columns_of((50, 32), 1, model.embed.sparse_entries().indices)
    x, y = tokens_and_labels()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert mask.step()
    after = columns_of((50, 32), 1, model.embed.sparse_entries().indices)
    assert len(after) == len(before) and len(set(before) - set(after)) == round(0.4 * len(before))


def test_columns_that_wait_do_not_move():
    with pytest.raises(ValueError, match="DynamicMask: the columns of this adapter are chosen at the first training forward"):
        moving(fields=FIELDS | {"strategy": "token_fisher"})


def test_without_gradients_nothing_moves():
    mask = moving()[2]
    for _ in range(3):
        mask.step()
    with pytest.raises(RuntimeError, match="no gradient was seen in the 3 steps before this change"):
        mask.step()


def ranks_move_columns_as_one_process(rank, folder):
    alone, parted = moving(dtype=torch.float64), moving(dtype=torch.float64)
    wrapped = DistributedDataParallel(parted[0])
    for seed in range(8):
        x, y = points_and_labels(seed, torch.float64)
        half = slice(16 * rank, 16 * rank + 16)
        for called, (_, optimizer, mask), rows in ((alone[0], alone, slice(None)), (wrapped, parted, half)):
            F.cross_entropy(called(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            mask.step()
    assert_same_bits(dict(parted[0]._sprand.current.indices), dict(alone[0]._sprand.current.indices))
    for one, other in zip(sprand.parameters(parted[0]), sprand.parameters(alone[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


test_two_ranks = ranks.test_of([ranks_move_columns_as_one_process])
