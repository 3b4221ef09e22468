"""One small model through sprand: gradients against dense autograd, saving and loading, merging into files; by both doors."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import sprand
from architectures.batches import Call, loss, outputs
from sprand.checkpoint.merge import merge
from sprand.layers.sites import sites_of

DOORS, TARGETS = ("apply", "peft"), ("all-linear", "every parameter")
DENSITY = 0.05
PEFT_PREFIX = "base_model.model."

# A gradient may be off by this much of the largest of its weight, and of the largest of the model.
TOLERANCES = {torch.float64: (1e-6, 1e-12), torch.float32: (1e-3, 1e-6)}

Refused = (ValueError, NotImplementedError)


@dataclass
class Outcome:
    """What one model did, by one door, with one choice of targets.

    Attributes:
        gradients, load, files: `equal`, `wrong`, `refused`, or empty where it was not tried.
        words: what was said where something is not equal.
        unequal: weights with a wrong gradient.
    """

    gradients: str = ""
    load: str = ""
    files: str = ""
    words: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step that is `equal` when it ends, `refused` where sprand says so, and `wrong` after any other error."""
        setattr(self, name, "equal")
        try:
            yield
        except Unequal as error:
            self.unequal += error.names
            self.end(name, "wrong", str(error))
        except Skipped as error:
            self.end(name, "", str(error))
        except Refused as error:
            self.end(name, "refused", str(error))
        except Exception as error:  # of any kind: a crash is an outcome, too
            self.end(name, "wrong", f"{type(error).__name__}: {error}")

    def end(self, name: str, outcome: str, words: str) -> None:
        setattr(self, name, outcome)
        self.words.append(f"{name}: {' '.join(words.split())[:400]}")


class Unequal(Exception):
    """What sprand gives is not what it should be, for these weights."""

    def __init__(self, words: str, names: Sequence[str] = ()) -> None:
        super().__init__(words)
        self.names = names


class Skipped(Exception):
    """A step says nothing about sprand: transformers itself does not do it."""


class Subject:
    """A model that can be made again and again, calls of it, and what dense autograd says of them.

    Attributes:
        fresh: makes the model, always with the same weights.
        calls: what is called.
        dtype: of the gradients.
        gradients: of every parameter that has one, by name.
        outputs: what the calls give while nothing trains.
        unsaved: why files say nothing, where transformers does not save and load the model itself.
    """

    def __init__(self, fresh: Callable[[], nn.Module], calls: Sequence[Call], folder: Path) -> None:
        self.fresh, self.calls, self.folder = fresh, list(calls), folder
        self.dtype, self.gradients, self.outputs = self._dense()
        self.unsaved = self._save()

    def _dense(self) -> tuple[torch.dtype, dict[str, Tensor], list[Tensor]]:
        """The gradients of a copy whose weights all train, in float64 where the model computes in it."""
        for dtype in TOLERANCES:
            model = self.fresh().to(dtype).requires_grad_(True)
            try:
                loss(model, self.calls).backward()
                given = frozen(model, self.calls)
                gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                if not all(gradient.isfinite().all() for gradient in gradients.values()):
                    raise ValueError("a gradient is not finite")
            except Exception:  # of any kind: a model that mixes dtypes
                if dtype is torch.float32:
                    raise
                continue
            return dtype, gradients, given
        raise AssertionError("float32 is the last of the dtypes")

    def _save(self) -> str:
        """Save the base; what is wrong with what transformers reads back, or nothing."""
        base = self.folder / "base"
        try:
            model = self.fresh()
            model.save_pretrained(base)
            again = type(model).from_pretrained(base).eval()
        except Exception as error:  # of any kind: without sprand
            return f"transformers does not save and load it: {type(error).__name__}: {error}"
        if (wrong := different(model, again)) is not None:
            return f"transformers loads other values than it saves: {wrong}"
        return ""

    @property
    def reached(self) -> float:
        """The share of parameters that have a gradient."""
        counts = {n: p.numel() for n, p in self.fresh().named_parameters()}
        return sum(counts[n] for n, g in self.gradients.items() if g.any()) / max(1, sum(counts.values()))


def check(subject: Subject, door: str, targets: str) -> Outcome:
    """Everything for one door and one choice of targets."""
    outcome = Outcome()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        fields: dict[str, object] = {}
        with outcome.step("gradients"):
            model, fields, without = accepted(subject, door, targets)
            outcome.words += without
            check_gradients(subject, model)
        said = [str(warning.message) for warning in heard if "sprand" in str(warning.message)]
        if outcome.unequal and all(any(name in words for words in said) for name in outcome.unequal[:3]):
            outcome.gradients = "warned"
        outcome.words += list(dict.fromkeys(f"warning: {words}" for words in said))
        if fields:
            trained: list[nn.Module] = []
            with outcome.step("load"):
                trained.append(check_load(subject, door, fields))
            if trained:
                with outcome.step("files"):
                    check_files(subject, trained[0])
    shutil.rmtree(subject.folder / "adapter", ignore_errors=True)
    return outcome


