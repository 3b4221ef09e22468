"""Training steps of several methods in turn, in one process: seconds by phase, and each over the frozen model's of its round."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from methods import Method, Times, Trainer, Unavailable, build, fresh, random_tokens
from report import Progress, Row, quantiles


@dataclass(frozen=True)
class Setting:
    """What is trained: the sizes of the model of `methods.build`, and the tokens of a batch.

    `length` is that of its sequences; None for 512, or for one sequence where 512 does not divide the tokens.
    """

    width: int
    layers: int
    dtype: str
    tokens: int
    length: int | None = None


def time_methods(setting: Setting, methods: Sequence[Method], repeats: int, warmup: int, bar: Progress) -> list[Row]:
    """All methods on one model, one step each in turn (A B C A B C ...).

    Args:
        setting: the model and the batch.
        methods: one row of each; a ratio needs the frozen model among them.
        repeats: rounds that count.
        warmup: rounds that do not.
        bar: told of each step, and of each method that cannot run.
    """
    facts = asdict(setting)
    trainers: dict[str, Trainer] = {}
    notes: dict[str, str] = {}
    try:
        base, tokens = build(setting.width, setting.layers, setting.dtype), random_tokens(setting.tokens, setting.length)
    except Unavailable as error:
        return [{**facts, **identity(method), "note": str(error)} for method in methods]
    for method in methods:
        try:
            trainers[method.key] = Trainer.of(method, fresh(base), tokens)
        except Unavailable as error:
            notes[method.key] = str(error)
            bar.say(f"{method.label} skipped, {error}")
    del base

    times: dict[str, list[Times]] = {key: [] for key in trainers}
    for index in range(warmup + repeats):
        gc.collect()
        for key, trainer in trainers.items():
            with uninterrupted():
                taken = trainer.step()
            if index >= warmup:
                times[key].append(taken)
            bar.advance()

    floor = [t.total for t in times.get("frozen", [])]
    rows = []
    for method in methods:
        row: dict[str, object] = {**facts, **identity(method), "note": notes.get(method.key)}
        if method.key in trainers:
            trainer, taken = trainers[method.key], times[method.key]
            row |= {"trained": trainer.trained, "repeats": len(taken)}
            row["seconds"], row["seconds_p20"], row["seconds_p80"] = quantiles([t.total for t in taken])
            if floor:
                ratios = [t.total / f for t, f in zip(taken, floor, strict=True)]
                row["ratio"], row["ratio_p20"], row["ratio_p80"] = quantiles(ratios)
            row |= {phase: quantiles([getattr(t, phase) for t in taken])[0] for phase in ("forward", "backward", "optimizer")}
            row |= {"loss_first": trainer.losses[0], "loss_last": trainer.losses[-1]}
        rows.append(row)
    return rows


def identity(method: Method) -> dict[str, object]:
    return {"method": method.key, "label": method.label, "density": method.density}


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """No garbage collection of Python's within the block."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
