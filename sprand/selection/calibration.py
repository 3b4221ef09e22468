"""Calibration: gradients of the targets over batches of data, in bounded memory, with the model left as it was."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.sites import Site
from ..layers.units import CHUNK
from .batches import Batches, loss_of, scaled_logits, split
from .flow import flow
from .inputs import SCORES, InputSums
from .strategies import Stats
from .untouched import untouched

try:
    import resource
except ImportError:  # Windows
    resource = None

logger = logging.getLogger("sprand")


@dataclass(frozen=True)
class Calibration:
    """What calibration may use.

    Attributes:
        data: batches, or None.
        loss_fn: `loss_fn(model, batch)` gives a scalar; None takes the model's own loss.
        memory: bytes for accumulators, or `"auto"`: half of what is free on their device.
        dtype: of accumulators, float32 or bfloat16 (float64 for float64 weights).
        device: of accumulators; None is that of each weight.
        examples: stop after the batch that reaches as many; None reads all data.
    """

    data: Iterable[Any] | None = None
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
    memory: int | str = "auto"
    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None
    examples: int | None = 1024

    def __post_init__(self) -> None:
        if self.memory != "auto" and not _is_count(self.memory):
            raise ValueError(f"calibration_memory: expected 'auto' or a positive number of bytes, got {self.memory!r}")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"calibration_dtype: expected torch.float32 or torch.bfloat16, got {self.dtype}")
        if self.examples is not None and not _is_count(self.examples):
            raise ValueError(f"calibration_examples: expected a positive int or None, got {self.examples!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass
class Sums:
    """Accumulators of a group of targets while a pass over the data fills them."""

    sites: Sequence[Site]
    values: dict[str, Tensor]
    squared: bool = False
    weight: float = 1.0  # of the batch that is worked on
    batch: int = 0
    bad: dict[str, Tensor] = field(default_factory=dict)  # first batch with a gradient that is not finite, or -1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, a backward pass adds the gradient of every target of the group here and frees it at once."""
        with ExitStack() as stack:
            for site in self.sites:
                site.weight.requires_grad_(True)
                handle = site.weight.register_post_accumulate_grad_hook(lambda p, name=site.name: self._take(name, p))
                stack.callback(handle.remove)
            yield

    def add(self, name: str, grad: Tensor) -> None:
        """Add a gradient to the sum of its target, a chunk at a time."""
        grad = grad.detach()
        if grad.is_sparse:
            grad = grad.to_dense()
        grad = grad.contiguous().view(-1)
        self._look(name, grad)
        total = self.values[name].view(-1)
        dtype = torch.promote_types(total.dtype, torch.float32)
        for chunk, place in zip(grad.split(CHUNK), total.split(CHUNK), strict=True):
            chunk = chunk.to(place.device, dtype)
            place.add_(chunk.square() if self.squared else chunk, alpha=self.weight)

    def finish(self, examples: int) -> None:
        """Divide by the number of examples, and prove that every gradient was finite.

        Raises:
            ValueError: A gradient was not finite; the message names the tensor and the batch.
        """
        batches = {site.name: int(self.bad[site.name]) for site in self.sites if site.name in self.bad}
        bad = {name: batch for name, batch in batches.items() if batch >= 0}
        if bad:
            name, batch = min(bad.items(), key=lambda item: item[1])
            raise ValueError(
                f"calibration: the gradient of {name} is not finite at batch {batch} (from 0); look at that batch, or load the "
                "model in bfloat16 or float32"
            )
        for value in self.values.values():
            value.div_(examples)

    def _take(self, name: str, p: nn.Parameter) -> None:
        grad, p.grad = p.grad, None
        self.add(name, grad)

    def _look(self, name: str, grad: Tensor) -> None:
        """Note the batch if this is the target's first gradient that is not finite; nothing waits for the device."""
        bad = self.bad.get(name)
        if bad is None:
            bad = torch.full((), -1, dtype=torch.int64, device=grad.device)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        fine = torch.isfinite(grad.sum(dtype=dtype)) | (bad >= 0)
        self.bad[name] = torch.where(fine, bad, self.batch)


def calibrate(
    model: nn.Module, sites: Sequence[Site], needs: str | None, run: Calibration, options: Mapping[str, Any]
) -> Iterator[tuple[Site, Stats]]:
    """What a strategy needs to know of each target, in their order, one group of them in memory at a time.

    Raises:
        ValueError: No data is given, or none that can be read as often as needed; a gradient is not finite; or the memory is
            too small for one target.
    """
    if needs is None:
        yield from ((site, Stats()) for site in sites)
        return
    if needs in SCORES:
        yield from _of_inputs(model, sites, needs, run)
        return
    for site in sites:
        if not site.weight.is_floating_point():
            raise ValueError(f"calibration: expected a floating point weight, got {site.weight.dtype} for {site.name}")
    whole = needs == "hessian_gradient"  # the product runs over all targets, so their gradients are held together
    groups = _groups(sites, run, 2 if whole else 1)
    if whole and len(groups) > 1:
        raise ValueError(
            f"calibration_memory: this strategy holds the gradients of all targets at once, {2 * _bytes_of(sites, run):,} "
            "bytes, which do not fit; raise it, or give calibration_device='cpu' or calibration_dtype=torch.bfloat16"
        )
    passes = len(groups) * (2 if whole else 1)
    batches = None
    if needs != "flow" or run.data is not None:
        batches = Batches(model, run.data, run.examples, passes)
    started = time.perf_counter()
    for number, group in enumerate(groups):
        with untouched(model, checkpointing=needs in ("gradient", "fisher")):
            if needs == "flow":
                sums, examples = _flows(model, group, batches, run), 1
            elif whole:
                with scaled_logits(model, options.get("temperature", 1.0), run.loss_fn is None):
                    gradient, examples = _gradients(model, group, batches, run, "gradient")
                    sums = _hessian_products(model, group, batches, run, gradient.values)
            else:
                sums, examples = _gradients(model, group, batches, run, needs)
        _log((number + 1, len(groups)), group, examples, started, _bytes_of(group, run))
        for site in group:
            yield site, Stats(**{needs: sums.values.pop(site.name)}, examples=examples)