def accepted(subject: Subject, door: str, targets: str) -> tuple[nn.Module, dict[str, object], list[str]]:
    """A model with entries that train, and the fields of a configuration that sprand takes.

    Of every parameter those that it refuses are left out, with its words.
    """
    if targets == "all-linear":
        fields: dict[str, object] = {"target_modules": "all-linear"}
        return attach(subject.fresh().to(subject.dtype), door, fields), fields, []
    names = [name for name, p in subject.fresh().named_parameters() if p.is_floating_point()]
    words = []
    while True:
        fields = {"target_modules": None, "target_parameters": names}
        try:
            return attach(subject.fresh().to(subject.dtype), door, fields), fields, words
        except Refused as error:
            told = {word.strip("'\":,;.").removeprefix(PEFT_PREFIX) for word in str(error).split()}
            left = [name for name in names if name not in told]
            if not left or left == names:
                raise
            reason = " ".join(str(error).split())
            for name in set(names) - set(left):
                reason = reason.replace(f"{PEFT_PREFIX}{name}", "NAME").replace(name, "NAME")
            if f"left out: {reason}" not in words:
                words.append(f"left out: {reason}")
            names = left


def attach(model: nn.Module, door: str, fields: Mapping[str, object]) -> nn.Module:
    """The model with entries that train."""
    if door == "apply":
        return sprand.apply(model, density=DENSITY, **fields)
    from peft import get_peft_model

    from sprand.peft import SprandConfig

    return get_peft_model(model, SprandConfig(density=DENSITY, **fields))


def inner(model: nn.Module) -> nn.Module:
    """The model of transformers inside of PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_gradients(subject: Subject, model: nn.Module) -> None:
    """Compare the gradient of every delta with the dense one at its entries."""
    own, floor = TOLERANCES[subject.dtype]
    largest = max((g.abs().max().item() for g in subject.gradients.values() if g.numel()), default=0.0)
    total = loss(inner(model), subject.calls)
    total.backward()
    wrong = {}
    for site in sites_of(model):
        entries = site.entries
        dense = subject.gradients.get(site.name.removeprefix(PEFT_PREFIX))
        dense = torch.zeros(site.shape, dtype=subject.dtype) if dense is None else dense
        expected = dense.flatten()[entries.indices.long()].double()
        got = torch.zeros_like(expected) if entries.delta.grad is None else entries.delta.grad.double()
        error = (got - expected).abs().max().item() if expected.numel() else 0.0
        if not error <= own * dense.abs().max().item() + floor * largest:
            kind = "none" if entries.delta.grad is None or not got.any() else f"off by {error / dense.abs().max().item():.2g}"
            wrong[site.name] = f"{site.name} ({type(site.module).__name__}) {kind}"
    if wrong:
        raise Unequal(f"{len(wrong)} of {len(sites_of(model))}: {', '.join(list(wrong.values())[:4])}", list(wrong))
    compare(frozen(inner(model), subject.calls), subject.outputs, "the outputs before training")


def check_load(subject: Subject, door: str, fields: Mapping[str, object]) -> nn.Module:
    """Save what was trained and load it into a fresh base; returns the merged model, and leaves the adapter's folder."""
    from peft import PeftModel

    folder = subject.folder / "adapter"
    model = attach(subject.fresh(), door, fields)
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape, generator=generator).to(p)
    with torch.no_grad():
        given = frozen(inner(model), subject.calls)
        if door == "apply":
            sprand.save(model, folder)
            loaded = sprand.load(subject.fresh(), folder)
        else:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(subject.fresh(), folder).eval()
        compare(frozen(inner(loaded), subject.calls), given, "the outputs after loading")
        merged = sprand.merge(model) if door == "apply" else model.merge_and_unload()
        compare(frozen(merged, subject.calls), given, "the outputs after merging")
        plain = sprand.unmerge(loaded) if door == "apply" else loaded.unload()
    if (wrong := different(subject.fresh(), plain)) is not None:
        raise Unequal(f"taken off, the base is not back: {wrong}")
    return merged


def check_files(subject: Subject, merged: nn.Module) -> None:
    """Merge the adapter into the files of the base, and load them."""
    if subject.unsaved:
        raise Skipped(subject.unsaved)
    out = subject.folder / "merged"
    try:
        merge(subject.folder / "base", [(subject.folder / "adapter", 1.0)], out)
        loaded = type(merged).from_pretrained(out).eval()
        if (wrong := different(merged, loaded)) is not None:
            raise Unequal(f"the merged files hold other values than the merged model: {wrong}")
    finally:
        shutil.rmtree(out, ignore_errors=True)


def frozen(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """What calls give of a model that does not train, for which PyTorch may round otherwise."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        try:
            return outputs(model.requires_grad_(False), calls)
        finally:
            for p in trained:
                p.requires_grad_(True)


def compare(got: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Prove that tensors are equal to the bit."""
    if len(got) != len(expected):
        raise Unequal(f"{what}: {len(got)} tensors instead of {len(expected)}")
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num()):
            off = (a - b).abs().max().item() if a.shape == b.shape else float("nan")
            raise Unequal(f"{what} are off by {off:.2g} of {b.abs().max().item():.2g}")


def different(one: nn.Module, other: nn.Module) -> str | None:
    """The first tensor in which two models differ, or None."""
    a, b = one.state_dict(), other.state_dict()
    if a.keys() != b.keys():
        return f"{sorted(a.keys() ^ b.keys())[:3]} are in one of them only"
    return next((name for name in a if not torch.equal(a[name].nan_to_num(), b[name].nan_to_num())), None)
