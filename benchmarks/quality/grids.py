"""The named grids of the quality suite: tasks at a size, methods, budgets, and the learning rates to try."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sprand
from quality.training import TaskPlan
from quality.variants import VARIANTS
from sprand.cli.finetune.settings import PEER_RATES, peer_rate
from sprand.selection.strategies import STRATEGIES

BUDGETLESS = ("untrained", "full", "head")
SAME_MASK = {"taylor_fo": "snip"}  # tested in tests/test_selection.py: one order, one mask
SALIENCE = tuple(name for name, strategy in STRATEGIES.items() if name not in SAME_MASK and not strategy.columns)
Cell = tuple[str, str, float | None]
HALF_DECADE = 10**0.5


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is run, in which order.

    Attributes:
        title: of the table.
        tasks: by name.
        methods: those that are run at every budget, and of `BUDGETLESS` those that are run once per task.
        blocks: task and budget of the cells, most wanted first; those without a budget follow the first block of a task.
        confirms: for a task, or a task and budget, that only confirms what others found, the methods that are run there unless
            others are asked for.
        rates: the learning rates of a cell, rising.
        extend: whether one more rate is tried where the best is at an edge.
        seeds: the first tries the rates; the others repeat the best.
        many_budgets: whether the figure sets results against the trained count, or lists them by method.
        own_options: further fields of `Settings` for one method of a task.
    """

    title: str
    tasks: dict[str, TaskPlan]
    methods: tuple[str, ...]
    blocks: tuple[tuple[str, float], ...]
    rates: Callable[[str, str, float | None], list[float]]
    extend: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    many_budgets: bool = False
    confirms: dict[str | tuple[str, float], tuple[str, ...]] = dataclasses.field(default_factory=dict)
    own_options: dict[tuple[str, str], dict[str, Any]] = dataclasses.field(default_factory=dict)

    def cells(
        self, tasks: Sequence[str], methods: Sequence[str] | None = None, budgets: Sequence[float] | None = None
    ) -> Iterator[Cell]:
        """Task, method and budget of everything that is run, most wanted first.

        Args:
            tasks: by name.
            methods: None for those that the grid plans for each task.
            budgets: None for those that the grid plans for each task.
        """
        blocks = [block for block in self.blocks if block[0] in tasks and (budgets is None or block[1] in budgets)]
        blocks += [(task, budget) for task in tasks for budget in budgets or () if (task, budget) not in blocks]
        seen = set()
        for task, budget in blocks:
            wanted = methods or self.confirms.get((task, budget)) or self.confirms.get(task, self.methods)
            if task not in seen:
                yield task, "untrained", None
            yield from ((task, method, budget) for method in wanted if method not in BUDGETLESS)
            if task not in seen:
                yield from ((task, method, None) for method in wanted if method in BUDGETLESS[1:])
            seen.add(task)


def lattice(step: int) -> float:
    """Rates half a decade apart, to two digits: 0 is 1, -1 is 0.32, -2 is 0.1."""
    return float(f"{10 ** (step / 2):.1e}")


BY_GRADIENTS = ("recompute", "gradient", "snip", "force", "taylor_fo", "fisher", "token_fisher", "grasp")
COLUMNS = tuple(f"columns {strategy}" for strategy in ("random", "gradient", "token_fisher"))


def family(method: str) -> str:
    """What decides the rates to try: the peers by name, masks chosen with gradients, and all other entries."""
    if method in ("lora", *BUDGETLESS):
        return method
    return "gradients" if method.split()[-1] in BY_GRADIENTS else "entries"


FIRST_LOOK_RATES = {  # the middle of three
    ("sst2", "sparse", 0.001): 1e-2, ("sst2", "sparse", 0.01): 5e-3,
    ("sst2", "lora", 0.001): 5e-3, ("sst2", "lora", 0.01): 2e-3, ("sst2", "full", None): 2e-4,
    ("shakespeare", "sparse", 0.001): 1e-1, ("shakespeare", "sparse", 0.01): 3e-2,
    ("shakespeare", "lora", 0.001): 3e-2, ("shakespeare", "lora", 0.01): 1e-2, ("shakespeare", "full", None): 2e-3,
}  # fmt: skip

