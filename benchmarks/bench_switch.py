"""Switching adapters in a live model: time, the forward after it, and what is left of the base, for sprand and PEFT's methods."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import torch
from torch import Tensor, nn

import plots
import sprand
import timing
from methods import DTYPES, PEER_DENSITY, VOCABULARY, Unavailable, build, fresh, linears, matching_rank, targets
from report import RESULTS, Row, command_line, end_as_by_ctrl_c, progress, quantiles, write_csv, write_markdown
from report import markdown as table
from sprand.adapters.file import AdapterFile
from sprand.serving import AdapterPool

COLUMNS = (
    "device", "width", "layers", "dtype", "method", "label", "trained", "seconds", "seconds_p20", "seconds_p80", "ratio",
    "forward_seconds", "forward_ratio", "changed", "note",
)  # fmt: skip
TABLE = {
    "label": ("method", ""), "trained": ("trained weights", ",d"), "milliseconds": ("switch, ms", ".2f"),
    "ratio": ("over the pool", ".2f"), "forward_ratio": ("forward over the plain model's", ".3f"),
    "changed": ("base entries that differ after all switches", ".2%"), "note": ("", ""),
}  # fmt: skip
SECTION = "{device}, {dtype}, {width} wide, {layers} layers"


@dataclass
class Contestant:
    """One way to have two adapters in a model.

    Attributes:
        key, label: of its row.
        model: called for the forward.
        trained: scalars of one adapter.
        switch: to the adapter "a" or "b", or to the base by None.
        base: the linear weights by name, when the base is active.
    """

    key: str
    label: str
    model: nn.Module
    trained: int
    switch: Callable[[str | None], object]
    base: Callable[[], dict[str, Tensor]]


@end_as_by_ctrl_c()
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    rows: list[Row] = []
    try:
        with progress(len(options.widths) * len(options.dtypes), "switching") as bar, tempfile.TemporaryDirectory() as folder:
            for dtype in options.dtypes:
                for width in options.widths:
                    rows += measure(options, width, dtype, Path(folder) / f"{width} {dtype}")
                    bar.say(f"{dtype}, {width} wide: done")
                    bar.advance()
    finally:
        put_down(rows, options, command)
    return 0


def put_down(rows: Sequence[Row], options: argparse.Namespace, command: str) -> None:
    """Write the rows of the models measured so far."""
    if not rows:
        return
    write_csv(options.out / "switch.csv", rows, COLUMNS)
    sections = []
    for name in dict.fromkeys(SECTION.format(**row) for row in rows):
        here = [row for row in rows if SECTION.format(**row) == name]
        sections.append(
            (name, table([row | {"milliseconds": 1e3 * row["seconds"] if "seconds" in row else None} for row in here], TABLE))
        )
    write_markdown(options.out / "switch.md", "Switching between two adapters of a live model", command, sections)
    plots.switching(rows, options.out / "switch.png")


def measure(options: argparse.Namespace, width: int, dtype: str, folder: Path) -> list[Row]:
    """All contestants on copies of one model, in turn."""
    base = build(width, options.layers, dtype).to(options.device).eval().requires_grad_(False)
    tokens = torch.randint(0, VOCABULARY, (1, options.tokens), generator=torch.Generator().manual_seed(0)).to(options.device)
    common: Row = {"device": options.device, "width": width, "layers": options.layers, "dtype": dtype}
    found: list[Contestant] = []
    missing: list[Row] = []
    saved = {name: adapter(base, folder / name, values, draw) for name, values, draw in (("a", 0, 0), ("b", 1, 1), ("c", 2, 0))}
    makers = [partial(pooled, saved=saved), partial(pooled, saved=saved, other="c"), partial(trained, saved=saved), lora]
    makers += [partial(lora, merged=False), shira]
    if options.device == "cuda":
        makers.insert(1, partial(pooled, saved=saved, resident=False))
    for make in makers:
        try:
            found.append(make(fresh(base)))
        except Unavailable as error:
            key = getattr(make, "func", make).__name__
            missing.append(common | {"method": key, "label": f"PEFT {key}", "note": str(error)})
    times: dict[str, list[float]] = {one.key: [] for one in found}
    forwards: dict[str, list[float]] = {one.key: [] for one in found} | {"plain": []}
    with torch.inference_mode():
        for turn in range(options.repeats + 2):
            for one in found:
                times[one.key].append(seconds(partial(one.switch, "ab"[turn % 2]), options.device))
                forwards[one.key].append(seconds(partial(one.model, tokens), options.device))
            forwards["plain"].append(seconds(partial(base, tokens), options.device))
    expected = {name: layer.weight for name, layer in linears(base).items()}
    rows = []
    for one in found:
        one.switch(None)
        median, low, high = quantiles(times[one.key][2:])
        different = sum(int((weight != expected[name]).sum()) for name, weight in one.base().items())
        rows.append(common | {
            "method": one.key, "label": one.label, "trained": one.trained, "seconds": median, "seconds_p20": low,
            "seconds_p80": high, "ratio": over(times[one.key], times["pool"]),
            "forward_seconds": quantiles(forwards[one.key][2:])[0], "forward_ratio": over(forwards[one.key], forwards["plain"]),
            "changed": different / sum(weight.numel() for weight in expected.values()), "note": None,
        })  # fmt: skip
    return rows + missing


def over(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """The median, over the rounds that count, of the ratio of two times of one round."""
    return statistics.median(a / b for a, b in zip(mine[2:], theirs[2:], strict=True))


def seconds(call: Callable[[], object], device: str) -> float:
    """The time of one call, with what it started on a GPU."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def adapter(base: nn.Module, path: Path, values: int, draw: int) -> Path:
    """An adapter of sprand with random changes."""
    model = sprand.apply(fresh(base), density=PEER_DENSITY, seed=draw)
    randomize(sprand.parameters(model), values)
    return sprand.save(model, path)


