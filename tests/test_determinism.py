"""One training run is one adapter file, byte for byte: again, in a new process, on any number of threads, eager or compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sprand

TARGETS = {
    "density": 0.05,
    "target_modules": ["embed", "up", "conv"],
    "target_parameters": ["up.bias"],
    "seed": 4,
}
HEAD = ("head",)


class Net(nn.Module):
    """Wide enough that PyTorch and sprand deal its work to several threads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(400, 128)
        self.up = nn.Linear(128, 320)
        self.conv = nn.Conv1d(320, 128, 3)
        self.norm = nn.LayerNorm(128)
        self.head = nn.Linear(128, 7)

    def forward(self, tokens, labels):
        hidden = F.gelu(self.up(self.embed(tokens)))
        hidden = torch.relu(self.conv(hidden.transpose(1, 2))).transpose(1, 2)
        return F.cross_entropy(self.head(self.norm(hidden).mean(1)).float(), labels)


def batches(steps: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda high, *shape: torch.randint(0, high, shape, generator=generator)  # noqa: E731
    return [(draw(400, 16, 24), draw(7, 16)) for _ in range(steps)]


def adapter_of(
    folder: Path,
    dtype: str = "float32",
    strategy: str = "random",
    heads: tuple[str, ...] = HEAD,
    targets: dict = TARGETS,
    backend: str | None = None,
    device: str = "cpu",
) -> dict[str, bytes]:
    """Train a model and save its adapter: the content of its files."""
    torch.manual_seed(0)
    model = Net().to(device, getattr(torch, dtype))
    data = [(x.to(device), y.to(device)) for x, y in batches()]
    scored = {} if strategy == "random" else {"data": data[:2], "loss_fn": lambda model, batch: model(*batch)}
    sprand.apply(model, strategy=strategy, modules_to_save=heads, **targets, **scored)
    optimizer = sprand.SparseAdamW(model, lr=1e-2, max_grad_norm=0.5)
    called = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    for batch in data:
        called(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return files_of(sprand.save(model, folder))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("strategy", ["random", "snip"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_change_nothing(tmp_path, threads, dtype, strategy):
    """Without targets whose dense gradient PyTorch sums: modules trained in full, convolutions."""
    targets = TARGETS | {"target_modules": ["embed", "up"]}
    found = []
    for count in (1, 2, 8):
        threads(count)
        found.append(adapter_of(tmp_path / str(count), dtype, strategy, heads=(), targets=targets))
    assert found[0] == found[1] == found[2]
    adapter = sprand.adapters.file.AdapterFile.read(tmp_path / "1")
    assert any(adapter.entries(name)[1].any() for name in adapter.targets)


def test_a_new_process_writes_the_same_files(tmp_path):
    here = adapter_of(tmp_path / "here")
    code = "import sys, pathlib, test_determinism as t; t.adapter_of(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path / "there"], check=True, cwd=Path(__file__).parent)
    assert files_of(tmp_path / "there") == here


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_as_eager(tmp_path, dtype):
    torch.compiler.reset()
    assert adapter_of(tmp_path / "compiled", dtype, backend="aot_eager") == adapter_of(tmp_path / "eager", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["random", "snip"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_two_runs_on_a_gpu(tmp_path, dtype, strategy, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # of the convolution, which is PyTorch's own
    runs = [adapter_of(tmp_path / str(run), dtype, strategy, device="cuda") for run in range(2)]
    assert runs[0] == runs[1]