# The lowest of four rates, as a step of `lattice`, at each budget; from the first look and a few trials.
LOWEST = {
    "language model": {
        "entries": {3e-4: -3, 1e-3: -4, 3e-3: -4, 1e-2: -4, 5e-2: -5},
        "gradients": {3e-4: -4, 1e-3: -4, 3e-3: -4, 1e-2: -5, 5e-2: -5},
        "lora": {3e-4: -5, 1e-3: -5, 3e-3: -5, 1e-2: -5, 5e-2: -5}, "full": {None: -6}, "head": {None: -6},
    },
    "encoder": {
        "entries": {3e-4: -4, 1e-3: -5, 3e-3: -5, 1e-2: -6, 5e-2: -7},
        "gradients": {3e-4: -6, 1e-3: -6, 3e-3: -6, 1e-2: -7, 5e-2: -8},
        "lora": {3e-4: -5, 1e-3: -5, 3e-3: -5, 1e-2: -6, 5e-2: -6}, "full": {None: -9}, "head": {None: -5},
    },
    "chat": {
        "entries": {1e-3: -3, 2.875e-3: -3, 1e-2: -5, 5e-2: -5}, "gradients": {1e-3: -6, 1e-2: -7, 5e-2: -8},
        "lora": {1e-3: -6, 2.875e-3: -6, 1e-2: -6, 5e-2: -6},
    },
}  # fmt: skip
CHAT = {
    "max_steps": 100, "batch_size": 4, "limit_eval": 96, "warmup": 0.0, "dtype": "bfloat16", "calibration_examples": 128,
    "prompt_column": "question", "completion_column": "answer",
}  # fmt: skip


def first_look_rates(task: str, method: str, budget: float | None) -> list[float]:
    """Three rates around one, to two digits."""
    middle = FIRST_LOOK_RATES[task, method if method in ("lora", "full") else "sparse", budget]
    return [float(f"{middle * HALF_DECADE**step:.1e}") for step in (-1, 0, 1)]


def suite_rates(task: str, method: str, budget: float | None) -> list[float]:
    """Four rates from the lowest on."""
    kind = "language model" if task in LANGUAGE_MODELS else "encoder"
    return [lattice(LOWEST[kind][family(method)][budget] + step) for step in range(4)]


SHAKESPEARE = {"max_steps": 300, "batch_size": 8, "max_length": 128}
TEXT = ("tinyshakespeare/train.txt", "tinyshakespeare/dev.txt", "tinyshakespeare/test.txt")
SENTENCES = {"batch_size": 16, "calibration_examples": 256}
LANGUAGE_MODELS = ("shakespeare",)


def rows_of(folder: str, **options: Any) -> TaskPlan:
    """A task of all-MiniLM-L6-v2 on three files."""
    return TaskPlan(None, *(f"{folder}/{part}.tsv" for part in ("train", "dev", "test")), SENTENCES | options)


FIRST_LOOK = Grid(
    title="A first look at quality",
    tasks={
        "shakespeare": TaskPlan("stories260k-hf", *TEXT, SHAKESPEARE),
        "sst2": rows_of("sst2", limit_train=1000, limit_eval=600, epochs=1.0, max_length=48),
    },
    methods=("random", *SALIENCE, "lora", "full"),
    blocks=(("shakespeare", 0.001), ("shakespeare", 0.01), ("sst2", 0.001), ("sst2", 0.01)),
    rates=first_look_rates,
    seeds=(0, 1),
    own_options={  # an eighth of the width: from the width on, LIFT is magnitude
        ("sst2", "lift"): {"strategy_option": (("rank", 48),)}, ("shakespeare", "lift"): {"strategy_option": (("rank", 8),)},
    },
)  # fmt: skip

