"""Configurations compare by what they choose: masks by their entries, in lists, in dataclasses and as keys of a dict."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import sprand
from sprand.peft import SprandConfig

MASK = torch.tensor([[True, False, True], [False, False, True]])
SAME = {
    "the same tensor": MASK,
    "a copy": MASK.clone(),
    "indices": torch.tensor([0, 2, 5]),
    "indices of another type": torch.tensor([0, 2, 5], dtype=torch.int32),
    "indices in another order": torch.tensor([5, 0, 2]),
    "an array": np.array([0, 2, 5]),
}
OTHER = {
    "another entry": torch.tensor([0, 2, 4]),
    "fewer entries": torch.tensor([0, 2]),
    "no entries": torch.tensor([], dtype=torch.int64),
    "another shape": MASK.view(3, 2),
    "no values": torch.tensor([0, 2, 5], device="meta"),
}


def as_config(entries):
    return sprand.SparseConfig(strategy={"w": entries}, target_modules=["w"])


def as_peft_config(entries):
    return SprandConfig(mask={"w": entries})


def as_mask(entries):
    return sprand.Mask({"w": entries}, {"w": (2, 3)})


KINDS = pytest.mark.parametrize("made", [as_config, as_peft_config, as_mask])


@dataclasses.dataclass
class Run:
    name: str
    config: object


@KINDS
@pytest.mark.parametrize("entries", SAME.values(), ids=SAME)
def test_the_same_entries_are_equal_wherever_they_are_held(made, entries):
    first, second = made(MASK), made(entries)
    assert (first == second) is True and (first != second) is False
    assert [first] == [second] and second in [made(OTHER["another entry"]), first]
    assert {"run": first} == {"run": second}
    assert Run("a", first) == Run("a", second)


@KINDS
@pytest.mark.parametrize("entries", OTHER.values(), ids=OTHER)
def test_other_entries_are_not_equal(made, entries):
    first, second = made(MASK), made(entries)
    assert (first == second) is False and (first != second) is True
    assert second not in [first]
    assert Run("a", first) != Run("a", second)


@KINDS
def test_another_kind_of_thing_is_not_equal(made):
    assert made(MASK) != "w"
    assert made(MASK) != sprand.SparseConfig()
    assert made(MASK) != SprandConfig()


def test_names_of_parameters_and_other_fields_count():
    indices = torch.arange(3)
    assert sprand.SparseConfig(strategy={"v": indices}) != sprand.SparseConfig(strategy={"w": indices})
    assert sprand.SparseConfig(strategy={"w": indices}) != sprand.SparseConfig(strategy={"w": indices, "v": indices})
    assert sprand.SparseConfig(strategy={"w": indices}) != sprand.SparseConfig(strategy={"w": indices}, modules_to_save="auto")
    assert SprandConfig(mask={"w": indices}) != SprandConfig(mask={"w": indices}, modules_to_save=["head"])
    assert SprandConfig(seed=1) != SprandConfig(seed=2)


def test_a_mask_equals_the_dict_of_its_entries():
    assert as_mask(MASK) == {"w": MASK}
    assert as_config(MASK) == sprand.SparseConfig(strategy=as_mask(MASK), target_modules=["w"])


def test_equal_configs_are_one_key_of_a_dict():
    results = {as_config(entries): name for name, entries in SAME.items()}
    assert list(results.values()) == ["an array"]
    assert as_config(OTHER["another entry"]) not in results
    tempered = [sprand.SparseConfig(strategy="grasp", strategy_options={"temperature": t}) for t in (1.0, 2.0, 1.0)]
    assert len(set(tempered)) == 2
    assert len({sprand.SparseConfig(budget=1), sprand.SparseConfig(budget=1.0)}) == 2, "one entry, and all of them"


def test_equal_configs_survive_json_and_replace():
    config = sprand.SparseConfig(budget=500, target_modules=["q", "v"], seed=np.int64(3))
    assert sprand.SparseConfig.from_json(config.to_json()) == config
    assert hash(dataclasses.replace(config)) == hash(config)
    assert dataclasses.replace(config, seed=4) != config
