"""Checkpoints and adapters for the tests of files: tiny Hugging Face models, deltas that are large and tiny, whole folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import sprand
from tiny_models import save_bert, save_llama

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def llama(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A saved language model, in one file or several."""
    import transformers

    made = save_llama(folder / "made")
    model = transformers.LlamaForCausalLM.from_pretrained(made, dtype=dtype)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    for path in made.glob("*token*"):
        (folder / "base" / path.name).write_bytes(path.read_bytes())
    return folder / "base"


def bert(folder: Path) -> Path:
    """A saved encoder, whose tensor names have no prefix."""
    return save_bert(folder / "base")


def trained(model, draw: int = 0, **fields):
    """Apply and change every delta, by large and tiny amounts, some not at all."""
    return changed(sprand.apply(model, **fields), draw)


def changed(model, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    for p in sprand.parameters(model):
        sizes = 10.0 ** torch.randint(-9, 0, p.shape, generator=generator)
        p.data = p.data + (torch.randn(p.shape, generator=generator) * sizes).to(p.dtype)
        p.data.view(-1)[::7] = 0
    sprand.write(model)
    return model


def redrawn(model):
    """Draw another mask, so that what was trained stays behind as frozen entries, and change what trains then."""
    optimizer = torch.optim.SGD(sprand.parameters(model), lr=0.0)

    def other(model):
        sites = sprand.layers.sites.sites_of(model)
        return {site.name: torch.randperm(site.numel)[: site.entries.indices.numel()] for site in sites}

    mask = sprand.DynamicMask(model, optimizer, every=1, steps=1, mode="recompute", strategy=other)
    assert mask.step()
    return changed(model, 1)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder, by the safetensors library's own reader."""
    found = {}
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for name in names:
        with safe_open(folder / name, framework="pt") as content:
            found |= {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    return found


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Equal names, dtypes, shapes, and bits."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype and value.shape == two[name].shape, name
        assert torch.equal(value.contiguous().view(-1).view(torch.uint8), two[name].contiguous().view(-1).view(torch.uint8)), name


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plain(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    """A checkpoint folder of these tensors, in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
