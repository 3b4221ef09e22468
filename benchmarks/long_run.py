"""20,000 steps of a small model: memory, finite numbers, untouched weights, and density 1 beside dense AdamW."""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plots
import sprand
from gpu.blocks import Block, Shape
from peak_memory import MIB, resident
from report import RESULTS, Progress, Row, command_line, progress, write_csv, write_markdown
from report import markdown as table
from sprand.layers.sites import sites_of

SYMBOLS, BATCH, LENGTH, LAYERS = 32, 4, 32, 1
SHAPE = Shape(hidden=64, key_value=64, feed_forward=128, head=32)
SPARSE_DENSITY = 0.05
MAY_GROW = 4 * MIB
MAY_DIFFER = 0.01
COLUMNS = ("run", "label", "step", "loss", "floor", "rss_mib", "tensors", "tensor_mib")
CHECK_COLUMNS = ("run", "check", "expected", "got", "passed")
CHECK_TABLE = {
    "label": ("run", ""), "check": ("what must hold", ""), "expected": ("expected", ""), "got": ("got", ""), "passed": ("", ""),
}  # fmt: skip
Build = Callable[[nn.Module], torch.optim.Optimizer]


class Model(nn.Module):
    """A decoder of one block over 32 symbols. Input: `tokens [batch, length]`; output: logits `[batch, length, 32]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, SHAPE.hidden)
        self.place = nn.Parameter(0.5 * torch.randn(LENGTH, SHAPE.hidden))
        self.layers = nn.ModuleList(Block(SHAPE) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(SHAPE.hidden, eps=1e-5)
        self.head = nn.Linear(SHAPE.hidden, SYMBOLS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Source:
    """A random second-order Markov chain: each symbol is drawn by a fixed table from the two before it.

    Attributes:
        tokens: `[steps, batch, length + 1]`, uint8, no text twice.
        floor: the least loss any model can reach on them, in nats per symbol.
    """

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(SYMBOLS, SYMBOLS, SYMBOLS, generator=generator).mul_(2).softmax(-1)
        entropy = -(table * table.log()).sum(-1)
        self.tokens = torch.empty(steps * BATCH, LENGTH + 1, dtype=torch.uint8)
        total = 0.0
        for rows in self.tokens.split(4096):
            drawn = torch.randint(SYMBOLS, (len(rows), 2), generator=generator)
            rows[:, :2] = drawn
            before, last = drawn.unbind(1)
            for column in range(2, LENGTH + 1):
                total += float(entropy[before, last].sum())
                before, last = last, torch.multinomial(table[before, last], 1, generator=generator).squeeze(1)
                rows[:, column] = last
        self.floor = total / (len(self.tokens) * (LENGTH - 1))
        self.tokens = self.tokens.view(steps, BATCH, LENGTH + 1)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """The mean over all symbols that have two before them."""
        tokens = self.tokens[step].long()
        return F.cross_entropy(model(tokens[:, :-1])[:, 1:].flatten(0, 1), tokens[:, 2:].flatten())


@dataclass
class Run:
    """One way to train the linears of the blocks, and what was seen of it.

    Attributes:
        key, label: of its rows.
        attach: makes the model trainable, and its optimizer.
        losses: `[steps]`, float64.
        rows: one per hundredth of the steps.
        checks: what must hold of it.
    """

    key: str
    label: str
    attach: Build
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: list[dict[str, object]] = field(default_factory=list)
    checks: list[dict[str, object]] = field(default_factory=list)

    def check(self, what: str, expected: str, got: str, passed: bool) -> None:
        facts = {"run": self.key, "label": self.label, "check": what, "expected": expected, "got": got}
        self.checks.append(facts | {"passed": "yes" if passed else "NO"})

    def train(self, base: nn.Module, source: Source, bar: Progress) -> None:
        """All steps on a copy of `base`, looked at a hundred times; then the checks."""
        model = copy.deepcopy(base)
        optimizer = self.attach(model)
        steps = len(source.tokens)
        self.losses = torch.empty(steps, dtype=torch.float64)
        window = max(steps // 100, 1)
        for step in range(steps):
            loss = source.loss(model, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.losses[step] = loss.item()
            if (step + 1) % window == 0:
                del loss
                self.look(step + 1, window, source.floor)
                bar.advance()
        self.check_numbers(model, optimizer)
        self.check_memory()
        if isinstance(optimizer, sprand.SparseAdamW):
            self.check_weights(model, base)

    def look(self, step: int, window: int, floor: float) -> None:
        """One row: the mean loss of the window that ends here, resident memory, and the tensors that Python holds."""
        gc.collect()
        tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.rows.append({
            "run": self.key, "label": self.label, "step": step, "loss": self.losses[step - window : step].mean().item(),
            "floor": floor, "rss_mib": resident() / MIB, "tensors": len(tensors), "tensor_mib": sum(sizes.values()) / MIB,
        })  # fmt: skip

    def check_numbers(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = [t for held in optimizer.state.values() for t in held.values() if isinstance(t, Tensor)]
        bad = sum(int((~t.isfinite()).sum()) for t in (self.losses, *model.parameters(), *state))
        what = "losses, weights and moments that are not finite"
        self.check(what, "0", f"{bad:,}", bad == 0)

    def check_memory(self) -> None:
        """No more tensors at the end than after the first hundredth, and no growth of RSS after the second fifth."""
        counts = {(row["tensors"], row["tensor_mib"]) for row in self.rows}
        got = ", ".join(f"{tensors:,} ({mib:.3f} MiB)" for tensors, mib in sorted(counts))
        self.check("tensors, at every look", "the same", got, len(counts) == 1)
        fifth = max(len(self.rows) // 5, 1)
        rss = torch.tensor([row["rss_mib"] for row in self.rows])
        grown = float(rss[-fifth:].median() - rss[fifth : 2 * fifth].median()) if len(rss) > 2 * fifth else 0.0
        what = "RSS, median of the last fifth over that of the second, MiB"
        self.check(what, f"at most {MAY_GROW / MIB:g}", f"{grown:+.2f}", grown * MIB <= MAY_GROW)

    def check_weights(self, model: nn.Module, base: nn.Module) -> None:
        """Every entry that was not chosen, every other parameter and buffer is what it was, to the bit; and all after unmerge."""
        sprand.write(model)
        before = dict(base.named_parameters()) | dict(base.named_buffers())
        chosen = {site.name: site.entries.indices.long() for site in sites_of(model)}
        held = {name: t for name, t in model.state_dict(keep_vars=True).items() if name in before}
        untouched = drifted = changed = 0
        for name, tensor in before.items():
            mine, theirs = held[name].detach().flatten(), tensor.detach().flatten()
            free = torch.ones(len(theirs), dtype=torch.bool)
            if name in chosen:
                free[chosen[name]] = False
                changed += int((mine[chosen[name]] != theirs[chosen[name]]).sum())
            untouched += int(free.sum())
            if not torch.equal(mine[free], theirs[free]):
                drifted += int((mine[free] != theirs[free]).sum())
        self.check(f"of {untouched:,} untouched weights, those that differ", "0", f"{drifted:,}", drifted == 0)
        count = sum(map(len, chosen.values()))
        self.check(f"of {count:,} trained weights, those that differ", "more than none", f"{changed:,}", changed > 0)
        sprand.unmerge(model)
        restored = model.state_dict()
        different = sum(not torch.equal(restored[name], tensor) for name, tensor in before.items())
        self.check("tensors that differ after sprand.unmerge", "0", f"{different:,}", different == 0)


def linears(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.layers.modules() if isinstance(m, nn.Linear)]


def sparse(model: nn.Module, density: float, lr: float) -> torch.optim.Optimizer:
    """`sprand.apply` on the linears of the blocks; weight decay off, since it pulls a delta to zero and a weight elsewhere."""
    sprand.apply(model, density=density, seed=0, exclude_modules=["head"])
    return sprand.SparseAdamW(model, lr=lr, weight_decay=0.0)


def dense(model: nn.Module, lr: float, **way: bool) -> torch.optim.Optimizer:
    """PyTorch's AdamW on the same linears."""
    model.requires_grad_(False)
    return torch.optim.AdamW([p.requires_grad_() for p in linears(model)], lr=lr, weight_decay=0.0, **way)


