"""What others put around a model or its modules, or copy of it: names, outputs and gradients are those of the model itself."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import sprand
from models import EVERY_TARGET, MLP, EveryLayer, Tied, assert_same_bits, built, points_and_labels, tokens_and_labels
from served import trained
from sprand.serving import AdapterPool, DeltaReceiver, DeltaSync


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model.first = compiled(model.first)
    return model


def checkpointed_inside(model):
    model.first = checkpoint_wrapper(model.first)
    return model


WRAPPED = [compiled, compiled_inside, checkpointed_inside]
FIELDS = {
    "density": 0.2,
    "target_modules": ["first", "second"],
    "target_parameters": ["first.bias"],
    "modules_to_save": ["third"],
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def changed(model):
    """A model whose deltas are not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sprand.parameters(model):
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def gradients(model):
    x, y = points_and_labels()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad for name, p in sprand.named_parameters(model)}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_wrapped_model_trains_the_entries_of_the_plain_one_under_its_names(wrap):
    x, _ = points_and_labels()
    assert_same_bits(sprand.select(wrap(built(MLP)), **FIELDS), sprand.select(built(MLP), **FIELDS))
    plain, model = (changed(sprand.apply(wrapped, **FIELDS)) for wrapped in (built(MLP), wrap(built(MLP))))
    assert_same_bits(gradients(model), gradients(plain))
    assert sprand.summary(model) == sprand.summary(plain)
    with sprand.disabled(model):
        assert torch.equal(model(x), built(MLP)(x))
    assert torch.equal(sprand.merge(model)(x), sprand.merge(plain)(x))


@pytest.mark.parametrize("wrap", WRAPPED)
def test_an_adapter_of_a_wrapped_model_is_that_of_the_plain_one(wrap, tmp_path):
    x, _ = points_and_labels()
    path, plain = (trained(m, tmp_path / name, **FIELDS) for name, m in {"a": wrap(built(MLP)), "b": built(MLP)}.items())
    assert (path / "adapter_model.safetensors").read_bytes() == (plain / "adapter_model.safetensors").read_bytes()
    expected = sprand.load(built(MLP), path)(x)
    model = sprand.load(wrap(built(MLP)), path)
    assert torch.equal(model(x), expected)
    pool = AdapterPool(served := wrap(built(MLP)))
    pool.add("a", path)
    with pool.use("a"):
        assert torch.equal(served(x), expected)
    sync, receiver = DeltaSync(model), DeltaReceiver(copied := wrap(built(MLP)))
    receiver.receive(sync.indices())
    receiver.receive(sync.values())
    assert torch.equal(copied(x), expected)


def test_a_model_that_is_compiled_later_is_what_it_was_when_it_is_unmerged():
    model = sprand.apply(built(MLP), **FIELDS)
    sprand.unmerge(compiled_inside(model))
    assert all(p.requires_grad for p in model.parameters())