def _of_inputs(model: nn.Module, sites: Sequence[Site], needs: str, run: Calibration) -> Iterator[tuple[Site, Stats]]:
    """The scores of the inputs of each target, in one pass: their accumulators are small."""
    sums, batches = InputSums(sites, needs), Batches(model, run.data, run.examples, 1)
    started = time.perf_counter()
    with untouched(model, checkpointing=needs == "token_fisher"):
        examples = sums.collect(model, batches, run.loss_fn)
    _log((1, 1), sites, examples, started, sum(value.nbytes for value in sums.values.values()))
    for site in sites:
        yield site, Stats(**{needs: sums.values[site.name]}, examples=examples)


def _log(place: tuple[int, int], group: Sequence[Site], examples: int, started: float, size: int) -> None:
    logger.info(
        "calibration: group %d of %d, %d targets, %d examples, %.1f s so far, accumulators of %.0f MB, peak %s",
        *place, len(group), examples, time.perf_counter() - started, size / 1e6, _peak(group[0].device),
    )  # fmt: skip


def _flows(model: nn.Module, group: Sequence[Site], batches: Batches | None, run: Calibration) -> Sums:
    """The gradients of SynFlow's pass, for an input of ones, or one shaped like the first batch."""
    sums = _zeros(group, run)
    batch = None if batches is None else next(iter(batches))[1]
    with sums.listening():
        flow(model, batch, run.loss_fn is not None)
    sums.finish(1)
    return sums


def _gradients(model: nn.Module, group: Sequence[Site], batches: Batches, run: Calibration, needs: str) -> tuple[Sums, int]:
    """The mean gradient over the examples, or the mean of the squares of each example's own."""
    sums, examples = _zeros(group, run), 0
    sums.squared = needs == "fisher"
    with sums.listening():
        for sums.batch, (count, batch) in enumerate(batches):
            parts = split(batch, count) if sums.squared else [batch]
            sums.weight = 1.0 if sums.squared else float(count)
            for part in parts:
                loss_of(model, part, run.loss_fn, sums.batch).backward()
            examples += count
    sums.finish(examples)
    return sums, examples


def _hessian_products(
    model: nn.Module, group: Sequence[Site], batches: Batches, run: Calibration, vectors: Mapping[str, Tensor]
) -> Sums:
    """Hessian of the mean loss times vectors, over all of a group of targets together."""
    sums, examples = _zeros(group, run), 0
    for site in group:
        site.weight.requires_grad_(True)
    weights = [site.weight for site in group]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the only one with second derivatives
        for sums.batch, (count, batch) in enumerate(batches):
            loss = loss_of(model, batch, run.loss_fn, sums.batch)
            grads = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
            products = [
                (grad * vectors[site.name].to(grad.device, grad.dtype)).sum().to(loss.device)
                for grad, site in zip(grads, group, strict=True)
                if grad is not None and grad.requires_grad
            ]
            seconds = torch.autograd.grad(sum(products), weights, allow_unused=True) if products else ()
            sums.weight, examples = float(count), examples + count
            for site, second in zip(group, seconds, strict=False):
                if second is not None:
                    sums.add(site.name, second)
    sums.finish(examples)
    return sums


def _zeros(group: Sequence[Site], run: Calibration) -> Sums:
    values = {}
    for site in group:
        weight = site.weight
        values[site.name] = torch.zeros(weight.shape, dtype=_dtype(weight, run), device=run.device or weight.device)
    return Sums(group, values)


def _dtype(weight: Tensor, run: Calibration) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else run.dtype


def _bytes_of(group: Sequence[Site], run: Calibration) -> int:
    return sum(site.numel * _dtype(site.weight, run).itemsize for site in group)


def _groups(sites: Sequence[Site], run: Calibration, copies: int) -> list[list[Site]]:
    """Neighbouring targets whose accumulators fit into memory together."""
    limit = run.memory if run.memory != "auto" else _free(run.device or sites[0].device) // 2
    groups: list[list[Site]] = [[]]
    for site in sites:
        need = copies * _bytes_of([site], run)
        if need > limit and run.memory != "auto":
            raise ValueError(
                f"calibration_memory: the accumulator of {site.name} alone takes {need:,} bytes, got {limit:,}; raise it, or "
                "give calibration_device='cpu' or calibration_dtype=torch.bfloat16"
            )
        if groups[-1] and copies * _bytes_of([*groups[-1], site], run) > limit:
            groups.append([])
        groups[-1].append(site)
    return groups


def _peak(device: torch.device) -> str:
    """The highest use of memory so far; counters of the user are not reset for it."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e6:.0f} MB allocated on the GPU"
    if resource is None:
        return "not measured"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:.0f} MB of the process"


def _free(device: torch.device | str) -> int:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 33