def runs(lr: float) -> Iterator[Run]:
    percent = f"{100 * SPARSE_DENSITY:g} %"
    yield Run("sparse", f"sprand {percent}", lambda model: sparse(model, SPARSE_DENSITY, 3 * lr))
    yield Run("full", "sprand, density 1", lambda model: sparse(model, 1.0, lr))
    yield Run("dense", "AdamW, fused", lambda model: dense(model, lr, fused=True))
    yield Run("again", "AdamW, foreach", lambda model: dense(model, lr, foreach=True))


def compare(done: dict[str, Run]) -> None:
    """Density 1 against dense AdamW; what two of PyTorch's own AdamWs differ by is told beside it."""
    full, dense_run, again = ([row["loss"] for row in done[key].rows] for key in ("full", "dense", "again"))
    learned = dense_run[0] - min(dense_run)
    ours, theirs = (max(abs(a - b) for a, b in zip(other, dense_run, strict=True)) for other in (full, again))
    what = "largest distance of its loss curve from dense AdamW's, nats"
    expected = f"at most {100 * MAY_DIFFER:g} % of what was learned: {MAY_DIFFER * learned:.2g}"
    got = f"{ours:.2g} (two of PyTorch's AdamWs: {theirs:.2g})"
    done["full"].check(what, expected, got, ours <= MAY_DIFFER * learned)
    same = int((done["full"].losses != done["dense"].losses).nonzero().flatten()[:1].sum())
    done["full"].check("first step whose loss differs from dense AdamW's in any bit", "", f"{same:,}", True)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.manual_seed(0)
    base = Model()
    source = Source(options.steps)
    done: dict[str, Run] = {}
    gc.collect()
    gc.freeze()  # what exists so far is not looked at again
    try:
        with progress(4 * 100, "long run") as bar:
            for run in runs(options.lr):
                bar.say(f"{run.label}: {options.steps:,} steps")
                run.train(base, source, bar)
                done[run.key] = run
    finally:
        gc.unfreeze()
    compare(done)
    rows: list[Row] = [row for run in done.values() for row in run.rows]
    checks = [check for run in done.values() for check in run.checks]
    write_csv(options.out / "long_run.csv", rows, COLUMNS)
    write_csv(options.out / "long_run_checks.csv", checks, CHECK_COLUMNS)
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    size = f"{options.steps:,} steps of {BATCH} x {LENGTH} symbols, {sum(p.numel() for p in base.parameters()):,} weights"
    write_markdown(options.out / "long_run.md", "Long runs", command, [(size, table(checks, CHECK_TABLE))])
    plots.long_run(rows, options.out / "long_run.png")
    return int(any(check["passed"] == "NO" for check in checks))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--lr", type=float, default=1e-3, help="of density 1 and of AdamW; the sparse run takes three times it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="200 steps: does it run at all?")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps = 200
    if options.steps < 100:
        parser.error(f"expected at least 100 steps, got {options.steps}")
    if not Path("/proc/self/status").exists():
        parser.error("memory is read from /proc, which this system does not have")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
