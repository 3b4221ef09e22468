"""One model called by many threads at once, with and without gradients: each gets what it would get alone."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch
from torch import nn

import sprand

THREADS, ROUNDS = 6, 25


class Attention(nn.Module):
    """An attention whose parameters are read by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


class Experts(nn.Module):
    """A module of one's own, which reads its parameters by name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 5)), nn.Parameter(torch.randn(3, 5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nti,eio,eoj->ntj", x, self.up, self.down)


class Reader(nn.Module):
    """A module that reads the weight of a layer and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.layer.weight) @ self.layer.weight


class Recurrent(nn.Module):
    """A recurrent layer, whose parameters are read from a list."""

    def __init__(self, cls: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = cls(8, 4, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


def transposed() -> nn.Module:
    transformers = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    return nn.Sequential(transformers.Conv1D(6, 8))


def features(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 9, (2, 12), generator=torch.Generator().manual_seed(seed))


KINDS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6)), ("0.weight", "0.bias"), features),
    "linear of which only the bias trains": (lambda: nn.Sequential(nn.Linear(8, 6)), ("0.bias",), features),
    "Conv1D": (transposed, ("0.weight", "0.bias"), features),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 5, padding_idx=2)), ("0.weight",), tokens),
    "embedding by frequency": (lambda: nn.Sequential(nn.Embedding(9, 5, scale_grad_by_freq=True)), ("0.weight",), tokens),
    "embedding of bounded norm": (lambda: nn.Sequential(nn.Embedding(9, 5, max_norm=1.0)), ("0.weight",), tokens),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3)), ("0.weight", "0.bias"), features),
    "convolution in two dimensions": (
        lambda: nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv2d(4, 6, (1, 3))), ("1.weight",), features,
    ),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(8)), ("0.weight", "0.bias"), features),
    "attention": (Attention, ("attention.in_proj_weight", "attention.in_proj_bias"), features),
    "a layer that is read": (lambda: nn.Sequential(Reader()), ("0.layer.weight",), features),
    "experts": (lambda: nn.Sequential(Experts()), ("0.up", "0.down"), features),
    "LSTM": (lambda: Recurrent(nn.LSTM), ("rnn.weight_ih_l0", "rnn.weight_hh_l1", "rnn.bias_ih_l0"), features),
    "GRU": (lambda: Recurrent(nn.GRU), ("rnn.weight_hh_l0",), features),
}  # fmt: skip


def through_apply(model: nn.Module, targets: tuple[str, ...]) -> nn.Module:
    return sprand.apply(model, target_modules=None, target_parameters=targets, density=0.5)


def through_peft(model: nn.Module, targets: tuple[str, ...]) -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig

    config = SprandConfig(target_modules=[], target_parameters=list(targets), density=0.5)
    return peft.get_peft_model(model, config)


@pytest.fixture
def eager_switches():
    """Threads take turns after a few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def output_and_gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), trained_parameters(model))]


def output_alone(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(x)]


def together(*jobs) -> None:
    """Run jobs in threads that start at the same moment; the first error of one is raised."""
    barrier, errors = threading.Barrier(len(jobs)), []

    def run(job) -> None:
        try:
            barrier.wait()
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


@pytest.mark.parametrize("door", [through_apply, through_peft], ids=lambda door: door.__name__)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_many_threads_get_what_each_gets_alone(door, kind, eager_switches):
    make, targets, input = kind
    torch.manual_seed(0)
    model = door(make(), targets)
    for p in trained_parameters(model):
        p.data.normal_()
    calls = [output_and_gradients, output_alone] * (THREADS // 2)
    inputs = [input(seed) for seed in range(THREADS)]
    wanted = [call(model, x) for call, x in zip(calls, inputs, strict=True)]
    assert all(output.abs().sum() > 0 for outputs in wanted for output in outputs)

    def job(call, x, outputs):
        def run() -> None:
            for _ in range(ROUNDS):
                for got, one in zip(call(model, x), outputs, strict=True):
                    assert torch.equal(got, one)

        return run

    together(*map(job, calls, inputs, wanted))


def test_a_module_shows_its_alias_to_the_thread_whose_forward_runs_and_to_no_other(eager_switches):
    """Code that is called by a forward reads `module.weight` and trains it; elsewhere the weight is the module's own."""
    seen = {}
    inside, read = threading.Event(), threading.Event()

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen["inside"] = model.weight.requires_grad
            inside.set()
            assert read.wait(10)
            return x @ model.weight

    model = sprand.apply(Watched(), target_modules=None, target_parameters=["weight"], density=0.5)
    own = model._parameters["weight"]

    def outside() -> None:
        assert inside.wait(10)
        seen["outside"] = model.weight
        read.set()

    together(lambda: model(torch.randn(2, 4)).sum().backward(), outside)
    assert seen["inside"] and seen["outside"] is own and model.weight is own
    assert model.sprand_delta.grad.abs().sum() > 0


@pytest.mark.parametrize("cls", [nn.Conv1d, nn.LayerNorm])
def test_a_forward_that_fails_leaves_no_alias_behind(cls):
    model = sprand.apply(nn.Sequential(cls(4, 6, 3) if cls is nn.Conv1d else cls(8)), target_parameters=["0.weight"], density=0.5)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 3))
    assert model[0].weight is model[0]._parameters["weight"]


def test_first_forwards_read_the_base_before_any_of_them_writes(monkeypatch):
    """Through PEFT the base is read when an adapter is first used: never from a weight that another thread has written."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig, adapter_target
    from sprand.peft.layer import adapter_targets

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16))
    before = base[0].weight.detach().clone()
    model = peft.get_peft_model(base, SprandConfig(density=0.5, target_modules=["0"]))
    for p in trained_parameters(model):
        p.data.normal_()
    (target,) = (target for _, _, _, target in adapter_targets(model, "default"))
    target.forget_base()
    gather, readers = adapter_target._gather, []

    def slow_gather(*args):
        readers.append(threading.get_ident())
        time.sleep(0.1 * len(readers))  # a second reader is later than the first one's forward
        return gather(*args)

    monkeypatch.setattr(adapter_target, "_gather", slow_gather)
    together(*[lambda: output_alone(model, torch.ones(1, 16))] * 3)
    assert torch.equal(model.unload()[0].weight, before)