def replica(network, with_grad=True):
    """One copy, put together as `torch.nn.parallel.replicate` does; `with_grad` is whether autograd sees it."""
    modules = list(network.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        copied = copies[id(module)]
        copied._former_parameters = {}
        for name, child in module._modules.items():
            setattr(copied, name, copies[id(child)])
        for name, p in module._parameters.items():
            if p is None:
                copied._parameters[name] = None
                continue
            setattr(copied, name, p.clone() if with_grad and p.requires_grad else p.detach().clone())
            copied._former_parameters[name] = getattr(copied, name)
        for name, buffer in module._buffers.items():
            setattr(copied, name, buffer.clone())
    return copies[id(network)]


def data_parallel(network, tokens):
    """The output of two replicas, each in a thread of its own with its half of the rows."""
    with_grad = torch.is_grad_enabled()
    parts, outputs = tokens.split((3, 5)), {}

    def forward(number, copied):
        with torch.set_grad_enabled(with_grad):
            outputs[number] = copied(parts[number])

    threads = [threading.Thread(target=forward, args=(number, replica(network, with_grad))) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat([outputs[0], outputs[1]])


def by_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig

    return peft.get_peft_model(built(EveryLayer).double(), SprandConfig(density=0.1, **EVERY_TARGET))


def by_apply():
    return sprand.apply(built(EveryLayer).double(), density=0.1, **EVERY_TARGET)


@pytest.mark.parametrize("make", [by_apply, by_peft])
def test_replicas_of_data_parallel_train_the_original(make):
    model, (x, y) = make(), tokens_and_labels()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for p in trained.values():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    found = []
    for called in (model, lambda tokens: data_parallel(model, tokens)):
        model.zero_grad()
        output = called(x)
        F.cross_entropy(output, y).backward()
        found.append({"output": output.detach()} | {name: p.grad.clone() for name, p in trained.items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-15)
    with torch.no_grad():
        torch.testing.assert_close(data_parallel(model, x), model(x), rtol=1e-12, atol=1e-15)


def test_replicas_of_a_disabled_or_tied_model_are_right():
    model, (x, _) = by_apply(), tokens_and_labels()
    with sprand.disabled(changed(model)):
        assert torch.equal(replica(model)(x), built(EveryLayer).double()(x))
    tied = changed(sprand.apply(built(Tied), density=0.2, target_modules=["embed", "mix"]))
    tokens = torch.arange(8)[None]
    assert torch.equal(replica(tied)(tokens), tied(tokens))


def test_a_mask_that_moves_is_refused_in_replicas():
    model = by_apply()
    sprand.DynamicMask(model, every=1, optimizer=sprand.SparseAdamW(model, lr=1e-2))
    with pytest.raises(ValueError, match="DynamicMask.*DataParallel; use DistributedDataParallel"):
        replica(model)


@pytest.mark.parametrize("door", [lambda m: sprand.apply(m, density=0.1), lambda m: sprand.select(m, density=0.1)])
def test_what_is_wrapped_before_it_trains_is_refused(door):
    with pytest.raises(ValueError, match="expected the model itself, got its DataParallel wrapper"):
        door(nn.DataParallel(built(Tied)))


def trained_on(model, average, steps=4):
    """Deltas by parameter after each step of a training, while `average` follows the model."""
    (x, y), seen = points_and_labels(), []
    optimizer = sprand.SparseAdamW(model, lr=1e-2)
    for _ in range(steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        seen.append([p.detach().clone() for p in sprand.parameters(model)])
    return seen


AVERAGES = {
    "mean": {},
    "mean of buffers": {"use_buffers": True},
    "moving": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "moving, of buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
def test_an_averaged_model_has_the_average_of_the_deltas_at_the_same_positions(options, tmp_path):
    x, _ = points_and_labels()
    model = sprand.apply(built(MLP, width=80), density=0.3, modules_to_save=["third"])
    average = AveragedModel(model, **options)
    seen = trained_on(model, average)
    expected = sprand.apply(built(MLP, width=80), density=0.3, modules_to_save=["third"])
    for number, p in enumerate(sprand.parameters(expected)):
        averaged = seen[0][number]
        for step, deltas in enumerate(seen[1:], 1):
            averaged = averaged.lerp(deltas[number], 1 / (step + 1) if "multi_avg_fn" not in options else 1 - 0.9)
        p.data.copy_(averaged)
    torch.testing.assert_close(average(x), expected(x), rtol=1e-5, atol=1e-6)
    loaded = sprand.load(built(MLP, width=80), sprand.save(average.module, tmp_path))
    assert torch.equal(loaded(x), average(x))
    assert torch.equal(sprand.unmerge(average.module)(x), built(MLP, width=80)(x))


def test_an_average_over_given_positions_is_refused_in_words():
    x, _ = points_and_labels()
    given = {"second.weight": torch.arange(1, 576, 3)}
    model = sprand.apply(built(MLP), strategy=given)
    average = AveragedModel(model, **AVERAGES["moving, of buffers"])
    trained_on(model, average)
    with pytest.raises(
        ValueError, match=r"second\.weight: the positions of its trained entries were changed in place.*update_bn"
    ):
        average(x)
    exact = AveragedModel(model, **AVERAGES["moving"])
    exact.update_parameters(model)
    assert torch.equal(exact(x), model(x))


def test_update_bn_reads_what_the_averaged_model_makes():
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    x, _ = points_and_labels()
    model = sprand.apply(made(), density=0.5)
    average = AveragedModel(model)
    trained_on(model, average)
    update_bn([x], average)
    with torch.no_grad():
        hidden = sprand.merge(average.module)[0](x)
    torch.testing.assert_close(average.module[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(average.module[1].running_var, hidden.var(0))
