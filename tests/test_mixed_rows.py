"""Rows of one batch that use different adapters of columns: in a pool, and by PEFT's `adapter_names`."""

from __future__ import annotations

import asyncio
import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from models import MLP, EveryLayer, assert_same_bits, bits, built, points_and_labels
from served import in_threads, later, trained, until
from sprand.serving import AdapterPool

transformers = pytest.importorskip("transformers")
NAMES = ["a", "b", None, "c", "a", "short"]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    """Its layers are `Conv1D`, with weights `[in, out]`."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, eos_token_id=None)
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {"llama": llama, "gpt2": gpt2}


def adapters_of(make, folder: Path) -> dict[str, Path]:
    """Some with the same columns, one with others, one with fewer of fewer layers."""
    first = {"llama": "q_proj", "gpt2": "c_attn"}[make.__name__]
    draws = {"a": {}, "b": {}, "c": {"draw": 7}, "short": {"draw": 3, "density": 0.04, "target_modules": [first]}}
    return {
        name: trained(make(), folder / name, seed, **({"layout": "columns", "density": 0.15} | fields))
        for seed, (name, fields) in enumerate(draws.items())
    }


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    make = MODELS[request.param]
    return make, adapters_of(make, tmp_path_factory.mktemp(request.param))


def pool_of(make, paths: dict[str, Path], **fields) -> AdapterPool:
    pool = AdapterPool(make(), **fields)
    for name, path in paths.items():
        pool.add(name, path)
    return pool


def tokens(rows: int = len(NAMES), length: int = 9) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def rows_of(outputs: dict[str | None, torch.Tensor], names=NAMES) -> torch.Tensor:
    return torch.stack([outputs[name][row] for row, name in enumerate(names)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_one_after_the_other_within_rounding(served, dtype):
    """Against the merged models in float64: at most twice the error of what the weights themselves give in this dtype."""
    make, paths = served
    pool = pool_of(lambda: make().to(dtype), paths)
    x, alone, exact = tokens(), {}, {}
    with torch.no_grad():
        for name in dict.fromkeys(NAMES):
            with pool.use(name):
                alone[name] = pool.model(x).logits
                exact[name] = copy.deepcopy(pool.model).double()(x).logits
        with pool.mixed(NAMES):
            mixed = pool.model(x).logits
    assert mixed.dtype == dtype
    right = rows_of(exact)
    error, theirs = ((y.double() - right).norm() for y in (mixed, rows_of(alone)))
    assert error <= 2 * theirs
    assert (rows_of(exact) - rows_of({name: exact[None] for name in exact})).norm() > 20 * theirs  # the adapters matter


def test_the_base_comes_back_to_the_bit(served):
    make, paths = served
    pool = pool_of(make, paths)
    x = tokens()
    with torch.no_grad():
        base = pool.model(x).logits
        pool.switch("a")
        with pool.mixed(NAMES):
            assert_same_bits(bits(pool.model), bits(make()))
            assert torch.equal(pool.model(x).logits[2], base[2]) and pool.active is None
        assert torch.equal(pool.model(x).logits, base)
        assert not any(module._forward_hooks for module in pool.model.modules()) or pool.switch(None) is None
    assert not any(module._forward_hooks for module in pool.model.modules())


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_gives_each_row_its_adapters_tokens(served, beams):
    make, paths = served
    pool = pool_of(make, paths)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    x, alone = tokens(length=4), {}
    for name in dict.fromkeys(NAMES):
        with pool.use(name):
            alone[name] = pool.model.generate(x, **options)
    with pool.mixed(NAMES):
        mixed = pool.model.generate(x, **options)
    assert torch.equal(mixed, rows_of(alone))
    assert len({tuple(row.tolist()) for row in rows_of(alone)[:, 4:]}) > 1


def test_blocks_of_different_rows_run_together_and_threads_have_those_of_their_block(served):
    make, paths = served
    pool, x = pool_of(make, paths), tokens(2)
    together = threading.Barrier(3, timeout=20)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return pool.model(x).logits

    right = {}
    for names in (("a", "b"), ("c", None), ("short", "a")):
        with pool.mixed(names):
            right[names] = logits()

    def asking(names):
        def job() -> None:
            with pool.mixed(names):
                together.wait()
                for _ in range(5):
                    assert torch.equal(logits(), right[names])
                results = []
                thread = threading.Thread(target=lambda: results.append(logits()))
                thread.start(), thread.join()
                assert torch.equal(results[0], right[names])
                assert torch.equal(asyncio.run(asyncio.to_thread(logits)), right[names])

        return job

    in_threads(*map(asking, right))
    with pool.mixed(("a", "b")), pytest.raises(RuntimeError, match="leave it first"), pool.use("a"):
        pass
    with pool.mixed(("a", "b")):
        other = later(lambda: pool.switch("c"))
        until(lambda: pool.statistics().waiting)
    other.join(20)
    assert pool.active == "c"


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_gives_the_same(tmp_path, in_place):
    torch._dynamo.reset()
    paths = {name: trained(built(MLP), tmp_path / name, seed, layout="columns") for seed, name in enumerate("ab")}
    x = points_and_labels()[0][:4]
    plain = pool_of(lambda: built(MLP), paths)
    with torch.no_grad(), plain.mixed(list("aabb")):
        right = plain.model(x)
    pool = pool_of(lambda: built(MLP), paths)
    if in_place:
        pool.model.compile(backend="eager")
    called = pool.model if in_place else torch.compile(pool.model, backend="eager")
    with torch.no_grad():
        called(x)
        with pool.mixed(list("aabb")):
            assert torch.equal(called(x), right)
        with pool.use("b"):
            b = called(x)
        with plain.use("b"):
            assert torch.allclose(b, plain.model(x), rtol=1e-5, atol=1e-6)
    pool.model.second.compile(backend="eager")
    with pytest.raises(ValueError, match="second was compiled by itself"), pool.mixed(["a"]):
        pass


def test_what_rows_cannot_differ_in_is_refused(tmp_path):
    pool = AdapterPool(built(EveryLayer))
    pool.add("entries", trained(built(EveryLayer), tmp_path / "entries", target_modules=["linear"]))
    pool.add("head", trained(built(EveryLayer), tmp_path / "head", layout="columns", modules_to_save=["head"]))
    pool.add("conv", trained(built(EveryLayer), tmp_path / "conv", layout="columns", target_modules=["conv"]))
    pool.add("fine", trained(built(EveryLayer), tmp_path / "fine", layout="columns", target_modules=["linear"]))
    for name in ("entries", "head", "conv"):
        with pytest.raises(ValueError, match=f"adapter '{name}' changes .* otherwise than in whole columns"), pool.mixed([name]):
            pass
    for names, match in (([], "one for each row"), ("fine", "one for each row"), (["fine", "x"], "no adapter 'x'")):
        with pytest.raises(ValueError, match=match), pool.mixed(names):
            pass
    x = torch.randint(0, 50, (3, 12))
    with pool.mixed(["fine", None]), pytest.raises(ValueError, match="expected an input of 2 rows"):
        pool.model(x)
    with pool.mixed(["fine", None, "fine"]), torch.no_grad():
        pool.model(x)


def peft_model(make, layout: str = "columns", **fields):
    peft = pytest.importorskip("peft")
    from sprand.peft import SprandConfig

    def config(seed: int):
        return SprandConfig(density=0.15, layout=layout, seed=seed, **fields)

    model = peft.get_peft_model(make(), config(0), adapter_name="a")
    model.add_adapter("b", config(0))
    model.add_adapter("c", config(7))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "sprand_delta" in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def test_adapter_names_of_peft_give_each_row_its_adapter():
    model, names, x = peft_model(llama), ["c", "__base__", "a", "b", "a"], tokens(5)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    alone, generated, exact = {}, {}, {}
    with torch.no_grad():
        for name in "abc":
            model.set_adapter(name)
            alone[name], generated[name] = model(x).logits, model.generate(input_ids=x, **options)
            exact[name] = copy.deepcopy(model).merge_and_unload().double()(x).logits
        model.set_adapter("b")
        with model.disable_adapter():
            alone["__base__"], generated["__base__"] = model(x).logits, model.generate(input_ids=x, **options)
            exact["__base__"] = llama().double()(x).logits
        mixed = model(x, adapter_names=names).logits
        assert torch.equal(model.generate(input_ids=x, adapter_names=names, **options), rows_of(generated, names))
        assert torch.equal(model(x).logits, alone["b"])  # as before
    right = rows_of(exact, names)
    assert (mixed.double() - right).norm() <= 2 * (rows_of(alone, names).double() - right).norm()


def test_adapter_names_that_cannot_be_are_refused():
    model, x = peft_model(llama), tokens(2)
    with pytest.raises(ValueError, match="expected a name among a, b, c"):
        model(x, adapter_names=["a", "x"])
    with pytest.raises(ValueError, match="model.eval"):
        model.train()(x, adapter_names=["a", "b"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="otherwise than in whole columns"):
        peft_model(llama, "unstructured")(x, adapter_names=["a", "b"])
