"""Requests to a pool: blocks that coroutines, threads and executors share, limits of waiting, replaced adapters."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch

import sprand
from models import MLP, assert_same_bits, bits, built, points_and_labels
from served import in_threads, later, merged, outputs_of, trained, until
from sprand.serving import AdapterPool


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: trained(built(MLP), folder / name, seed, draw=seed) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module")
def outputs(paths: dict[str, Path]) -> dict[str | None, torch.Tensor]:
    return outputs_of(paths)


@pytest.fixture
def pool(paths: dict[str, Path]) -> AdapterPool:
    pool = AdapterPool(built(MLP))
    for name, path in paths.items():
        pool.add(name, path)
    return pool


def forward(pool: AdapterPool) -> torch.Tensor:
    with torch.no_grad():
        return pool.model(points_and_labels()[0])


@pytest.mark.parametrize("read_inside", [True, False])
def test_the_streaming_recipe_of_transformers_gives_each_adapters_text(tmp_path, read_inside):
    """`generate` in a thread that is started in a block, its streamer read inside or outside, while others ask too."""
    transformers = pytest.importorskip("transformers")
    from tiny_models import save_llama

    save_llama(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")

    def base():
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

    inputs = {key: value for key, value in tokenizer("w1 w2 w3", return_tensors="pt").items() if key != "token_type_ids"}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    paths, texts = {}, {}
    for seed, name in enumerate("ab"):
        paths[name] = trained(base(), tmp_path / name, seed, density=0.3)
        tokens = sprand.load(base(), paths[name]).generate(**inputs, **options)[0]
        texts[name] = tokenizer.decode(tokens, skip_special_tokens=True)
    assert texts["a"] != texts["b"]
    pool = AdapterPool(model := base())
    for name, path in paths.items():
        pool.add(name, path)

    def stream(name: str) -> str:
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=25)
        with pool.use(name):
            thread = threading.Thread(target=model.generate, kwargs=dict(**inputs, **options, streamer=streamer))
            thread.start()
            text = "".join(streamer) if read_inside else None
        text = "".join(streamer) if text is None else text
        thread.join(20)
        return text

    def asking(name: str):
        def job():
            for _ in range(3):
                assert stream(name).split() == texts[name].split(), name

        return job

    in_threads(asking("a"), asking("b"), asking("a"))
    assert pool.statistics().switches > 1


def test_coroutines_of_one_thread_use_different_adapters(pool, outputs):
    async def ask(name: str | None) -> None:
        for _ in range(5):
            async with pool.use_async(name):
                await asyncio.sleep(0)
                assert torch.equal(await asyncio.to_thread(forward, pool), outputs[name])
                assert torch.equal(forward(pool), outputs[name])

    async def everyone() -> None:
        await asyncio.wait_for(asyncio.gather(*(ask(name) for name in ("a", "b", None, "c", "a", "b"))), 25)

    asyncio.run(everyone())


def test_tasks_of_a_block_are_inside_of_it_though_others_wait(pool, outputs):
    async def main() -> None:
        async with pool.use_async("a"):
            other = asyncio.create_task(waits(), context=contextvars.Context())
            while not pool.statistics().waiting:
                await asyncio.sleep(0)
            results = await asyncio.gather(*(asyncio.create_task(inner()) for _ in range(3)))
            assert all(torch.equal(result, outputs["a"]) for result in results)
        assert torch.equal(await other, outputs["b"])

    async def inner() -> torch.Tensor:
        async with pool.use_async("a"):
            return forward(pool)

    async def waits() -> torch.Tensor:
        async with pool.use_async("b"):
            return forward(pool)

    asyncio.run(asyncio.wait_for(main(), 25))


def test_a_block_that_would_stop_its_own_event_loop_is_refused(pool):
    async def main() -> None:
        async def holds() -> None:
            async with pool.use_async("a"):
                held.set()
                await go.wait()

        held, go = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(holds())
        await held.wait()
        with pytest.raises(RuntimeError, match="async with pool.use_async"), pool.use("b"):
            pass
        with pool.use("a"):
            forward(pool)
        go.set()
        await task

    asyncio.run(asyncio.wait_for(main(), 25))
    pool.switch("b")


@pytest.mark.parametrize("start", ["thread", "timer", "executor"])
def test_what_a_block_starts_has_its_adapter_also_after_it(pool, outputs, start):
    results, go = [], threading.Event()

    def job() -> None:
        assert go.wait(20)
        results.append(forward(pool))

    executor = ThreadPoolExecutor(1)
    with pool.use("a"):
        if start == "executor":
            started = executor.submit(job)
        else:
            started = threading.Thread(target=job) if start == "thread" else threading.Timer(0, job)
            started.start()
    pool.switch("b")
    go.set()
    started.result(20) if start == "executor" else started.join(20)
    assert torch.equal(results[0], outputs["a"])
    pool.switch("b")
    assert torch.equal(executor.submit(forward, pool).result(20), outputs["b"])  # its thread is nobody's
    executor.shutdown()


def test_a_thread_that_is_in_no_request_works_for_an_open_block(pool, outputs):
    """Workers that were there before: the block waits for them, and so they must not wait behind those who wait for the block."""
    with ThreadPool(1) as workers:
        with pool.use("a"):
            waiting = later(lambda: pool.switch("b"))
            until(lambda: pool.statistics().waiting)
            assert torch.equal(workers.apply_async(forward, (pool,)).get(20), outputs["a"])
        waiting.join(20)
    assert pool.active == "b"


def test_waiting_ends_with_its_time_and_leaves_nothing(pool, outputs):
    def asks() -> None:
        with pytest.raises(TimeoutError, match="1 requests use what they hold"), pool.use("b", timeout=0.05):
            pass

    async def asks_async() -> None:
        with pytest.raises(TimeoutError, match="not free within"):
            async with pool.use_async("b", timeout=0.05):
                pass
        task = asyncio.create_task(pool.use_async("b").__aenter__())
        while not pool.statistics().waiting:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with pool.use("a"):
        for job in (asks, lambda: asyncio.run(asks_async())):
            thread = later(job)
            thread.join(20)
            assert not thread.is_alive()
        assert pool.statistics().waiting == 0
    pool.switch("b", timeout=5)
    assert torch.equal(forward(pool), outputs["b"])


def test_a_replaced_adapter_is_the_old_one_inside_and_the_new_one_after(pool, paths, outputs):
    with pool.use("a"):
        pool.replace("a", paths["b"])
        assert torch.equal(forward(pool), outputs["a"])
        with pool.use("a"):
            assert torch.equal(forward(pool), outputs["a"])
        results = []
        waiting = later(lambda: pool.switch("a") or results.append(forward(pool)))
        until(lambda: pool.statistics().waiting)
    waiting.join(20)
    assert torch.equal(results[0], outputs["b"])
    with pytest.raises(FileNotFoundError):
        pool.replace("a", paths["a"].parent / "nowhere")
    with pytest.raises(ValueError, match="no adapter 'x'"):
        pool.replace("x", paths["a"])
    pool.switch("a")
    assert_same_bits(bits(pool.model), merged(built(MLP), paths["b"]))
    assert pool.nbytes <= sum(pool._shelf.entry(name).resident.parts[0].nbytes * 5 for name in "abc")


def test_replacing_while_others_ask_gives_one_of_both_whole(pool, paths, outputs):
    end = time.monotonic() + 1

    def replacing() -> None:
        while time.monotonic() < end:
            for name in "bac":
                pool.replace("a", paths[name])

    def asking(name: str, allowed: str):
        def job() -> None:
            while time.monotonic() < end:
                with pool.use(name):
                    y, again = forward(pool), forward(pool)
                assert torch.equal(y, again) and any(torch.equal(y, outputs[one]) for one in allowed)

        return job

    in_threads(replacing, asking("a", "abc"), asking("a", "abc"), asking("b", "b"))


@pytest.mark.parametrize(("delay", "order", "switches"), [(0.0, "aba", 3), (10.0, "aab", 2)])
def test_later_requests_for_the_present_adapter_pass_within_the_delay(paths, delay, order, switches):
    pool = AdapterPool(built(MLP), max_queue_delay=delay)
    for name in "ab":
        pool.add(name, paths[name])
    came = []

    def ask(name: str):
        def job() -> None:
            with pool.use(name):
                came.append(name)

        return job

    with pool.use("a"):
        came.append("a")
        first = later(ask("b"))
        until(lambda: pool.statistics().waiting == 1)
        second = later(ask("a"))
        if delay:
            second.join(20)
        else:
            until(lambda: pool.statistics().waiting == 2)
    first.join(20), second.join(20)
    assert "".join(came) == order and pool.statistics().switches == switches


def test_nobody_is_passed_for_longer_than_the_delay(paths):
    pool = AdapterPool(built(MLP), max_queue_delay=0.05)
    for name in "ab":
        pool.add(name, paths[name])
    done = threading.Event()

    def keeps_a_busy() -> None:
        while not done.is_set():
            with pool.use("a"):
                time.sleep(0.002)

    busy = [later(keeps_a_busy) for _ in range(4)]
    until(lambda: pool.active == "a")
    pool.switch("b", timeout=20)
    done.set()
    for thread in busy:
        thread.join(20)


def test_an_adapter_comes_from_the_cache_of_the_hub(pool, paths, outputs, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    commits = {"0" * 40: "b", "1" * 40: "c"}
    repo = tmp_path / "models--someone--tuned"
    for commit, name in commits.items():
        (repo / "snapshots" / commit).mkdir(parents=True)
        for file in paths[name].iterdir():
            (repo / "snapshots" / commit / file.name).symlink_to(file)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "refs" / "v2").write_text("1" * 40)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    pool.add("hub", "someone/tuned")
    pool.add("v2", "someone/tuned", revision="v2")
    for name, same in (("hub", "b"), ("v2", "c")):
        with pool.use(name):
            assert torch.equal(forward(pool), outputs[same])
    (repo / "refs" / "main").write_text("1" * 40)
    pool.replace("hub")
    with pool.use("hub"):
        assert torch.equal(forward(pool), outputs["c"])
    with pytest.raises(FileNotFoundError, match="could not be fetched from the Hub"):
        pool.add("other", "someone/else")
    with pytest.raises(ValueError, match="revision"):
        pool.add("local", paths["a"], revision="main")


def test_prometheus_reads_the_statistics(pool):
    parser = pytest.importorskip("prometheus_client.parser")
    with pool.use("a"):
        forward(pool)
    statistics = pool.statistics()
    families = {family.name: family for family in parser.text_string_to_metric_families(statistics.prometheus())}
    assert families["sprand_pool_adapters"].type == "gauge" and families["sprand_pool_switches"].type == "counter"
    values = {sample.name: sample.value for family in families.values() for sample in family.samples}
    assert len(values) == 14 and all(family.documentation for family in families.values())
    assert values["sprand_pool_adapters"] == 3 and values["sprand_pool_host_bytes"] == pool.nbytes > 0
    assert values["sprand_pool_switches_total"] == values["sprand_pool_requests_total"] - 3 == 1  # three reads of the base


def test_limits_are_checked(paths):
    for fields, match in (({"host_bytes": -1}, "host_bytes"), ({"max_queue_delay": -1.0}, "max_queue_delay")):
        with pytest.raises(ValueError, match=match):
            AdapterPool(built(MLP), **fields)
