"""Adapters of whole columns as LoRA: written for stock PEFT and servers, and converted by PEFT itself."""

from __future__ import annotations

import json
import types
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sprand
from columns_as_lora import PREFIX, assert_equal, columns, mask_of, merged, moved, own, trained
from models import built
from peft_models import llama, logits, peft, train, trainable
from sprand.checkpoint.lora_servers import VLLM_RANKS, vllm_options
from sprand.cli import main
from sprand.integrations import vllm
from sprand.layers.sites import sites_of
from sprand.peft import SprandConfig, export_adapter, import_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("one_rank", [False, True], ids=["own ranks", "one rank"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stock_peft_loads_what_is_exported(tmp_path, dtype, one_rank):
    model = trained(dtype)
    model.save_pretrained(tmp_path / "ours")
    base = llama().to(dtype)
    export_adapter(tmp_path / "ours", tmp_path / "lora", base, to="lora", one_rank=one_rank)
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    config = stock.peft_config["default"]
    assert config.r == config.lora_alpha == 5
    assert set(config.rank_pattern.values()) == (set() if one_rank else {3, 4}) and config.rank_pattern == config.alpha_pattern
    if dtype == torch.float32:
        torch.testing.assert_close(logits(stock), logits(model))
    file = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {value.dtype for value in file.values()} == {torch.float32}
    assert set(file[f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"].flatten().tolist()) == {0.0, 1.0}
    assert_equal(merged(tmp_path / "lora", dtype), own(model))


def test_a_float64_reference_of_a_layer(tmp_path):
    model = nn.ModuleDict({"layer": built(nn.Linear, in_features=24, out_features=16)})
    base = built(nn.Linear, in_features=24, out_features=16)
    indices = columns((16, 24), 4)
    moved(sprand.apply(model, strategy={"layer.weight": indices}))
    sprand.save(model, tmp_path / "ours")
    plain = nn.ModuleDict({"layer": base})
    export_adapter(tmp_path / "ours", tmp_path / "lora", plain, to="lora")
    file = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    a, b = (file[f"{PREFIX}layer.lora_{factor}.weight"].double() for factor in "AB")
    dense = torch.zeros(16 * 24, dtype=torch.float64)
    dense[indices.long()] = sprand.parameters(model)[0].detach().double()
    assert torch.equal(b @ a, dense.view(16, 24))
    x = torch.randn(5, 24)
    exact = x.double() @ (base.weight.detach().double() + dense.view(16, 24)).t() + base.bias.detach().double()
    stock = peft.PeftModel.from_pretrained(plain, tmp_path / "lora")
    torch.testing.assert_close(stock.get_base_model()["layer"](x).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sprand_export_writes_it_from_files_and_says_how_to_serve_it(tmp_path, dtype, capsys):
    llama().to(dtype).save_pretrained(tmp_path / "base")
    model = llama().to(dtype)
    moved(sprand.apply(model, layout="columns", density=0.1, modules_to_save=["lm_head"]))
    sprand.save(model, tmp_path / "ours")
    arguments = ["export", tmp_path / "ours", "--to", "lora", "--base", tmp_path / "base", "-o", tmp_path / "lora"]
    assert main.run([*map(str, arguments)]) == 0
    said = capsys.readouterr().out
    assert "vLLM takes no adapter with modules trained in full (lm_head): merge it (sprand merge)" in said
    assert "serve it" not in said
    assert_equal(merged(tmp_path / "lora", dtype), dict(sprand.merge(model).state_dict()))


def test_the_command_that_serves_it(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "base")
    sprand.save(sprand.apply(llama(), layout="columns", density=0.1), tmp_path / "ours")
    arguments = ["export", tmp_path / "ours", "--to", "lora", "--base", tmp_path / "base", "-o", tmp_path / "lora"]
    assert main.run([*map(str, arguments), "--json", "--one-rank"]) == 0
    said = json.loads(capsys.readouterr().out)
    command = f"vllm serve {tmp_path}/base --enable-lora --max-lora-rank 8 --lora-modules lora={tmp_path}/lora"
    assert said["vllm"] == {"rank": 5, "max_lora_rank": 8, "command": command, "unserved": []}
    assert main.run([*map(str, arguments)]) == 0
    assert f"serve it: {command}\n" in capsys.readouterr().out
    assert vllm.vllm_options(tmp_path / "lora", "some/model", "mine").command.split()[2:4] == ["some/model", "--enable-lora"]


def test_bfloat16_says_what_it_rounds(tmp_path, capsys):
    llama().bfloat16().save_pretrained(tmp_path / "base")
    model = llama().bfloat16()
    sprand.apply(model, layout="columns", density=0.1)
    base = sites_of(model)[0].entries.base[:7].float()
    sprand.parameters(model)[0].data[:7] = -1.3 * base  # the difference of two numbers of eight bits and different signs has more
    sprand.write(model)
    sprand.save(model, tmp_path / "ours")
    arguments = ["export", tmp_path / "ours", "--to", "lora", "--base", tmp_path / "base", "-o", tmp_path / "lora"]
    with pytest.warns(UserWarning, match=r"\d+ of [\d,]+ values of the LoRA are no bfloat16 numbers and were rounded") as caught:
        assert main.run([*map(str, arguments), "--dtype", "bfloat16"]) == 0
    rounded = int(str(caught[-1].message).split()[0])
    file = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {value.dtype for value in file.values()} == {torch.bfloat16}
    expected = dict(sprand.merge(model).state_dict())
    differ = sum(int((value != expected[name]).sum()) for name, value in merged(tmp_path / "lora", torch.bfloat16).items())
    assert 0 < differ <= rounded <= 7


@pytest.mark.parametrize(
    ("make", "axis"),
    [
        (lambda: nn.Embedding(20, 12, padding_idx=0), 1),
        (lambda: nn.Conv1d(6, 8, 3, padding=1, stride=2), 1),
        (lambda: nn.Conv2d(6, 8, (3, 2), padding=1), 1),
        (lambda: nn.Conv2d(6, 8, 1), 1),
        (lambda: nn.Conv3d(3, 4, 2), 1),
        (lambda: __import__("transformers").pytorch_utils.Conv1D(8, 12), 0),
    ],
    ids=["Embedding", "Conv1d", "Conv2d", "Conv2d of 1", "Conv3d", "Conv1D of transformers"],
)
def test_other_layers_go_there_and_back(tmp_path, make, axis):
    wrap = lambda: nn.ModuleDict({"layer": built(lambda: make())})  # noqa: E731
    model, base = wrap(), wrap()
    indices = columns(base["layer"].weight.shape, 3, axis=axis)
    moved(sprand.apply(model, strategy={"layer.weight": indices}))
    sprand.save(model, tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "lora", base, to="lora")
    shape = {2: (4, 6), 3: (2, 6, 9), 4: (2, 6, 5, 7), 5: (2, 3, 5, 4, 3)}[base["layer"].weight.dim()]
    x = torch.randint(0, 20, (4, 6)) if isinstance(base["layer"], nn.Embedding) else torch.randn(shape)
    x = torch.randn(4, 12) if axis == 0 else x
    stock = peft.PeftModel.from_pretrained(wrap(), tmp_path / "lora")
    torch.testing.assert_close(stock.get_base_model()["layer"](x), model["layer"](x))
    expected = sprand.merge(model)["layer"].weight
    assert torch.equal(stock.merge_and_unload()["layer"].weight, expected)
    ours = import_adapter(wrap(), tmp_path / "lora")
    assert torch.equal(ours.merge_and_unload()["layer"].weight, expected)


def test_names_that_end_alike_are_told_apart(tmp_path):
    linear = lambda: nn.Linear(8, 8)  # noqa: E731
    make = lambda: built(lambda: nn.ModuleDict({"q": linear(), "in": nn.ModuleDict({"q": linear()}), "k": linear()}))  # noqa: E731
    for mask in ({"q.weight": 2}, {"q.weight": 2, "in.q.weight": 4}, {"q.weight": 4, "in.q.weight": 2}):
        model = make()
        moved(sprand.apply(model, strategy={name: columns((8, 8), count) for name, count in mask.items()}))
        sprand.save(model, tmp_path / "ours")
        export_adapter(tmp_path / "ours", tmp_path / "lora", make(), to="lora")
        stock = peft.PeftModel.from_pretrained(make(), tmp_path / "lora")
        lora = {name.rpartition(".")[0] for name in stock.state_dict() if "lora_A" in name}
        assert lora == {f"{PREFIX}{name.removesuffix('.weight')}.lora_A.default" for name in mask}
        assert_equal(dict(stock.merge_and_unload().state_dict()), dict(sprand.merge(model).state_dict()))


class Odd(nn.Module):
    """Weights that a LoRA does not hold, or not exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.groups, self.dilated = nn.Conv1d(8, 8, 3, groups=2), nn.Conv1d(8, 8, 3, dilation=2)
        self.reflected = nn.Conv1d(8, 8, 3, padding=1, padding_mode="reflect")
        self.attention = nn.MultiheadAttention(8, 2)
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ({"linear.weight": [0, 9, 18]}, r"linear.weight: its trained entries are no whole columns.*layout=\"columns\""),
        ({"linear.weight": [1, 9], "linear.bias": [0]}, "whole columns|linear.bias is no weight of a linear layer"),
        ({"linear.bias": [0, 1]}, "linear.bias is no weight of a linear layer, an embedding, or a convolution"),
        ({"norm.weight": [0]}, "norm.weight is no weight of a linear layer"),
        ({"groups.weight": "columns"}, "groups.weight is no weight of .* a convolution without groups"),
        ({"dilated.weight": "columns"}, "dilated.weight is no weight of .* a convolution without groups, dilation"),
        ({"reflected.weight": "columns"}, "reflected.weight is no weight of .* padding of another kind than zeros"),
        ({"attention.out_proj.weight": "columns"}, "attention.out_proj.weight is no weight of a linear layer"),
        ({"embed.weight": "columns"}, "embed.weight: several modules share this weight, and a LoRA changes what one of them"),
    ],
)
def test_what_a_lora_cannot_hold_is_refused_before_anything_is_written(tmp_path, mask, why):
    model = built(Odd)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    given = {name: columns(shapes[name], 2) if own == "columns" else torch.tensor(own) for name, own in mask.items()}
    moved(sprand.apply(model, strategy=given))
    sprand.save(model, tmp_path / "ours")
    with pytest.raises(ValueError, match=why):
        export_adapter(tmp_path / "ours", tmp_path / "lora", built(Odd), to="lora")
    assert not (tmp_path / "lora").exists()


def test_command_line_errors_of_a_lora(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "base")
    sprand.save(moved(sprand.apply(llama(), density=0.04)), tmp_path / "entries")
    run = lambda *more: main.run([*map(str, ["export", tmp_path / "entries", "-o", tmp_path / "out", *more])])  # noqa: E731
    assert run("--to", "lora") == 2
    assert "give the base checkpoint (--base)" in capsys.readouterr().err
    assert run("--to", "lora", "--base", tmp_path / "base") == 2
    said = capsys.readouterr().err
    assert "its trained entries are no whole columns" in said and 'layout="columns"' in said and "Traceback" not in said
    assert run("--to", "vllm-patch", "--base", tmp_path / "base", "--one-rank") == 2
    assert "one_rank: vllm-patch has no such option, lora has; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="dtype and one_rank are of lora, and shira has one form only"):
        export_adapter(tmp_path / "entries", tmp_path / "out", llama(), to="shira", one_rank=True)
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, got torch.float16"):
        export_adapter(tmp_path / "entries", tmp_path / "out", llama(), to="lora", dtype=torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1.0, 5, 8], ids=str)
def test_peft_converts_it_exactly(tmp_path, dtype, rank):
    model = trained(dtype, modules_to_save=["lm_head"])
    assert model.supports_lora_conversion()
    peft.save_as_lora(tmp_path, model, rank)
    ranks = {len(value) for name, value in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in name}
    assert ranks == {3, 4, 5}
    assert_equal(merged(tmp_path, dtype), own(model))


def test_peft_converts_a_mask_that_trains_the_head(tmp_path):
    model = llama()
    wrapped = peft.get_peft_model(model, SprandConfig(mask=mask_of(model, "q_proj", "lm_head")))
    train(wrapped, torch.optim.AdamW(trainable(wrapped), lr=1e-2))
    peft.save_as_lora(tmp_path, wrapped, 1.0)
    assert_equal(merged(tmp_path), own(wrapped))


def test_peft_approximates_by_a_smaller_rank_and_refuses_single_entries():
    model = trained()
    config, tensors = peft.convert_to_lora(model, 2)
    assert config.r == 2 and {len(value) for name, value in tensors.items() if "lora_A" in name} == {2}
    entries = peft.get_peft_model(llama(), SprandConfig(density=0.05))
    assert not entries.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion: .*SprandLayer"):
        peft.convert_to_lora(entries, 8)


def test_peft_converts_one_of_several_adapters(tmp_path):
    model = llama()
    wrapped = peft.get_peft_model(model, SprandConfig(mask=mask_of(model, "q_proj")))
    wrapped.add_adapter("second", SprandConfig(mask=mask_of(model, "up_proj")))
    wrapped.set_adapter("second")
    train(wrapped, torch.optim.AdamW(trainable(wrapped), lr=1e-2))
    peft.save_as_lora(tmp_path, wrapped, 1.0, adapter_name="second")
    assert_equal(merged(tmp_path), own(wrapped))


@pytest.mark.parametrize(("rank", "started_with"), [(1, 1), (2, 8), (8, 8), (41, 64), (143, 256), (257, 320), (512, 512)])
def test_the_rank_that_vllm_is_started_with(tmp_path, rank, started_with):
    model = nn.ModuleDict({"up": nn.Linear(600, 4)})
    peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=["up"])).save_pretrained(tmp_path)
    options = vllm_options(tmp_path, "base")
    assert (options.rank, options.max_lora_rank) == (rank, started_with) and started_with in VLLM_RANKS
    assert f"--max-lora-rank {started_with} " in options.command


def test_what_vllm_does_not_serve_is_said(tmp_path):
    layers = {"up": nn.Linear(600, 4), "conv": nn.Conv1d(8, 4, 3), "embed": nn.Embedding(9, 8), "lm_head": nn.Linear(8, 9)}
    model = nn.ModuleDict(layers)
    targets = ["up", "conv", "embed", "lm_head"]
    config = peft.LoraConfig(r=8, rank_pattern={"up": 573}, target_modules=targets, bias="lora_only")
    peft.get_peft_model(model, config).save_pretrained(tmp_path, save_embedding_layers=False)
    options = vllm_options(tmp_path)
    assert options.command is None and options.max_lora_rank is None
    said = "\n".join(options.unserved)
    assert "vLLM takes ranks up to 512, and this adapter has 573: train fewer columns" in said
    assert "vLLM takes no adapter with DoRA or trained biases: merge it (sprand merge)" in said
    assert "vLLM has no LoRA for convolutions (conv): merge it (sprand merge)" in said
    assert "vLLM serves a LoRA of lm_head, embed for models only whose embedding_modules list it" in said
    tasks = peft.LoraConfig(target_modules=["up"], modules_to_save=["score"])
    peft.get_peft_model(nn.ModuleDict({"up": nn.Linear(8, 4), "score": nn.Linear(4, 2)}), tasks).save_pretrained(
        tmp_path / "task"
    )
    assert vllm_options(tmp_path / "task").unserved == ()
    sprand.save(sprand.apply(llama(), density=0.1), tmp_path / "entries")
    with pytest.raises(ValueError, match="is of type SPRAND, expected LORA; sprand export --to lora makes one"):
        vllm_options(tmp_path / "entries")
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        vllm_options(tmp_path / "nowhere")


def test_the_adapter_only_sync_of_trl(tmp_path, monkeypatch):
    """TRL sends LoRA alone without the base: a sprand model goes the way of merged weights, its export the other one."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer", reason="TRL has it from 1.14 on")
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    assert [trl.round_lora_rank(rank) for rank in (1, 5, 64, 257)] == [1, 8, 64, 320] and trl.VLLM_LORA_RANKS == VLLM_RANKS
    server = {"lora_config": {"max_lora_rank": 8, "max_loras": 8}, "parallel_config": {"data_parallel_size": 1}}
    arguments = types.SimpleNamespace(max_staleness=4)
    model = trained()
    assert not trl.select_adapter_sync(server, model, arguments)
    expected = logits(model)
    model.merge_adapter()
    sent = {name: p.detach().clone() for name, p in trl._iter_vllm_named_params(model)}
    model.unmerge_adapter()
    engine = llama()
    engine.load_state_dict(sent, strict=False)
    assert sent.keys() == dict(engine.named_parameters()).keys() and torch.equal(logits(engine), expected)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "lora", llama(), to="lora")
    stock = peft.PeftModel.from_pretrained(llama(), tmp_path / "lora")
    assert trl.select_adapter_sync(server, stock, arguments)
    trl.save_lora_adapter(stock, accelerator, "default", str(tmp_path / "published"))
    assert_equal(merged(tmp_path / "published"), own(model))


def test_an_untrained_adapter_is_a_lora_that_changes_nothing(tmp_path):
    model = llama()
    wrapped = peft.get_peft_model(model, SprandConfig(mask=mask_of(model, "q_proj")))
    wrapped.save_pretrained(tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "lora", llama(), to="lora")
    assert_equal(merged(tmp_path / "lora"), dict(llama().state_dict()))


def test_a_model_of_conv1d_by_files_and_one_without_its_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "base")
    for kind in (transformers.GPT2LMHeadModel, transformers.GPT2Model):
        model = moved(sprand.apply(kind.from_pretrained(tmp_path / "base"), layout="columns", density=0.1))
        sprand.save(model, tmp_path / "ours")
        arguments = ["export", tmp_path / "ours", "--to", "lora", "--base", tmp_path / "base", "-o", tmp_path / "lora"]
        with warnings.catch_warnings(record=True) as caught:
            assert main.run([*map(str, arguments)]) == 0
        said = "without its head, and servers that load GPT2LMHeadModel may leave the LoRA out without a word"
        assert any(said in str(warning.message) for warning in caught) == (kind is transformers.GPT2Model)
        stock = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "lora")
        assert stock.peft_config["default"].fan_in_fan_out
        assert_equal(dict(stock.merge_and_unload().state_dict()), dict(sprand.merge(model).state_dict()))


def test_what_was_combined_or_found_as_a_difference_is_a_lora_too(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    for seed in (0, 1):
        model = moved(sprand.apply(llama(), layout="columns", density=0.1, seed=seed), seed)
        sprand.save(model, tmp_path / str(seed))
    run = lambda *arguments: main.run([*map(str, arguments)])  # noqa: E731
    assert run("combine", tmp_path / "0", tmp_path / "1", "--base", tmp_path / "base", "-o", tmp_path / "both") == 0
    assert run("merge", tmp_path / "base", tmp_path / "both", tmp_path / "merged") == 0
    assert run("diff", tmp_path / "base", tmp_path / "merged", "-o", tmp_path / "found") == 0
    expected = dict(type(llama()).from_pretrained(tmp_path / "merged").state_dict())
    for adapter in ("both", "found"):
        assert run("export", tmp_path / adapter, "--to", "lora", "--base", tmp_path / "base", "-o", tmp_path / "lora") == 0
        assert_equal(merged(tmp_path / "lora"), expected)
