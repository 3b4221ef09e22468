"""A pool of adapters: what the weights hold is one adapter to the bit, whatever threads ask for and whatever goes wrong."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import sprand
from models import EVERY_TARGET, MLP, EveryLayer, Tied, assert_same_bits, bits, built, points_and_labels, tokens_and_labels
from served import four_adapters, merged, trained
from sprand.serving import AdapterPool
from sprand.serving.residents import DeviceCache, Packed


@pytest.fixture
def four(tmp_path: Path) -> dict[str, Path]:
    return four_adapters(tmp_path)


def test_every_switch_gives_the_merged_weights_and_none_the_base(four):
    base = bits(built(EveryLayer))
    expected = {name: merged(built(EveryLayer), path) for name, path in four.items()} | {None: base}
    model = built(EveryLayer)
    pool = AdapterPool(model)
    for name, path in four.items():
        pool.add(name, path)  # each but the first while another one is in the weights
        pool.switch(name)
    for name in ("a", "b", "c", "d", None, "d", "a", None, "c", "c", "b", "d") + ("a", "b") * 25:
        pool.switch(name)
        assert pool.active == name
        assert_same_bits(bits(model), expected[name])
    assert type(model) is EveryLayer and not [name for name, _ in model.named_parameters() if "sprand" in name]
    pool.close()
    assert_same_bits(bits(model), base)
    assert len(pool) == 0 and "forward" not in model.__dict__
    with pytest.raises(ValueError, match="closed"):
        pool.add("a", four["a"])


def test_a_bf16_base_serves_what_loading_an_fp32_adapter_into_it_gives(four):
    def cast() -> nn.Module:
        return built(EveryLayer).to(torch.bfloat16)

    pool = AdapterPool(model := cast())
    for name, path in four.items():
        pool.add(name, path)
        pool.switch(name)
        assert_same_bits(bits(model), merged(cast(), path))


def test_frozen_entries_of_a_redrawn_mask_are_served(tmp_path):
    model = sprand.apply(built(MLP), density=0.2)
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    mask = sprand.DynamicMask(model, optimizer, every=2, fraction=0.5)
    x, y = points_and_labels()
    for _ in range(7):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        mask.step()
        optimizer.zero_grad()
    frozen, plain = sprand.save(model, tmp_path / "frozen"), trained(built(MLP), tmp_path / "plain")
    pool = AdapterPool(served := built(MLP))
    pool.add("frozen", frozen)
    pool.switch("frozen")
    assert_same_bits(bits(served), merged(built(MLP), frozen))
    pool.add("plain", plain)
    pool.switch("plain")
    assert_same_bits(bits(served), merged(built(MLP), plain))
    pool.switch(None)
    assert_same_bits(bits(served), bits(built(MLP)))


def test_tied_weights_are_written_once(tmp_path):
    options = {"target_modules": ["mix"], "target_parameters": ["embed.weight"]}
    path = trained(built(Tied), tmp_path / "a", **options)
    pool = AdapterPool(model := built(Tied))
    pool.add("a", path)
    pool.switch("a")
    pool.add("again", path)
    assert_same_bits(bits(model), merged(built(Tied), path))
    untied = built(Tied)
    untied.out.weight = nn.Parameter(untied.out.weight.detach().clone())
    both = trained(untied, tmp_path / "both", target_parameters=["embed.weight", "out.weight"], target_modules=["mix"])
    with pytest.raises(ValueError, match="are one parameter here"):
        pool.add("both", both)


def test_what_does_not_fit_is_refused_and_changes_nothing(four, tmp_path):
    pool = AdapterPool(model := built(EveryLayer))
    pool.add("a", four["a"])
    pool.switch("a")
    before = bits(model)
    with pytest.raises(ValueError, match="trained on another base"):
        pool.add("other base", trained(built(EveryLayer, seed=1), tmp_path / "other", **EVERY_TARGET))
    with pytest.raises(ValueError, match="made for another model"):
        pool.add("other model", trained(built(MLP), tmp_path / "mlp"))
    damaged = shutil.copytree(four["b"], tmp_path / "damaged") / "adapter_model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        pool.add("damaged", damaged)
    with pytest.raises(FileNotFoundError):
        pool.add("nowhere", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not taken, got 'a'"):
        pool.add("a", four["b"])
    for ask in (pool.switch, pool.remove, lambda name: pool.use(name).__enter__()):
        with pytest.raises(ValueError, match="no adapter 'b' in the pool of 1 \\(there are a\\)"):
            ask("b")
    assert list(pool) == ["a"] and "b" not in pool
    assert_same_bits(bits(model), before)


def test_a_model_that_cannot_be_served_is_refused(four):
    with pytest.raises(ValueError, match="trains entries"):
        AdapterPool(sprand.load(built(EveryLayer), four["a"]))
    with pytest.raises(ValueError, match="another pool"):
        AdapterPool(AdapterPool(built(MLP)).model)
    with pytest.raises(ValueError, match="meta"):
        AdapterPool(built(MLP).to("meta"))
    with pytest.raises(ValueError, match="device_bytes"):
        AdapterPool(built(MLP), device_bytes=10)


def test_a_removed_adapter_leaves_the_base_and_its_memory(four):
    pool = AdapterPool(model := built(EveryLayer))
    for name, path in four.items():
        pool.add(name, path)
    full = pool.nbytes
    pool.switch("b")
    pool.remove("b")
    assert pool.active is None and "b" not in pool
    assert_same_bits(bits(model), bits(built(EveryLayer)))
    with pool.use("a"):
        with pytest.raises(RuntimeError, match="leave it first"):
            pool.remove("a")
        pool.remove("c")
    assert list(pool) == ["a", "d"] and pool.nbytes < full
    assert_same_bits(bits(pool.model), merged(built(EveryLayer), four["a"]))


def test_adapters_with_equal_positions_cost_their_values_alone(tmp_path):
    model = built(MLP, width=64)
    count = sprand.apply(copy.deepcopy(model), density=0.2).second.sprand_indices.numel()
    pool = AdapterPool(model)
    sizes = []
    for seed, draw in ((0, 0), (1, 0), (2, 1)):
        fields = {"density": 0.2, "target_modules": ["second"]}
        pool.add(f"{seed}", trained(copy.deepcopy(model), tmp_path / f"{seed}", seed, draw, **fields))
        sizes.append(pool.nbytes)
    padding = 3 * 4 * 4
    values, all_three = 4 * count, 12 * count
    assert all_three <= sizes[0] <= all_three + padding
    assert values <= sizes[1] - sizes[0] <= values + padding
    assert all_three <= sizes[2] - sizes[1] <= all_three + padding


def test_a_thousand_adapters(tmp_path):
    model = nn.Linear(32, 8, bias=False)
    paths = [trained(copy.deepcopy(model), tmp_path / f"{seed}", seed) for seed in range(4)]
    outputs = [sprand.load(copy.deepcopy(model), path)(torch.eye(32)) for path in paths]
    pool = AdapterPool(model)
    for number in range(1000):
        pool.add(f"{number}", paths[number % 4])
    assert len(pool) == 1000
    assert pool.nbytes < 1000 * 120  # 26 float32 values each, and one list of positions
    for number in range(0, 1000, 37):
        with pool.use(f"{number}"), torch.no_grad():
            assert torch.equal(model(torch.eye(32)), outputs[number % 4])


@pytest.mark.parametrize("failing", range(2))
def test_an_error_in_the_middle_of_a_switch_leaves_the_base(four, failing, monkeypatch):
    pool = AdapterPool(model := built(EveryLayer))
    for name, path in four.items():
        pool.add(name, path)
    pool.switch("a")
    steps, real = [], sprand.kernels.ops.patch_all_

    def patch(weights, *rest):
        steps.append(0)
        if len(steps) - 1 == failing:
            half = len(weights) // 2
            real(weights[:half], *(part and part[:half] for part in rest))
            raise KeyboardInterrupt
        real(weights, *rest)

    monkeypatch.setattr("sprand.serving.writes.ops.patch_all_", patch)
    with pytest.raises(KeyboardInterrupt):
        pool.switch("c")
    assert pool.active is None
    assert_same_bits(bits(model), bits(built(EveryLayer)))
    monkeypatch.undo()
    pool.switch("c")
    assert_same_bits(bits(model), merged(built(EveryLayer), four["c"]))


def test_a_copy_of_a_served_model_is_a_plain_one(four):
    pool = AdapterPool(model := built(EveryLayer))
    pool.add("a", four["a"])
    pool.switch("a")
    other = copy.deepcopy(model)
    pool.switch(None)
    x, _ = tokens_and_labels()
    assert torch.equal(other(x), sprand.load(built(EveryLayer), four["a"])(x))
    assert not torch.equal(other(x), model(x))


def packed(count: int) -> Packed:
    """Bytes that count as those of a device."""
    parts = Packed({"values": torch.zeros(count, dtype=torch.uint8)})
    parts.device_nbytes = parts.nbytes
    return parts


def test_the_device_forgets_what_was_not_used_for_the_longest_time():
    a, b, c, d = (packed(100) for _ in range(4))
    cache = DeviceCache(limit=300)
    for parts in (a, b, c, a):
        cache.get(parts)
    assert (cache.hits, cache.misses, cache.evictions, cache.nbytes) == (1, 3, 0, 300)
    cache.get(d)
    assert [parts in cache for parts in (a, b, c, d)] == [True, False, True, True]
    cache.get(b, in_use=(c,))
    assert [parts in cache for parts in (a, b, c, d)] == [False, True, True, True]
    assert (cache.hits, cache.misses, cache.evictions, cache.nbytes, cache.uploaded_bytes) == (1, 5, 2, 300, 500)


def test_what_is_in_use_stays_above_the_limit_until_it_is_not():
    cache, a, b = DeviceCache(limit=150), packed(100), packed(100)
    cache.get(a)
    cache.get(b, in_use=(a, b))
    assert cache.nbytes == 200
    cache.shrink((b,))
    assert a not in cache and b in cache and cache.nbytes == 100
    cache.drop(b)
    assert cache.nbytes == 0


def test_on_the_cpu_nothing_is_kept_twice(four):
    pool = AdapterPool(built(EveryLayer))
    for name in "ab":
        pool.add(name, four[name])
        pool.switch(name)
    statistics = pool.statistics()
    assert (statistics.adapters, statistics.switches, statistics.misses, statistics.uploaded_bytes) == (2, 2, 0, 0)
    assert statistics.device_bytes == 0 and statistics.hits > 0 and statistics.host_bytes == pool.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_small_cache_gives_the_same_bits(four):
    def here() -> nn.Module:
        return built(EveryLayer).cuda()

    expected = {name: merged(here(), path) for name, path in four.items()}
    pool = AdapterPool(model := here(), device_bytes=0)
    for name, path in four.items():
        pool.add(name, path)
    for name in "abcdabdc":
        with torch.cuda.stream(torch.cuda.Stream()):
            pool.switch(name)
            with pool.use(name):
                assert_same_bits(bits(model), expected[name])
    statistics = pool.statistics()
    assert statistics.evictions > 0 and statistics.uploaded_bytes >= statistics.device_bytes > 0
    pool.switch(None)
    assert pool.statistics().device_bytes == 0
    assert_same_bits(bits(model), bits(here()))