def randomize(parameters: Sequence[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data.copy_(0.01 * torch.randn(p.shape, generator=generator))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in linears(model).items()}


def pooled(model: nn.Module, saved: dict[str, Path], other: str = "b", resident: bool = True) -> Contestant:
    """The pool: adapters with other positions, or with the same; on a GPU resident there, or copied from the host each time."""
    pool = AdapterPool(model, None if resident else 0)
    pool.add("a", saved["a"])
    pool.add("b", saved[other])
    count = sum(target["nnz"] for target in AdapterFile.read(saved["a"]).targets.values())
    what = "" if resident else ", from host memory"
    what += ", same positions" if other == "c" else ""
    return Contestant("pool" + what.replace(",", ""), f"sprand pool{what}", model, count, pool.switch, partial(weights_of, model))


def trained(model: nn.Module, saved: dict[str, Path]) -> Contestant:
    """`sprand.switch`, which attaches what trains."""
    for name in "ab":
        sprand.load(model, saved[name], name)
    count = sum(p.numel() for p in sprand.parameters(model))
    return Contestant("switch", "sprand.switch", model, count, partial(sprand.switch, model), partial(weights_of, model))


def peft_model(model: nn.Module, config: str, **fields) -> tuple[nn.Module, int]:
    """A PEFT model with random adapters "a" and "b", and the scalars of one."""
    try:
        import peft
    except ImportError as error:
        raise Unavailable(f"not installed: {error.name}") from error
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, said aloud: it warns otherwise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rank, names = matching_rank(model), targets(model)
        make = partial(getattr(peft, config), r=rank, target_modules=names, **fields)
        wrapped = peft.get_peft_model(model, make(), adapter_name="a")
        count = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        wrapped.add_adapter("b", make(**{"random_seed": 1} if "random_seed" in fields else {}))
    randomize([p for name, p in wrapped.named_parameters() if ".lora_" in name or ".shira_" in name], 0)
    return wrapped.eval().requires_grad_(False), count


def merging(wrapped: nn.Module) -> Callable[[str | None], None]:
    """PEFT's way to a plain forward: unmerge, choose, merge."""

    def switch(name: str | None) -> None:
        wrapped.unmerge_adapter()
        if name is not None:
            wrapped.set_adapter(name)
            wrapped.merge_adapter()

    wrapped.merge_adapter()
    return switch


def of_layers(wrapped: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module.weight
        for name, module in wrapped.named_modules()
        if name.endswith(".base_layer")
    }


def lora(model: nn.Module, merged: bool = True) -> Contestant:
    """PEFT LoRA, merged, or in the forward."""
    wrapped, count = peft_model(model, "LoraConfig")
    switch = merging(wrapped) if merged else lambda name: name and wrapped.set_adapter(name)
    key, how = ("lora", "unmerge, set_adapter, merge") if merged else ("lora-unmerged", "set_adapter alone")
    return Contestant(key, f"PEFT LoRA, {how}", wrapped, count, switch, partial(of_layers, wrapped))


def shira(model: nn.Module) -> Contestant:
    """PEFT SHiRA with random masks, merged."""
    wrapped, count = peft_model(model, "ShiraConfig", mask_type="random", random_seed=0)
    label = "PEFT SHiRA, unmerge, set_adapter, merge"
    return Contestant("shira", label, wrapped, count, merging(wrapped), partial(of_layers, wrapped))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--widths", nargs="+", type=int, default=[256, 768])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--tokens", type=int, default=128, help="of the forward that is timed after each switch")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="default: results/, or that of the card")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all?")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible to torch")
    options.out = options.out or (RESULTS if options.device == "cpu" else timing.default_out())
    if options.quick:
        options.widths, options.layers, options.tokens, options.repeats, options.dtypes = [64], 1, 8, 3, ["bf16"]
    if min(*options.widths, options.layers, options.tokens, options.repeats) < 1:
        parser.error("expected positive widths, layers, tokens and repeats")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
