"""`torch.compile(fullgraph=True)` over model and loss trains as eager code does, for every kind of layer and for any length."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sprand
from models import assert_same_bits, bits


class Tower(nn.Module):
    """Embedding, linear, Hugging Face `Conv1D`, convolution and norm: each path that sprand has."""

    def __init__(self, conv1d: type[nn.Module] | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16, padding_idx=4)
        self.linear = nn.Linear(16, 24)
        self.transposed = conv1d(16, 24) if conv1d is not None else nn.Linear(24, 16)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.transposed(torch.tanh(self.linear(self.embed(tokens))))
        hidden = F.relu(self.conv(hidden[:, None]), inplace=True).mean(1)
        return F.cross_entropy(self.head(self.norm(hidden).mean(1)), labels)


TARGETS = {
    "density": 0.3,
    "target_modules": ["embed", "linear", "transposed", "conv"],
    "target_parameters": ["norm.weight", "norm.bias", "linear.bias"],
    "modules_to_save": ["head"],
}
OPTIMIZERS = {
    "SparseAdamW": lambda model: sprand.SparseAdamW(model, lr=1e-2),
    "AdamW": lambda model: torch.optim.AdamW(sprand.parameters(model), lr=1e-2),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def tower():
    def build(dtype=torch.float32):
        transformers = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
        torch.manual_seed(0)
        return sprand.apply(Tower(transformers.Conv1D).to(dtype), **TARGETS)

    return build


def batch(length: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 30, (6, length), generator=generator), torch.randint(0, 5, (6,), generator=generator)


def train(called, optimizer, steps=5, lengths=(12,)):
    losses = []
    for seed, length in zip(range(steps), itertools.cycle(lengths), strict=False):
        loss = called(*batch(length, seed))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Counting:
    """A backend that counts what it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.backends.registry.lookup_backend("aot_eager")(graph, inputs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_graphs_of_the_same_operators_train_to_the_same_bits(tower, optimizer):
    eager, compiled = tower(), tower()
    counting = Counting()
    expected = train(eager, optimizer(eager))
    got = train(torch.compile(compiled, fullgraph=True, backend=counting), optimizer(compiled))
    assert got == expected
    for model in (eager, compiled):
        sprand.write(model)
    assert_same_bits(compiled.state_dict(), eager.state_dict())
    assert counting.graphs == 1


def test_inductor_differs_by_the_order_of_its_sums_only(tower):
    """Fused kernels add in another order and contract multiplications, which float64 shows to be rounding and nothing else."""
    eager, compiled = tower(torch.float64), tower(torch.float64)
    expected = train(eager, OPTIMIZERS["SparseAdamW"](eager), steps=3)
    got = train(torch.compile(compiled, fullgraph=True), OPTIMIZERS["SparseAdamW"](compiled), steps=3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for a, b in zip(sprand.parameters(eager), sprand.parameters(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert b.abs().sum() > 0


def test_any_length_runs_the_same_graph(tower):
    eager, compiled = tower(), tower()
    counting = Counting()
    fast = torch.compile(compiled, fullgraph=True, backend=counting)

    def called(tokens, labels):
        torch._dynamo.mark_dynamic(tokens, 1)
        return fast(tokens, labels)

    lengths = (12, 7, 31, 5, 64)
    assert train(called, OPTIMIZERS["SparseAdamW"](compiled), lengths=lengths) == train(
        eager, OPTIMIZERS["SparseAdamW"](eager), lengths=lengths
    )
    assert counting.graphs == 1


def test_a_delta_changed_between_calls_is_seen(tower):
    """Weights are inputs that the graph writes to: a change of any delta, by whom ever, reaches the next call and the weight."""
    eager, compiled = tower(), tower()
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    first = fast(*batch()).item()
    for model in (eager, compiled):
        for value, p in enumerate(sprand.parameters(model), 1):
            p.data.add_(0.01 * value)
    assert fast(*batch()).item() == eager(*batch()).item() != first
    assert_same_bits(bits(compiled), bits(eager))
    base = sprand.unmerge(tower())
    with sprand.disabled(compiled), torch.no_grad():
        assert fast(*batch()).item() == base(*batch()).item() == first
    with torch.no_grad():
        assert fast(*batch()).item() == eager(*batch()).item() != first


def test_no_dense_copy_of_a_weight_is_made():
    """The kernels write into the weight itself: functionalization leaves no copy behind, and there is no dense gradient."""
    torch.manual_seed(0)
    model = sprand.apply(nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 300)), density=0.01)
    x, pointer = torch.randn(6, 300, requires_grad=True), model[0].weight.data_ptr()

    def step():
        torch.compile(model, fullgraph=True)(x).square().sum().backward()

    _, kernels = torch._inductor.utils.run_and_get_code(step)
    assert len(kernels) == 2
    for code in kernels:
        assert "sprand" in code
        assert not re.search(r"empty_strided\w*\(\((200, 300|300, 200|60000, )\)", code)
    assert model[0].weight.data_ptr() == pointer


@pytest.fixture
def adapted():
    """The tower through the other door."""

    def build(dtype=torch.float32):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        transformers = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
        from sprand.peft import SprandConfig

        torch.manual_seed(0)
        return peft.get_peft_model(Tower(transformers.Conv1D).to(dtype), SprandConfig(**TARGETS))

    return build


def trained_values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_peft_models_train_to_the_same_bits_and_follow_their_adapters(adapted):
    """A graph made for one set of adapters is not used for another."""
    from sprand.peft import SprandConfig

    other = SprandConfig(density=0.2, seed=1, target_modules=["linear", "transposed", "conv"], target_parameters=["norm.weight"])
    seen = []
    for compile_it in (False, True):
        model = adapted()
        model.add_adapter("other", other)
        called = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
        losses = train(called, sprand.SparseAdamW(model, lr=1e-2), steps=3)
        with model.disable_adapter(), torch.no_grad():
            losses.append(called(*batch()).item())
        model.set_adapter("other")
        losses += train(called, sprand.SparseAdamW(model, lr=1e-2), steps=2)
        model.base_model.set_adapter(["default", "other"])
        losses += train(called, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), steps=2)
        model.set_adapter("default")
        with torch.no_grad():
            losses.append(called(*batch()).item())
        seen.append((losses, trained_values(model)))
    assert seen[0][0] == seen[1][0]
    assert_same_bits(seen[1][1], seen[0][1])
    with torch.no_grad():
        assert seen[0][0][3] == adapted().unload()(*batch()).item() != seen[0][0][-1]


def test_peft_models_differ_under_inductor_by_rounding_only(adapted):
    eager, compiled = adapted(torch.float64), adapted(torch.float64)
    expected = train(eager, sprand.SparseAdamW(eager, lr=1e-2), steps=2)
    got = train(torch.compile(compiled, fullgraph=True), sprand.SparseAdamW(compiled, lr=1e-2), steps=2)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(trained_values(compiled), trained_values(eager), rtol=1e-9, atol=1e-12)


def test_a_loaded_adapter_with_a_mask_of_its_own_compiles_before_any_other_forward(tmp_path):
    """Its base is read as it is loaded, not in the graph."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from sprand.peft import SprandConfig

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12))

    mask, x = sprand.select(base(), strategy="magnitude", density=0.3), torch.randn(3, 16)
    model = peft.get_peft_model(base(), SprandConfig(mask=mask))
    for name in trained_values(model):
        model.get_parameter(name).data.normal_()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), base()(x))
