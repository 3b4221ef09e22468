"""Threads and a pool: forwards of one adapter together, others in their turn, and no switch under a running forward."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import sprand
from models import MLP, EveryLayer, assert_same_bits, bits, built, points_and_labels, tokens_and_labels
from served import four_adapters, in_threads, later, trained, until
from sprand.serving import AdapterPool


@pytest.fixture
def four(tmp_path: Path) -> dict[str, Path]:
    return four_adapters(tmp_path)


def test_outputs_under_switching_threads_are_those_of_one_adapter(four):
    """Forwards in blocks give their adapter's output; those outside of blocks that of some adapter, never of half of two."""
    x, _ = tokens_and_labels()
    models = {name: sprand.merge(sprand.load(built(EveryLayer), path)) for name, path in four.items()} | {None: built(EveryLayer)}
    with torch.no_grad():
        outputs = {name: model(x) for name, model in models.items()}
    pool = AdapterPool(model := built(EveryLayer))
    for name, path in four.items():
        pool.add(name, path)
    end, seen = time.monotonic() + 1.5, {name: 0 for name in outputs}

    def asking(names):
        def job():
            while time.monotonic() < end:
                for name in names:
                    with pool.use(name), torch.no_grad():
                        for _ in range(2):
                            assert torch.equal(model(x), outputs[name]), name
                    seen[name] += 1

        return job

    def outside():
        while time.monotonic() < end:
            with torch.no_grad():
                y = model(x)
            assert any(torch.equal(y, output) for output in outputs.values())

    def switching():
        while time.monotonic() < end:
            for name in ("d", "a", None):
                pool.switch(name)

    in_threads(asking("abcd"), asking(["c", None, "a"]), asking("b"), outside, outside, switching)
    assert min(seen.values()) > 3
    pool.switch(None)
    assert_same_bits(bits(model), bits(built(EveryLayer)))


class Slow(nn.Module):
    """Reads its weight twice, with time in between for others to change it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        self.reached, self.go = threading.Event(), threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.layer(x)
        self.reached.set()
        assert self.go.wait(20)
        return first - self.layer(x)


def test_a_running_forward_outside_of_a_block_is_never_switched_under(tmp_path):
    path = trained(built(Slow), tmp_path / "a", target_modules=["layer"])
    pool = AdapterPool(model := built(Slow))
    pool.add("a", path)
    results = []
    forward = threading.Thread(target=lambda: results.append(model(torch.eye(8))), daemon=True)
    forward.start()
    assert model.reached.wait(20)
    switch = threading.Thread(target=pool.switch, args=("a",), daemon=True)
    switch.start()
    switch.join(0.2)
    assert switch.is_alive() and pool.active is None
    model.go.set()
    forward.join(20), switch.join(20)
    assert pool.active == "a"
    assert torch.equal(results[0], torch.zeros(8, 8))


def test_one_adapter_runs_in_several_threads_at_once(four):
    pool = AdapterPool(built(EveryLayer))
    pool.add("a", four["a"])
    together = threading.Barrier(3, timeout=20)

    def job():
        with pool.use("a"):
            together.wait()

    in_threads(job, job, job)


def test_no_thread_waits_for_ever(four):
    """Threads hand an adapter on without a gap, each leaving when the next one is inside; one that waits for another gets in."""
    pool = AdapterPool(built(EveryLayer))
    for name in "ab":
        pool.add(name, four[name])
    inside, order, asked = [threading.Event() for _ in range(12)], [], threading.Event()

    def link(number):
        def job():
            assert number == 0 or inside[number - 1].wait(20)
            assert number < 4 or asked.wait(20)
            with pool.use("a"):
                order.append("a")
                inside[number].set()
                if number + 1 < len(inside):
                    inside[number + 1].wait(0.3)  # it cannot come if it has to let the other one pass first

        return job

    def other():
        assert inside[2].wait(20)
        asked.set()
        with pool.use("b"):
            order.append("b")

    in_threads(other, *map(link, range(len(inside))))
    assert "".join(order).index("b") < len(inside)


def test_threads_are_served_in_their_order_and_equal_wishes_together(four):
    pool = AdapterPool(built(EveryLayer))
    for name, path in four.items():
        pool.add(name, path)
    order, started = [], []

    def asks(name):
        def job():
            with pool.use(name):
                order.append(name)

        return job

    with pool.use("a"):
        for number, name in enumerate("bcdbc"):
            started.append(later(asks(name)))
            until(lambda number=number: pool.statistics().waiting > number)
    for thread in started:
        thread.join(20)
    assert "".join(order) == "bbccd"
    assert pool.statistics().switches == 4


def test_an_error_in_a_forward_or_a_block_releases_the_weights(four):
    pool = AdapterPool(model := built(EveryLayer))
    pool.add("a", four["a"])
    for error in (RuntimeError, KeyboardInterrupt):
        handle = model.linear.register_forward_hook(lambda *_, error=error: (_ for _ in ()).throw(error()))
        with pytest.raises(error):
            model(tokens_and_labels()[0])
        with pytest.raises(error), pool.use("a"):
            model(tokens_and_labels()[0])
        handle.remove()
        in_threads(lambda: pool.switch(None), lambda: pool.switch("a"))


def test_asking_for_another_adapter_inside_of_a_block_is_refused(four):
    pool = AdapterPool(built(EveryLayer))
    for name in "ab":
        pool.add(name, four[name])
    with pool.use("a"):
        with pytest.raises(RuntimeError, match="leave it first"), pool.use("b"):
            pass
        with pool.use("a"):
            pool.model(tokens_and_labels()[0])
    pool.switch("b")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_goes_through_the_lock_and_is_compiled_whole(in_place):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    pool = AdapterPool(model := built(MLP))
    if in_place:
        model.compile(backend=backend)
    called = model if in_place else torch.compile(model, backend=backend)
    x, _ = points_and_labels()
    before = pool.statistics().requests
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(called(x), built(MLP)(x))
    assert pool.statistics().requests == before + 2
    assert len(graphs) == 1
