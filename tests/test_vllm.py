"""Patches for vLLM against its public definition, and switching in an engine that stands in for it: packed, on two workers."""

from __future__ import annotations

import importlib
import math
import sys
import types
from pathlib import Path

import pytest
import torch

import sprand
from checkpoints import assert_same, llama, plain, redrawn, tensors_of, trained
from sprand.checkpoint.export import export
from sprand.integrations import vllm


def check(patches) -> None:
    """The rules of `CheckpointWeightPatch`: vllm/model_executor/model_loader/checkpoint_weight_patch.py, its docs and checks."""
    for patch in patches:
        assert patch.name and isinstance(patch.name, str)
        assert isinstance(patch.shape, tuple) and all(isinstance(size, int) and size >= 0 for size in patch.shape)
        assert isinstance(patch.dtype, torch.dtype) and patch.dtype.is_floating_point
        assert patch.values.ndim == 1 and patch.values.dtype == patch.dtype and patch.values.is_contiguous()
        assert not patch.values.isnan().any()
        assert patch.indices.ndim == 1 and patch.indices.dtype in (torch.int32, torch.int64) and patch.indices.is_contiguous()
        assert patch.indices.numel() == patch.values.numel() == patch.indices.unique().numel()
        if patch.indices.numel():
            assert patch.indices.min() >= 0 and patch.indices.max() < math.prod(patch.shape)


def loaded(model, patches, *, validate_unique_indices=True) -> set[str]:
    """What vLLM's function of this name does: a checkpoint tensor for each patch, NaN where it says nothing, for the loader."""
    patches = list(patches)
    check(patches)
    names = set()
    for patch in patches:
        staged = torch.full((math.prod(patch.shape),), float("nan"), dtype=patch.dtype)
        staged[patch.indices.long()] = patch.values
        names |= model.load_weights([(patch.name, staged.view(patch.shape))])
    return names


class Split:
    """One of two workers: half of the rows of every matrix, q, k and v in one parameter."""

    def __init__(self, rank: int, weights: dict[str, torch.Tensor]) -> None:
        self.rank, self.own = rank, {}
        for name, value in weights.items():
            self.own[name] = self._part(value).clone()
        for name in [name for name in weights if "q_proj" in name]:
            three = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            packed = torch.cat([self.own[part] for part in three])
            for part, view in zip(three, packed.split([len(self.own[part]) for part in three]), strict=True):
                self.own[part] = view

    def _part(self, value: torch.Tensor) -> torch.Tensor:
        half = len(value) // 2
        return value[self.rank * half : (self.rank + 1) * half]

    def load_weights(self, weights):
        for name, value in weights:
            part = self._part(value)
            self.own[name].copy_(torch.where(part.isnan(), self.own[name], part))
        return {name for name, _ in weights}


class Worker(vllm.WorkerExtension):
    def __init__(self, model) -> None:
        self._model = model

    def get_model(self):
        return self._model


class Engine:
    """The methods of `vllm.LLM` that a switch calls."""

    def __init__(self, base: Path) -> None:
        self.workers = [Worker(Split(rank, tensors_of(base))) for rank in range(2)]
        self.calls, self.idle = [], True

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return self.idle

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        self.calls.append((method, args))
        assert isinstance(method, str) and all(isinstance(arg, str | None) for arg in args), "what needs no pickle"
        return [getattr(worker, method)(*args, **(kwargs or {})) for worker in self.workers]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors, put together from the workers."""
        one, two = (worker.get_model().own for worker in self.workers)
        return {name: torch.cat([one[name], two[name]]) for name in one}


@pytest.fixture
def installed(monkeypatch):
    """Modules of vLLM's names with what the extension asks them for."""
    path = "vllm.model_executor.model_loader.checkpoint_weight_patch"
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
    sys.modules[path].load_checkpoint_weight_patches = loaded
    sys.modules[path].CheckpointWeightPatch = vllm.CheckpointWeightPatch
    return sys.modules[path]


@pytest.fixture
def adapters(tmp_path) -> tuple[Path, dict[str, Path]]:
    """A bf16 checkpoint and adapters of it: two that overlap, and one with frozen entries and a norm trained in full."""
    transformers = pytest.importorskip("transformers")
    base, made = llama(tmp_path, torch.bfloat16), {}
    for name, fields in {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"seed": 2, "modules_to_save": ["norm"]}}.items():
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        trained(model, draw=len(made), density=0.2, **fields)
        if name == "c":
            redrawn(model)
        made[name] = sprand.save(model, tmp_path / name)
    return base, made


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    import transformers

    model = sprand.merge(sprand.load(transformers.LlamaForCausalLM.from_pretrained(base), adapter))
    return {name: value for name, value in model.state_dict().items() if name in tensors_of(base)}


