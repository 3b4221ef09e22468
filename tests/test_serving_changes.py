"""Weight sync that sends what changed alone: gaps between entries, few bytes for each, and what may not be missed."""

from __future__ import annotations

import random

import pytest
import torch

import sprand
from models import EveryLayer, assert_same_bits, bits, built
from sprand.serving import DeltaReceiver, DeltaSync, gaps
from sprand.serving.messages import CHANGES_HEADER
from test_serving_sync import of_trainer, step, trainer


@pytest.mark.parametrize("positions", [[], [0], [254], [255], [256], [0, 1, 2], [0, 255, 511, 1022], [7, 100_000]])
def test_positions_come_back_from_their_gaps(positions):
    coded = gaps.coded(torch.tensor(positions, dtype=torch.int64))
    assert coded.dtype == torch.uint8 and gaps.positions_of(coded).tolist() == positions
    between = [b - a - 1 for a, b in zip([-1, *positions], positions, strict=False)]
    assert coded.numel() == len(positions) + sum(gap // 255 for gap in between)


def test_random_positions_come_back_from_their_gaps():
    source = random.Random(0)
    for density in (0.5, 0.02, 0.001):
        positions = [i for i in range(20_000) if source.random() < density]
        assert gaps.positions_of(gaps.coded(torch.tensor(positions))).tolist() == positions


def entries_of(model) -> dict[str, torch.Tensor]:
    """What the weights hold at the entries that train, and in what trains in full."""
    sprand.write(model)
    held = {
        site.name: site.weight.detach().flatten()[site.entries.indices.long()] for site in sprand.layers.sites.sites_of(model)
    }
    return held | {name: p.detach().flatten().clone() for name, p in model.head.named_parameters(prefix="head")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["tensors", "bytes"])
def test_the_copy_follows_by_what_changed(dtype, form):
    model, _ = trainer(dtype)
    optimizer = sprand.SparseAdamW(model, lr=3e-4)
    sync, receiver = DeltaSync(model, visible_only=True), DeltaReceiver(copied := built(EveryLayer).to(dtype))
    receiver.receive(sync.indices())
    before, counts = entries_of(model), []
    for version in range(1, 6):
        step(model, optimizer, version)
        message = sync.values()
        assert receiver.receive(message.numpy().tobytes() if form == "bytes" else message) == version
        assert_same_bits(bits(copied), of_trainer(model))
        now = entries_of(model)
        changed = sum(int((now[name] != before[name]).sum()) for name in now)
        if version > 1:  # the head comes whole at first: nobody has proven what the copy holds there
            assert sync.sent_entries == changed
        most = CHANGES_HEADER.size + (dtype.itemsize + 1) * sync.sent_entries + sync.values_bytes // dtype.itemsize // 255 + 8
        assert message.numel() == sync.sent_bytes <= most
        before = now
        counts.append(changed)
    if dtype == torch.bfloat16:
        assert 0 < counts[-1] < 0.8 * sum(map(torch.Tensor.numel, now.values()))
    receiver.receive(sync.values())  # nothing has changed
    assert sync.sent_entries == 0 and sync.sent_bytes == CHANGES_HEADER.size
    receiver.revert()
    assert_same_bits(bits(copied), bits(built(EveryLayer).to(dtype)))


def test_a_message_that_was_missed_is_noticed_and_made_good():
    model, optimizer = trainer()
    sync, receiver = DeltaSync(model, visible_only=True), DeltaReceiver(copied := built(EveryLayer))
    receiver.receive(sync.indices())
    step(model, optimizer)
    receiver.receive(sync.values())
    held = bits(copied)
    step(model, optimizer, 1)
    sync.values()  # lost
    step(model, optimizer, 2)
    with pytest.raises(ValueError, match="changes of version 3 after version 1.*whole=True"):
        receiver.receive(sync.values())
    assert_same_bits(bits(copied), held)
    whole = sync.values(whole=True)
    assert whole.numel() == sync.sent_bytes == sync.values_bytes
    assert receiver.receive(whole) == 4
    assert_same_bits(bits(copied), of_trainer(model))
    step(model, optimizer, 3)
    receiver.receive(sync.values())
    assert_same_bits(bits(copied), of_trainer(model))
    receiver.revert()
    with pytest.raises(ValueError, match="whole=True"):
        receiver.receive(sync.values())


def test_damaged_changes_are_refused_and_change_nothing():
    model, optimizer = trainer()
    sync, receiver = DeltaSync(model, visible_only=True), DeltaReceiver(copied := built(EveryLayer))
    receiver.receive(sync.indices())
    held = bits(copied)
    step(model, optimizer)
    message = sync.values()
    more, further = message.clone(), message.clone()
    more[CHANGES_HEADER.size - 16] ^= 1  # the count
    further[CHANGES_HEADER.size : CHANGES_HEADER.size + 40] = 254  # gaps that lead beyond the entries
    for damaged in (message[:-1], message[:40], message[:33], torch.cat([message, message[:2]]), more, further):
        with pytest.raises(ValueError, match="truncated or damaged"):
            receiver.receive(damaged)
    assert_same_bits(bits(copied), held)
    receiver.receive(message)
    assert_same_bits(bits(copied), of_trainer(model))
