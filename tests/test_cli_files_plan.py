"""`sprand plan` and `sprand export`: counts that training then has, and patches that give the trained weights."""

from __future__ import annotations

import json
import types

import pytest
import torch
from safetensors.torch import load_file

import sprand
from checkpoints import bert, changed, llama, plain, redrawn, tensors_of, trained
from sprand.checkpoint import export as exporting
from sprand.checkpoint.plan import Weight, plan
from sprand.cli import main
from sprand.layers.units import whole_units


def run(*arguments: object) -> int:
    return main.run([*map(str, arguments)])


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_plan_is_what_training_then_needs(tmp_path, capsys, kind):
    """Counts and bytes of the model that is really applied to, and of an optimizer that has stepped."""
    transformers = pytest.importorskip("transformers")
    base = llama(tmp_path, torch.bfloat16) if kind == "llama" else bert(tmp_path)
    capsys.readouterr()
    assert run("plan", base, "--density", 0.05, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    need = {row["method"]: row for row in said["methods"]}["sprand 5 %"]
    make = transformers.AutoModelForCausalLM if kind == "llama" else transformers.AutoModel
    model = sprand.apply(make.from_pretrained(base, dtype="auto"), density=0.05)
    entries = [site.entries for site in sprand.layers.sites.sites_of(model)]
    assert need["trained"] == pytest.approx(sum(e.delta.numel() for e in entries), abs=len(entries))
    optimizer = sprand.SparseAdamW(model, lr=1e-3)
    for p in sprand.parameters(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value) and value.dim()]
    off = 8 * len(entries)
    for key, tensors in {
        "values": [e.delta for e in entries],
        "grads": [e.delta.grad for e in entries],
        "indices": [e.indices for e in entries],
        "base": [e.base for e in entries],
        "moments": states,
    }.items():
        assert need[key] == pytest.approx(sum(tensor.nbytes for tensor in tensors), abs=off), key
    assert said["parameters"] == sum(value.numel() for value in tensors_of(base).values())
    assert [row["method"] for row in said["methods"]] == [
        "sprand 5 %",
        *(f"LoRA r={r}" for r in (8, 16, 32, 64)),
        "full fine-tuning",
    ]


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_a_plan_of_columns_says_how_many_each_weight_then_trains(tmp_path, capsys, kind):
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
        transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path)
    base = {"llama": llama, "bert": bert, "gpt2": lambda folder: folder}[kind](tmp_path)
    capsys.readouterr()
    assert run("plan", base, "--layout", "columns", "--density", 0.1, "--json") == 0
    need = json.loads(capsys.readouterr().out)["methods"][0]
    make = transformers.AutoModelForCausalLM if kind == "llama" else transformers.AutoModel
    model = sprand.apply(make.from_pretrained(base), density=0.1, layout="columns")
    sizes = {}
    for site in sprand.layers.sites.sites_of(model):
        axis, columns = whole_units(site.shape, site.entries.indices)
        planned, count = need["columns"][site.name]
        assert count == site.shape[axis] and abs(planned - len(columns)) <= 1, site.name
        sizes[site.name] = site.numel // count
        assert site.entries.pattern.chosen.nbytes == 4 * len(columns)
    assert need["columns"].keys() == sizes.keys()
    assert need["indices"] == 4 * sum(count for count, _ in need["columns"].values())
    assert need["trained"] == sum(sizes[name] * count for name, (count, _) in need["columns"].items())
    assert need["trained"] == pytest.approx(sum(p.numel() for p in sprand.parameters(model)), abs=max(sizes.values()))
    assert run("plan", base, "--layout", "columns") == 0
    said = capsys.readouterr().out
    assert " % in columns " in said and "columns of each weight that train" in said and ".*." in said
    assert run("plan", base, "--layout", "columns", "--density", 0.001) == 2
    assert "leave no whole column" in capsys.readouterr().err


def layers(count=4, width=512, dtype="BF16"):
    named = [Weight(f"model.layers.{i}.{kind}.weight", (width, width), dtype) for i in range(count) for kind in ("up", "down")]
    return [Weight("model.embed_tokens.weight", (1000, width), dtype), Weight("model.norm.weight", (width,), dtype), *named]


def test_memory_finds_the_largest_density_that_fits():
    for memory in (25_000_000, 30_000_000, 60_000_000):
        need, *_ = plan(layers(), memory=memory, tokens=64)
        assert memory * 0.9 < need.total <= memory or need.trained == 8 * 512**2
    with pytest.raises(ValueError, match="do not fit into 1,000,000"):
        plan(layers(), memory=1_000_000)


