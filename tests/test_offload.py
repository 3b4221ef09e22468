"""Weights that accelerate offloads: outputs are right, and what would lose a gradient or a value is refused in words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sprand
from models import EVERY_TARGET, EveryLayer, assert_same_bits, bits, built, tokens_and_labels
from served import trained

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

LAYERS = ("embed", "linear", "norm", "conv", "rnn", "head")


def on_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def on_cpu_with_buffers(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder / "weights", execution_device="cpu")


def in_part(model, folder):
    """All but one layer stay in memory."""
    places = dict.fromkeys(LAYERS, "cpu") | {"linear": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder / "weights")


OFFLOADS = [on_cpu, on_cpu_with_buffers, on_disk, in_part]


def adapted(folder):
    return sprand.load(built(EveryLayer), trained(built(EveryLayer), folder / "adapter", density=0.1, **EVERY_TARGET))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_model_computes_with_its_entries_and_refuses_to_train(offload, tmp_path):
    x, y = tokens_and_labels()
    whole, model = adapted(tmp_path), offload(adapted(tmp_path), tmp_path)
    with torch.no_grad():
        assert torch.equal(model(x), whole(x))
    for _ in range(2):
        output = model(x)
        assert torch.equal(output, whole(x))
        with pytest.raises(ValueError, match="backward: accelerate has offloaded.*gradient would be lost"):
            F.cross_entropy(output, y).backward()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_what_needs_the_weights_is_refused_in_words(offload, tmp_path):
    model = offload(adapted(tmp_path), tmp_path)

    def disable():
        with sprand.disabled(model):
            pass

    doors = {
        "save": lambda: sprand.save(model, tmp_path / "saved"),
        "merge": lambda: sprand.merge(model),
        "unmerge": lambda: sprand.unmerge(model),
        "switch": lambda: sprand.switch(model, None),
        "write": lambda: sprand.write(model),
        "disabled": disable,
    }
    for name, door in doors.items():
        with pytest.raises(ValueError, match=f"^{name}: accelerate has offloaded.*sprand merge BASE ADAPTER OUT"):
            door()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_adapter_is_not_put_on_offloaded_weights(offload, tmp_path):
    path = trained(built(EveryLayer), tmp_path / "adapter", density=0.1, **EVERY_TARGET)
    model = offload(built(EveryLayer), tmp_path)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"accelerate has offloaded this weight.*exclude_modules"):
        sprand.apply(model, density=0.1, **EVERY_TARGET)
    with pytest.raises(ValueError, match=r"in memory, got it on the meta device.*accelerate.*sprand merge"):
        sprand.load(model, path)
    assert [type(module) for module in model.modules()] == classes


def test_layers_that_stay_in_memory_train_beside_offloaded_ones(tmp_path):
    (x, y), fields = tokens_and_labels(), {"density": 0.1, "target_modules": ["embed", "conv"]}
    model, plain = sprand.apply(in_part(built(EveryLayer), tmp_path), **fields), sprand.apply(built(EveryLayer), **fields)
    for each in (model, plain):
        optimizer = sprand.SparseAdamW(each, lr=1e-2)
        for _ in range(2):
            F.cross_entropy(each(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(sprand.parameters(model), sprand.parameters(plain), strict=True):
        assert torch.equal(p, q)
    sprand.save(model, tmp_path / "saved")
    assert_same_bits(bits(sprand.merge(sprand.load(built(EveryLayer), tmp_path / "saved"))), bits(sprand.merge(plain)))


def test_an_adapter_of_peft_that_is_offloaded_is_refused_in_words(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig

    model = peft.get_peft_model(built(EveryLayer), SprandConfig(density=0.1, target_modules=["linear"]))
    with torch.no_grad(), pytest.raises(ValueError, match="accelerate has offloaded.*merge the adapter before"):
        on_cpu(model, tmp_path)(tokens_and_labels()[0])
    with pytest.raises(ValueError, match="accelerate has offloaded this weight"):
        peft.get_peft_model(on_cpu(built(EveryLayer), tmp_path), SprandConfig(density=0.1, target_modules=["linear"]))
