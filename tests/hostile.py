"""Files to damage, and what must hold whatever is in them: a sentence, and the model as it was."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import sprand
from checkpoints import plain, redrawn
from models import MLP, assert_same_bits, built
from sprand.checkpoint.merge import merge
from sprand.files import described, states

REFUSED = (ValueError, OSError)


def written(root: Path) -> Path:
    """A base, adapters of each kind of content, a merged checkpoint, a mask and a state."""
    base = {name: value.clone() for name, value in built(MLP).state_dict().items()}
    plain(root / "base", base, {"model_type": "none"})
    generator = torch.Generator().manual_seed(0)
    for name, make in {
        "drawn": lambda: sprand.apply(built(MLP), density=0.05),
        "given": lambda: sprand.apply(built(MLP), strategy={"second.weight": torch.arange(0, 99, 7)}, modules_to_save=["third"]),
        "frozen": lambda: redrawn(sprand.apply(built(MLP), density=0.02, target_modules=["second"])),
    }.items():
        model = make()
        for p in sprand.parameters(model):
            p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
        sprand.write(model)
        sprand.save(model, root / name)
    merge(root / "base", [(root / "given", 1.0)], root / "merged")
    sprand.Mask({"second.weight": torch.arange(0, 99, 7)}, {"second.weight": (24, 24)}).save(root / "mask.safetensors")
    states.write(root / "state.safetensors", "test", {"a": torch.arange(9.0), "b": [1, (2.5, None)], "c": {3: "x"}})
    return root


def state_of(model):
    """Everything a failed load must leave as it was."""
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    grads = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return {name: value.clone() for name, value in model.state_dict().items()}, kinds, grads, "_sprand" in vars(model)


def assert_untouched(model, before):
    now = state_of(model)
    assert now[1:] == before[1:]
    assert_same_bits(now[0], before[0])


def outcome(read):
    """What a reader gives, or None where it refuses; anything but a sentence in ValueError or OSError fails."""
    try:
        return read()
    except REFUSED as error:
        assert str(error).strip() and len(str(error)) < 2000
        return None


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return one == two


def edited(file, change, key="sprand"):
    """Write a file of sprand again with changed tensors or description; its checksum is made right."""
    metadata, tensors = described.contents(file, "file")
    description = json.loads(metadata[key])
    change(tensors, description)
    described.write(file, key, description, tensors)


def header_of(entries, data=b"", length=None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