def test_plan_in_words(tmp_path, capsys, monkeypatch):
    base = plain(tmp_path / "base", {"model.layers.0.up.weight": torch.zeros(64, 64, dtype=torch.bfloat16)})
    assert run("plan", base) == 0
    said = capsys.readouterr().out
    assert "4,096 parameters, 4,096 of them in linear layers" in said
    assert all(name in said for name in ("sprand 0.1 %", "sprand 1 %", "sprand 5 %", "LoRA r=64", "full fine-tuning"))
    assert run("plan", base, "--memory", "1GB") == 0
    assert "sprand 100 %" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("plan", base, "--memory", "much")
    assert run("plan", base, "--density", 2) == 2
    assert "density: expected fractions" in capsys.readouterr().err
    assert run("plan", "nowhere") == 2
    info = types.SimpleNamespace(shape=[64, 64], dtype="BF16")
    file = types.SimpleNamespace(tensors={"model.layers.0.up.weight": info})
    hub = types.SimpleNamespace(
        get_safetensors_metadata=lambda name: types.SimpleNamespace(files_metadata={"a": file}),
        utils=types.SimpleNamespace(disable_progress_bars=lambda: None),
    )
    monkeypatch.setattr("sprand.cli.files.require", lambda name: hub)
    assert run("plan", "owner/name") == 0
    assert "4,096 parameters" in capsys.readouterr().out


@pytest.fixture
def sparse(tmp_path):
    torch.manual_seed(0)
    make = lambda: torch.nn.ModuleDict({"up": torch.nn.Linear(32, 48), "down": torch.nn.Linear(48, 32)}).bfloat16()  # noqa: E731
    model = make()
    base = plain(tmp_path / "base", {f"model.{name}": value.clone() for name, value in model.state_dict().items()})
    trained(model, density=0.1, modules_to_save=["down"])
    return model, base


@pytest.mark.parametrize("frozen", [False, True], ids=["plain", "frozen entries"])
def test_vllm_patches_give_the_trained_weights(sparse, tmp_path, frozen, capsys):
    model, base = sparse
    if frozen:
        redrawn(model)
    sprand.save(model, tmp_path / "adapter")
    assert run("export", tmp_path / "adapter", "--to", "vllm-patch", "-o", tmp_path / "out") == 2
    assert "give the base checkpoint (--base)" in capsys.readouterr().err
    assert run("export", tmp_path / "adapter", "--to", "vllm-patch", "-o", tmp_path / "out", "--base", base) == 0
    about, tensors = (
        json.loads((tmp_path / "out" / "patches.json").read_text()),
        load_file(tmp_path / "out" / "patches.safetensors"),
    )
    weights = tensors_of(base)
    for patch in about["patches"]:
        indices, values = tensors[f"indices.{patch['name']}"], tensors[f"values.{patch['name']}"]
        assert list(weights[patch["name"]].shape) == patch["shape"] and patch["dtype"] == "bfloat16"
        assert indices.dtype == torch.int32 and len(indices.unique()) == len(indices) == patch["nnz"]
        weights[patch["name"]].view(-1)[indices.long()] = values
    for name, value in sprand.merge(model).state_dict().items():
        assert torch.equal(weights[f"model.{name}"], value), name


def test_dense_deltas(sparse, tmp_path, capsys):
    _, base = sparse
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(32, 48)})
    model["up"].weight.data.copy_(tensors_of(base)["model.up.weight"])
    changed(sprand.apply(model, density=0.1))
    sprand.save(model, tmp_path / "adapter")
    for extra, name in (((), "up.weight"), (("--base", base), "model.up.weight")):
        assert run("export", tmp_path / "adapter", "--to", "dense-delta", "-o", tmp_path / "out", *extra) == 0
        dense = load_file(tmp_path / "out" / "delta.safetensors")
        assert list(dense) == [name] and dense[name].dtype == torch.float32
        flat = torch.zeros(32 * 48)
        flat[model["up"].sprand_indices.long()] = model["up"].sprand_delta.detach()
        assert torch.equal(dense[name].flatten(), flat)


def test_a_new_form_can_be_added(sparse, tmp_path, monkeypatch):
    model, _ = sparse
    sprand.save(model, tmp_path / "adapter")
    monkeypatch.setattr(exporting, "FORMS", dict(exporting.FORMS))

    @exporting.form("names", "the names alone", needs_base=False)
    def names(source, applied, folder):
        (folder / "names.txt").write_text("\n".join(source.description["targets"]))
        return [folder / "names.txt"]

    (file,) = exporting.export(tmp_path / "adapter", "names", tmp_path / "out")
    assert file.read_text() == "up.weight"
    with pytest.raises(ValueError, match="expected one of .*dense-delta, .*names, got .other."):
        exporting.export(tmp_path / "adapter", "other", tmp_path / "out")
