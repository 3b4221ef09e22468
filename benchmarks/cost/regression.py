"""Fails when the step of sprand, over the frozen model's, has become longer by more than 15 % of the ratio that is committed.

Ratios of CPU time within one process are compared, never seconds. `regression.json` holds one ratio for each pair of instruction
sets, PyTorch's and sprand's. Where it has none for this machine's, the step is held against the bound that holds anywhere: full
AdamW's step of the same rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from methods import Trainer, build, expand, fresh, random_tokens
from report import RESULTS, instruction_sets, machine, one_thread

WIDTH, LAYERS, TOKENS, DENSITY = 384, 1, 512, 0.01
ROUNDS, WARMUP = 15, 3
MAY_WORSEN = 0.15
TRIES = 3


@one_thread()
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    committed = json.loads(options.file.read_text(encoding="utf-8")) if options.file.exists() else {}
    if options.write:
        return write(options.file, committed)
    return check(committed.get(instruction_sets(), {}).get("ratio"))


def measure() -> tuple[float, float]:
    """Medians, over the rounds, of the CPU time of a step over the frozen model's step of the same round.

    Returns:
        sprand's ratio, and full AdamW's.
    """
    base, tokens = build(WIDTH, LAYERS, "fp32"), random_tokens(TOKENS)
    methods = expand(["frozen", "sprand", "full"], [DENSITY], "fp32")
    trainers = [Trainer.of(method, fresh(base), tokens) for method in methods]
    taken: list[list[float]] = [[], [], []]
    for _ in range(WARMUP + ROUNDS):
        for trainer, times in zip(trainers, taken, strict=True):
            start = time.process_time()
            trainer.step()
            times.append(time.process_time() - start)
    frozen, ours, full = (times[WARMUP:] for times in taken)
    return tuple(statistics.median(a / b for a, b in zip(other, frozen, strict=True)) for other in (ours, full))


def check(committed: float | None) -> int:
    """Measure up to three times, and pass with the first measurement that is within bounds."""
    where = instruction_sets()
    for turn in range(1, TRIES + 1):
        ours, full = measure()
        if committed is None:
            bound, what = full, f"full AdamW's of the same rounds; no ratio is committed for {where}"
        else:
            bound, what = committed * (1 + MAY_WORSEN), f"the committed {committed:.3f} and {100 * MAY_WORSEN:g} %, {where}"
        print(f"regression: sprand's step is {ours:.3f} times the frozen model's; at most {bound:.3f} ({what})", flush=True)
        if ours <= bound:
            return 0
        if turn < TRIES:
            print("regression: above the bound, measured again", flush=True)
    print(f"regression: FAILED, above the bound {TRIES} times", file=sys.stderr)
    return 1


def write(file: Path, committed: dict[str, dict[str, object]]) -> int:
    """Keep the median of five measurements as the ratio of this machine's instruction sets."""
    ratios = sorted(measure()[0] for _ in range(5))
    facts = machine()
    kept = {"ratio": round(ratios[2], 4), "measured": [round(r, 4) for r in ratios]}
    kept |= {name: facts[name] for name in ("date", "CPU", "torch", "sprand")}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(committed | {instruction_sets(): kept}, indent=2) + "\n", encoding="utf-8")
    print(f"regression: {instruction_sets()}: {kept['ratio']:.3f}, of {kept['measured']}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="measure five times and keep the median as this machine's ratio")
    parser.add_argument("--file", type=Path, default=RESULTS / "regression.json", help="the committed ratios")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