NARROW = (  # a Llama 64 wide has no whole column of each weight at 1 % and below
    *("random", "lora", "gradient", "uniform", "snip", "shira", "peft-sparta"), *VARIANTS, "full", "head",
)  # fmt: skip
CONFIRMING = ("random", "lora", "gradient", "shira", "peft-sparta", "full", "head")
SUITE = Grid(
    title="Quality at equal trained counts",
    tasks={
        "shakespeare": TaskPlan(
            "stories260k-hf", *TEXT, SHAKESPEARE | {"calibration_examples": 256}, old="tinystories_sample/test.txt"
        ),
        "sst2": rows_of("sst2", limit_train=1500, epochs=1.0, max_length=48),
        "subj": rows_of("subj", limit_train=1000, epochs=1.0, max_length=48),
        "qnli": rows_of("qnli_small", limit_train=2500, epochs=2.0, batch_size=32, max_length=64),
    },
    methods=(*NARROW, *COLUMNS),
    blocks=(
        ("shakespeare", 0.01), ("shakespeare", 0.001), ("shakespeare", 0.05), ("sst2", 0.01), ("subj", 0.01), ("qnli", 0.01),
        ("shakespeare", 0.0003), ("sst2", 0.001), ("subj", 0.001),
    ),
    confirms={
        **dict.fromkeys(("sst2", "subj"), CONFIRMING), "qnli": ("random", "lora"),
        **dict.fromkeys((("shakespeare", budget) for budget in (0.01, 0.001, 0.0003)), NARROW),
        **dict.fromkeys((("sst2", 0.001), ("subj", 0.001)), ("random", "lora", "gradient")),
    },
    rates=suite_rates,
    extend=True,
    many_budgets=True,
)  # fmt: skip

GRIDS = {"suite": SUITE, "first_look": FIRST_LOOK}


def own(plan: TaskPlan, width: int, rms: float) -> Grid:
    """The suite on another model and other files: four rates around the default of each method.

    Args:
        plan: the task.
        width: the model's hidden size.
        rms: the root mean square of its linear weights.
    """

    def rates(task: str, method: str, budget: float | None) -> list[float]:
        if method in PEER_RATES and method != "full":
            middle = peer_rate(method, width)
        else:
            middle = sprand.suggest_lr(density=budget or 1.0, rms=rms, strategy=method, width=width)
        return [float(f"{middle * HALF_DECADE**step:.1e}") for step in (-1.5, -0.5, 0.5, 1.5)]

    blocks = tuple(("own", budget) for budget in (0.01, 0.001, 0.05, 0.003, 0.0003))
    return dataclasses.replace(SUITE, title="Quality on a task of your own", tasks={"own": plan}, blocks=blocks, rates=rates)


def chat(model: Path, data: Path, folder: Path) -> Grid:
    """Tasks of a language model with a chat template: school maths, and words spelled backward.

    Args:
        model: its folder.
        data: folder with `gsm8k`.
        folder: where rows of `reasoning-gym` are made.
    """

    def rows(place: Path, length: int, **options: Any) -> TaskPlan:
        files = [str((place / f"{part}.jsonl").resolve()) for part in ("train", "dev", "test")]
        return TaskPlan(str(model.resolve()), *files, CHAT | {"max_length": length} | options, chat=True)

    def rates(task: str, method: str, budget: float | None) -> list[float]:
        return [lattice(LOWEST["chat"][family(method)][budget] + step) for step in range(4)]

    return Grid(
        title="Quality on a language model with a chat template",
        tasks={
            "gsm8k": rows(data / "gsm8k", 160),
            "spell_backward": rows(folder / "spell_backward", 64),
        },
        methods=("random", "gradient", *COLUMNS, "lora", "diagonal blocks", "relative"),
        blocks=tuple((task, budget) for budget in (0.01, 0.001, 0.05, 2.875e-3) for task in ("spell_backward", "gsm8k")),
        rates=rates,
        extend=True,
        seeds=(0,),
        many_budgets=True,
    )