def test_patches_keep_the_rules_and_give_the_merged_checkpoint(adapters):
    base, made = adapters
    for adapter in made.values():
        weights = tensors_of(base)
        for revert, expected in ((False, merged(base, adapter)), (True, tensors_of(base))):
            given = list(vllm.patches(adapter, base, revert))
            check(given)
            assert {patch.name for patch in given} < set(weights)
            for patch in given:
                assert patch.shape == tuple(weights[patch.name].shape) and patch.dtype == weights[patch.name].dtype
                weights[patch.name].view(-1)[patch.indices.long()] = patch.values
            assert_same(weights, expected)


def test_sparse_nccl_takes_int32_and_full_shapes(adapters):
    base, made = adapters
    given = list(vllm.patches(made["a"], base))
    for patch, sparse in zip(given, vllm.sparse_patches(given), strict=True):
        assert (sparse.name, sparse.full_shape) == (patch.name, patch.shape)
        assert sparse.indices.dtype == torch.int32 and torch.equal(sparse.values, patch.values)
    huge = vllm.CheckpointWeightPatch("w", (2**16, 2**16), torch.float32, torch.zeros(1), torch.tensor([2**31]))
    with pytest.raises(ValueError, match="too many entries"):
        vllm.sparse_patches([huge])


def test_an_engine_switches_and_comes_back(adapters, installed, tmp_path):
    base, made = adapters
    for name, adapter in made.items():
        export(adapter, "vllm-patch", tmp_path / "patches" / name, base)
    expected = {name: merged(base, adapter) for name, adapter in made.items()} | {None: tensors_of(base)}
    engine = Engine(base)
    for name in ("a", "b", "a", "a", "c", None, "b", "c", "b", None, None):
        engine.calls.clear()
        vllm.switch(engine, None if name is None else tmp_path / "patches" / name)
        assert engine.calls[0] == "reset_prefix_cache" and len(engine.calls) == 2
        assert_same(engine.weights, expected[name])


def test_an_engine_is_left_alone_when_it_cannot_switch(adapters, installed, tmp_path):
    base, made = adapters
    export(made["a"], "vllm-patch", tmp_path / "patches", base)
    engine = Engine(base)
    engine.idle = False
    with pytest.raises(RuntimeError, match="requests are running"):
        vllm.switch(engine, tmp_path / "patches")
    engine.idle = True
    with pytest.raises(FileNotFoundError, match="expected patches.safetensors"):
        vllm.switch(engine, made["a"])
    file = tmp_path / "patches" / "patches.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-2], whole[:-2] + bytes(2)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            vllm.switch(engine, tmp_path / "patches")
    about = tmp_path / "patches" / "patches.json"
    about.write_text(about.read_text().replace("vllm-patch 2", "vllm-patch 1"))
    with pytest.raises(ValueError, match="format 'sprand vllm-patch 1'"):
        vllm.switch(engine, tmp_path / "patches")
    assert_same(engine.weights, tensors_of(base))


def test_a_wrong_base_and_numbers_that_are_none_are_refused(adapters, tmp_path):
    base, made = adapters
    other = tensors_of(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    other[name] = other[name] + 1
    with pytest.raises(ValueError, match="trained on another base"):
        list(vllm.patches(made["a"], plain(tmp_path / "other", other)))
    model = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight[0] = float("nan")
    checkpoint = plain(tmp_path / "nan", {"weight": model.weight.detach().clone()})
    sprand.save(sprand.apply(model, density=1.0, target_parameters=["weight"], target_modules=[]), tmp_path / "on nan")
    with pytest.raises(ValueError, match="no numbers"):
        list(vllm.patches(tmp_path / "on nan", checkpoint))


def test_with_vllm_installed_the_patches_are_its_own(adapters, installed, monkeypatch):
    base, made = adapters

    class Own(vllm.CheckpointWeightPatch):
        pass

    installed.CheckpointWeightPatch = Own
    fresh = importlib.reload(vllm)
    try:
        assert all(type(patch) is Own for patch in fresh.patches(made["a"], base))
    finally:
        monkeypatch.undo()
        importlib.reload(vllm)
