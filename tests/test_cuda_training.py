"""Training on a GPU: captured in a CUDA graph, on another stream, repeated; what can do without one runs on the CPU as well."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sprand
from problems import ORDINARY, PROBLEMS, bits, make_adamw, make_embedding, make_entries, make_sddmm
from sprand.adapters.file import WEIGHTS_FILE

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and a CUDA build of torch")
REPEATS = 10
SPLIT = next(problem for problem in PROBLEMS if problem.reason == "more tokens than one token block")


class Training:
    """A small bf16 network with trained entries, its optimizer, and one batch whose values may change between steps.

    Args:
        device: where.
        capturable: the learning rate is a tensor on the device, as a captured step needs it.
    """

    def __init__(self, device: str, capturable: bool = False) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 384), nn.GELU(), nn.LayerNorm(384), nn.Linear(384, 256, bias=False))
        self.model = sprand.apply(model.to(device, torch.bfloat16), density=0.02, seed=3)
        self.lr = torch.tensor(1e-2, device=device) if capturable else 1e-2
        self.optimizer = sprand.SparseAdamW(self.model, lr=self.lr, capturable=capturable, max_grad_norm=1.0)
        self.x, self.y = (torch.zeros(2, 96, 256, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.loss = torch.zeros((), device=device)

    def fill(self, number: int) -> None:
        """Another batch, and where the learning rate is a tensor, another learning rate."""
        x, y = torch.randn(2, *self.x.shape, generator=torch.Generator().manual_seed(number))
        self.x.copy_(x)
        self.y.copy_(y)
        if isinstance(self.lr, Tensor):
            self.lr.fill_(1e-2 / (number + 1))

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = F.mse_loss(self.model(self.x).float(), self.y.float())
        self.loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Copies of everything a step changes."""
        found = {"loss": self.loss} | dict(self.model.named_parameters())
        for name, p in self.model.named_parameters():
            found |= {f"{name}.{key}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return {name: value.detach().clone() for name, value in found.items()}


def assert_equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(bits(a[name]).cpu(), bits(b[name]).cpu()), name


@pytest.mark.gpu
@needs_gpu
def test_a_captured_training_step_equals_the_eager_one_bit_for_bit():
    eager, captured = (Training("cuda", capturable=True) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for training in (eager, captured):
            for number in range(3):
                training.fill(number)
                training.step()
    torch.cuda.current_stream().wait_stream(side)
    assert_equal_bits(eager.state(), captured.state())
    before = captured.state()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    captured.loss = captured.loss.detach()
    torch.cuda.synchronize()
    before.pop("loss")
    assert_equal_bits(before, {name: value for name, value in captured.state().items() if name != "loss"})
    for number in range(3, 9):
        captured.fill(number)
        graph.replay()
        eager.fill(number)
        eager.step()
        assert_equal_bits(eager.state(), captured.state())
    assert any(bool((p != 0).any()) for name, p in captured.model.named_parameters() if name.endswith("sprand_delta"))
    for training in (eager, captured):
        sprand.merge(training.model)
    assert_equal_bits(dict(eager.model.named_parameters()), dict(captured.model.named_parameters()))


@pytest.mark.gpu
@needs_gpu
def test_training_on_another_stream_is_the_same_training():
    expected, training = Training("cuda"), Training("cuda")
    for number in range(3):
        expected.fill(number)
        expected.step()
    late = [torch.randn(2, *training.x.shape, generator=torch.Generator().manual_seed(number)).cuda() for number in range(3)]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for x, y in late:
            torch.cuda._sleep(50_000_000)  # a kernel on any other stream runs before the copies and sees an old batch
            training.x.copy_(x)
            training.y.copy_(y)
            training.step()
    torch.cuda.synchronize()
    assert_equal_bits(expected.state(), training.state())


@pytest.mark.gpu
@needs_gpu
def test_the_second_gpu_trains_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    trainings = [Training(f"cuda:{index}") for index in range(2)]
    with torch.cuda.device(0):
        for number in range(3):
            for training in trainings:
                training.fill(number)
                training.step()
        assert torch.cuda.current_device() == 0
    assert_equal_bits(trainings[0].state(), trainings[1].state())


@pytest.mark.gpu
@needs_gpu
def test_memory_does_not_grow_after_the_first_steps():
    training = Training("cuda")

    def held() -> tuple[int, int, int]:
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        return torch.cuda.memory_allocated(), stats["segment.all.allocated"], stats["num_alloc_retries"]

    for number in range(3):
        training.fill(number)
        training.step()
    gc.collect()  # what earlier tests left
    before = held()
    for _ in range(20):
        training.step()
    assert held() == before


@pytest.mark.gpu
@needs_gpu
def test_a_step_under_fp16_autocast_with_a_scaler_and_one_that_overflows():
    training, plain = Training("cuda"), Training("cuda")
    for each in (training, plain):
        each.model.float()
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=100)
    for number in range(4):
        for each in (training, plain):
            each.x, each.y = torch.randn(2, 96, 256, generator=torch.Generator().manual_seed(number)).cuda()
            each.optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.mse_loss(training.model(training.x).float(), training.y)
        scaler.scale(loss).backward()
        if number == 2:
            sprand.parameters(training.model)[0].grad[0] = float("inf")
        kept = [p.clone() for p in training.model.parameters()]
        scaler.step(training.optimizer)
        scaler.update()
        if number == 2:
            assert scaler.get_scale() == 512.0
            assert all(torch.equal(p, k) for p, k in zip(training.model.parameters(), kept, strict=True))
            continue
        plain.step()
        assert not all(torch.equal(p, k) for p, k in zip(training.model.parameters(), kept, strict=True))
    expected = torch.cat([p.detach() for p in sprand.parameters(plain.model)])
    found = torch.cat([p.detach() for p in sprand.parameters(training.model)])
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.95


@pytest.mark.gpu
@needs_gpu
def test_compiled_training_is_the_eager_training_up_to_rounding():
    torch.compiler.reset()
    eager, compiled = Training("cuda"), Training("cuda")
    losses: dict[str, list[float]] = {"eager": [], "compiled": []}
    run = torch.compile(compiled.model, fullgraph=True)
    for number in range(6):
        for name, training, model in (("eager", eager, eager.model), ("compiled", compiled, run)):
            training.fill(number % 2)
            training.optimizer.zero_grad()
            loss = F.mse_loss(model(training.x).float(), training.y.float())
            loss.backward()
            training.optimizer.step()
            losses[name].append(loss.item())
    assert losses["eager"][-1] < losses["eager"][0]
    torch.testing.assert_close(losses["compiled"], losses["eager"], rtol=2**-7, atol=0.0)


def run_every_operator(device: str) -> dict[str, Tensor]:
    """What every operator gives on two problems, one of them with many tokens."""
    ops, results = torch.ops.sprand, {}
    for problem in (ORDINARY, SPLIT):
        entries = make_entries(problem, torch.bfloat16, torch.int32, device)
        sides = make_sddmm(problem, torch.bfloat16, torch.int32, device)
        results[f"sddmm {problem}"] = ops.sddmm(*sides)
        results[f"linear_grad {problem}"] = ops.linear_grad(*sides[:2])
        results[f"embedding_grad {problem}"] = ops.embedding_grad(*make_embedding(problem, torch.bfloat16, torch.int32, device))
        results[f"gather {problem}"] = ops.gather(entries.weight, entries.indices)
        results[f"patch_ {problem}"] = entries.weight.clone()
        ops.patch_(results[f"patch_ {problem}"], entries.indices, entries.base, entries.delta, 0.3)
        entry, lists = entries.indices, ([entries.base], [entries.delta])
        made = entries.weight.clone(), entries.indices, entries.base, entries.delta, 0.3, False
        results[f"linear_input_grad {problem}"] = ops.linear_input_grad(sides[0], *made)
        for name, values in (("patch_all_", lists), ("scatter_add_all_", lists[1:])):
            weight = entries.weight.clone()
            getattr(ops, name)([weight], [entry], *values, [0.3])
            results[f"{name} {problem}"] = weight
        shape = problem.rows, problem.cols
        for name, sizes in (("stratified_indices_", shape), ("uniform_indices_", (problem.rows * problem.cols,))):
            drawn = torch.empty_like(entries.indices)
            getattr(ops, name)(drawn, *sizes, 7)
            results[f"{name} {problem}"] = drawn
    made = make_adamw([ORDINARY, SPLIT], torch.bfloat16, torch.int32, device)
    for grads in made.grads:
        for count in made.steps:
            count += 1
        lists = (
            made.weights,
            made.indices,
            made.bases,
            made.deltas,
            grads,
            made.exp_avgs,
            made.exp_avg_sqs,
            made.steps,
            made.scales,
        )
        ops.sparse_adamw_(*lists, 1e-2, 0.9, 0.999, 1e-8, 0.01, False)
    for name in ("weights", "deltas", "exp_avgs", "exp_avg_sqs"):
        results |= {f"sparse_adamw_ {name} {i}": value for i, value in enumerate(getattr(made, name))}
    return results


def test_every_operator_repeats_bit_for_bit(device):
    expected = run_every_operator(device)
    for op in sprand.kernels.ops.SCHEMAS:
        assert any(name.startswith(op) for name in expected), f"{op} is not repeated here"
    for _ in range(REPEATS - 1):
        assert_equal_bits(expected, run_every_operator(device))


def test_positions_are_those_of_the_cpu(device):
    here, there = Training(device), Training("cpu")
    for (name, ours), (_, theirs) in zip(here.model.named_buffers(), there.model.named_buffers(), strict=True):
        assert torch.equal(ours.cpu(), theirs), name


def test_two_runs_give_the_same_adapter_file(device, tmp_path):
    files = []
    for run in ("first", "second"):
        training = Training(device)
        for number in range(5):
            training.fill(number)
            training.step()
        sprand.save(training.model, tmp_path / run)
        files.append((tmp_path / run / WEIGHTS_FILE).read_bytes())
    assert files[0] == files[1]
    untrained = Training(device)
    sprand.save(untrained.model, tmp_path / "untrained")
    assert files[0] != (tmp_path / "untrained" / WEIGHTS_FILE).read_bytes()
