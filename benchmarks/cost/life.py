"""What a method costs beside its steps: making a model ready to train, saving, the bytes of an adapter, and merging it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from methods import PEER_DENSITY, Method, Trainer, Unavailable, build, expand, fresh, random_tokens
from report import Progress, Row, quantiles
from rounds import identity

COLUMNS = (
    "unit", "machine", "width", "layers", "dtype", "method", "label", "density", "trained", "set_up", "set_up_p20", "set_up_p80",
    "save", "merge", "merge_p20", "merge_p80", "bytes", "bytes_per_weight", "repeats", "note",
)  # fmt: skip
TABLE = {
    "label": ("method", ""), "trained": ("trained weights", ",d"), "set_up_ms": ("set up, ms", ".1f"),
    "save_ms": ("save, ms", ".1f"),
    "merge_ms": ("merge, ms", ".1f"), "bytes": ("bytes on disk", ",d"), "bytes_per_weight": ("per trained weight", ".2f"),
    "note": ("", ""),
}  # fmt: skip
NAMES = ("sprand", "lora", "shira", "supertuning", "peft-sparta", "full")
SIZES = ((384, 2), (768, 4), (1024, 8))
QUICK_SIZES = ((64, 1),)
TOKENS = 32


def save_sprand(model: nn.Module, folder: Path) -> None:
    import sprand

    sprand.save(model, folder)


def merge_sprand(model: nn.Module) -> None:
    import sprand

    sprand.merge(model)


def save_sparta(model: nn.Module, folder: Path) -> None:
    folder.mkdir()
    model.save(str(folder), merged=False)


def save_all(model: nn.Module, folder: Path) -> None:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")


SAVE: dict[str, Callable[[nn.Module, Path], object]] = {
    "sprand": save_sprand,
    "peft-sparta": save_sparta,
    "full": save_all,
}
MERGE: dict[str, Callable[[nn.Module], object]] = {
    "sprand": merge_sprand,
    "peft-sparta": lambda model: model.merge_deltas(),
    "full": lambda model: None,
}


@dataclass(frozen=True)
class Size:
    """One model, and every method on a copy of it.

    Each turn a method is attached, does one step, so that its values are no zeros, is saved, and merged.
    """

    width: int
    layers: int
    dtype: str = "fp32"

    @property
    def unit(self) -> str:
        return f"{self.width} wide, {self.layers} layers, {self.dtype}"

    @property
    def methods(self) -> list[Method]:
        return expand(NAMES, [PEER_DENSITY], self.dtype)

    def measure(self, repeats: int, warmup: int, bar: Progress) -> list[Row]:
        facts = {"unit": self.unit, "width": self.width, "layers": self.layers, "dtype": self.dtype}
        try:
            base = build(self.width, self.layers, self.dtype)
        except Unavailable as error:
            return [{**facts, **identity(method), "note": str(error)} for method in self.methods]
        taken: dict[str, list[dict[str, float]]] = {method.key: [] for method in self.methods}
        notes: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as name:
            for turn in range(repeats + warmup):
                for method in self.methods:
                    if method.key not in notes:
                        try:
                            found = once(method, fresh(base), Path(name) / f"{method.key} {turn}")
                            taken[method.key] += [found] * (turn >= warmup)
                        except Unavailable as error:
                            notes[method.key] = str(error)
                            bar.say(f"{method.label} skipped, {error}")
                    bar.advance()
        rows = []
        for method in self.methods:
            row: dict[str, object] = {**facts, **identity(method), "repeats": repeats, "note": notes.get(method.key)}
            if taken[method.key]:
                row |= {name: int(taken[method.key][0][name]) for name in ("trained", "bytes")}
                row["bytes_per_weight"] = row["bytes"] / row["trained"]
                for what in ("set_up", "save", "merge"):
                    row[what], low, high = quantiles([one[what] for one in taken[method.key]])
                    row |= {f"{what}_p20": low, f"{what}_p80": high}
            rows.append(row)
        return rows


def once(method: Method, model: nn.Module, folder: Path) -> dict[str, float]:
    """One life of one adapter: seconds of each stage, and the bytes of its files."""
    name = method.key.partition("@")[0]
    start = time.perf_counter()
    trainer = Trainer.of(method, model, random_tokens(TOKENS))
    ready = time.perf_counter()
    trainer.step()
    trained = time.perf_counter()
    save = SAVE.get(name, lambda peft_model, path: peft_model.save_pretrained(path))
    save(trainer.model, folder)
    saved = time.perf_counter()
    with torch.no_grad():
        MERGE.get(name, lambda peft_model: peft_model.merge_and_unload())(trainer.model)
    merged = time.perf_counter()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"set_up": ready - start, "save": saved - trained, "merge": merged - saved, "bytes": size, "trained": trainer.trained}


def sizes(quick: bool) -> list[Size]:
    return [Size(*size) for size in (QUICK_SIZES if quick else SIZES)]


def shown(row: Row) -> Row:
    """A row with milliseconds beside its seconds."""
    return {**row, **{f"{what}_ms": 1e3 * row[what] for what in ("set_up", "save", "merge") if row.get(what) is not None}}
