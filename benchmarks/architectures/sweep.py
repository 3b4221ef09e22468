"""Every architecture of transformers that can be built small, through both doors: what is equal, refused, wrong or not built."""

from __future__ import annotations

import argparse
import gc
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from architectures import batches, checks, small
from report import (
    RESULTS,
    Row,
    command_line,
    end_as_by_ctrl_c,
    markdown,
    one_thread,
    progress,
    read_csv,
    write_csv,
    write_markdown,
)

COLUMNS = (
    "architecture", "class", "parameters", "reached", "dtype", "door", "targets",
    "outcome", "gradients", "load", "files", "words",
)  # fmt: skip
WORST = ("wrong", "warned", "refused", "equal")
TRIES = 4  # classes of an architecture, until one is built and called


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    file = options.out / "architectures.csv"
    rows = read_csv(file) if file.exists() else []
    anew = {row["architecture"] for row in rows if row["outcome"] in options.again} | set(options.only or ())
    rows = [row for row in rows if row["architecture"] not in anew]
    done = {row["architecture"] for row in rows}
    names = [name for name, _ in small.configurations() if small.classes(name)]
    wanted = options.only or names
    if unknown := set(wanted) - set(names):
        raise SystemExit(f"no architecture of this transformers: {', '.join(sorted(unknown))}")
    todo = [name for name in wanted if name not in done][options.piece[0] - 1 :: options.piece[1]]
    warm_up()
    with progress(len(todo), "architectures") as bar:
        for name in todo:
            rows += in_child(name, options.seconds)
            write_csv(file, sorted(rows, key=lambda row: names.index(row["architecture"])), COLUMNS)
            mine = [row for row in rows if row["architecture"] == name]
            bar.say(f"{name}: {', '.join(dict.fromkeys(str(row['outcome']) for row in mine))}")
            bar.advance()
    print(summary(rows))
    write_markdown(
        options.out / "architectures.md",
        "Architectures of transformers",
        command_line(__file__, sys.argv[1:]),
        [("", table(rows))],
    )
    return int(any(row["outcome"] == "wrong" for row in rows))


def examine(name: str, folder: Path, doors: Sequence[str] = checks.DOORS) -> list[dict[str, Any]]:
    """The rows of one architecture, with files in a folder that is there."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class, reasons = CONFIG_MAPPING[name], []
    for class_name in small.largest_first(small.classes(name), config_class)[:TRIES]:
        try:
            fresh = small.build(config_class, class_name)
            model = fresh()
            subject = checks.Subject(fresh, batches.calls_of(model), folder)
        except Exception as error:  # of any kind: the next class may do
            reasons.append(f"{class_name}: {type(error).__name__}: {small.first_line(error)}")
            continue
        facts = {
            "architecture": name, "class": class_name, "parameters": sum(p.numel() for p in model.parameters()),
            "reached": round(subject.reached, 3), "dtype": str(subject.dtype).removeprefix("torch."),
        }  # fmt: skip
        return [facts | outcome_row(subject, door, targets) for door in doors for targets in checks.TARGETS]
    return [not_built(name, " | ".join(reasons))]


def outcome_row(subject: checks.Subject, door: str, targets: str) -> dict[str, Any]:
    outcome = checks.check(subject, door, targets)
    steps = outcome.gradients, outcome.load, outcome.files
    words = "; ".join(outcome.words).replace(f"{subject.folder}{os.sep}", "")
    return {
        "door": door, "targets": targets, "outcome": next(worst for worst in WORST if worst in steps), "gradients": steps[0],
        "load": steps[1], "files": steps[2], "words": words[:700],
    }  # fmt: skip


def not_built(name: str, why: str) -> dict[str, Any]:
    return {"architecture": name, "outcome": "not built", "words": why[:700]}


def warm_up() -> None:
    """Load once, before any fork, what every child needs."""
    import peft
    import transformers

    import sprand.peft

    transformers.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    gc.freeze()
    assert peft and sprand.peft


def in_child(name: str, seconds: float) -> list[dict[str, Any]]:
    """The rows of one architecture, from a forked process that is ended when it takes too long."""
    with tempfile.TemporaryDirectory(prefix="architectures_") as folder:
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            run_child(lambda: examine(name, Path(folder)), sender)
        os.close(sender)
        try:
            text = read_all(receiver, time.monotonic() + seconds)
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            os.close(receiver)
    if text is None:
        return [not_built(name, f"it takes more than {seconds:.0f} seconds")]
    return json.loads(text) if text else [not_built(name, f"the process ended with status {status}")]


def run_child(work: Callable[[], list[dict[str, Any]]], sender: int) -> None:
    """Send what `work` gives, and end; prints nothing."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        rows = work()
    except BaseException:
        rows = [not_built("", traceback.format_exc(limit=-2))]
    text = json.dumps(rows).encode() + b"\n"
    while text:
        text = text[os.write(sender, text) :]
    signal.pause()


def read_all(receiver: int, until: float) -> bytes | None:
    """A line from a pipe; None where it takes too long, and nothing where the other end is gone."""
    text = b""
    while not text.endswith(b"\n"):
        ready, _, _ = select.select([receiver], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return None
        part = os.read(receiver, 1 << 16)
        if not part:
            return b""
        text += part
    return text


def counts(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """How many models have each outcome, by door and targets."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        if row["outcome"] != "not built":
            found.setdefault((str(row["door"]), str(row["targets"])), Counter())[str(row["outcome"])] += 1
    return [{"door": d, "targets": t, "models": sum(c.values())} | {w: c[w] for w in WORST} for (d, t), c in found.items()]


def table(rows: Sequence[Row]) -> str:
    headings = {"door": "door", "targets": "targets", "models": "models", **{worst: worst for worst in reversed(WORST)}}
    return markdown(
        counts(rows), {column: (heading, "d" if column in ("models", *WORST) else "") for column, heading in headings.items()}
    )


def summary(rows: Sequence[Row]) -> str:
    """The counts, and every kind of words."""
    missing = [row for row in rows if row["outcome"] == "not built"]
    return f"{len({row['architecture'] for row in rows})} architectures, {len(missing)} not built\n{table(rows)}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures, anew")
    parser.add_argument("--again", nargs="+", default=(), metavar="OUTCOME", help="also anew what had this outcome")
    parser.add_argument("--piece", type=piece, default=(1, 1), metavar="I/N", help="every Nth of those that are left")
    parser.add_argument("--seconds", type=float, default=60, help="for one architecture")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def piece(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    return int(number), int(of)


if __name__ == "__main__":
    with one_thread(), end_as_by_ctrl_c():
        raise SystemExit(main())
