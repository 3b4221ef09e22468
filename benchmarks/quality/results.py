"""The results of a grid on disk: one CSV line per run, and beside it what each test row came to, for paired tests."""

from __future__ import annotations

import base64
import csv
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quality.training import Outcome, Run

KEYS = ("task", "method", "budget", "lr", "seed")
COLUMNS = (
    *KEYS, "trained", "metric", "dev", "test", "old", "train_loss", "steps", "seconds", "calibration_seconds", "device",
    "note",
)  # fmt: skip
NUMBERS = ("budget", "lr", "trained", "dev", "test", "old", "train_loss", "steps", "seconds", "calibration_seconds")
Results = Mapping[Run, Outcome]


def read(file: Path) -> dict[Run, Outcome]:
    """The results so far; none where there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not file.exists():
        return {}
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file}: expected the columns {', '.join(COLUMNS)}, got {', '.join(reader.fieldnames or ())}")
        rows = list(reader)
    done = {}
    for row in rows:
        values = {name: float(value) if name in NUMBERS and value else value or None for name, value in row.items()}
        run = Run(row["task"], row["method"], values["budget"], values["lr"], int(row["seed"]))
        done[run] = {name: value for name, value in values.items() if name not in KEYS}
    return done


def append(file: Path, run: Run, outcome: Outcome, rows: Tensor) -> None:
    """Add a run, its test rows first; one that is stopped meanwhile is run again.

    Args:
        file: the CSV; the rows go to `rows_file` of it.
        run: what was done.
        outcome: its line.
        rows: of each test row, whether it was right or its mean loss [rows]; none are kept where it is empty.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    line = {name: getattr(run, name) for name in KEYS}
    if len(rows):
        _add(rows_file(file), json.dumps(line | {"rows": packed(rows, outcome["metric"])}) + "\n")
    cells = [(line | outcome).get(column) for column in COLUMNS]
    text = [] if file.exists() else [COLUMNS]
    text.append(["" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells])
    _add(file, "".join(_csv_line(values) for values in text))


def rows_file(file: Path) -> Path:
    """Where the test rows of a CSV's runs are kept."""
    return file.with_name(f"{file.stem}_rows.jsonl")


def read_rows(file: Path) -> dict[Run, Tensor]:
    """The test rows of each run of a CSV that has them, float64; the later line of a run counts."""
    path = rows_file(file)
    if not path.exists():
        return {}
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[Run(*(line[name] for name in KEYS))] = unpacked(line["rows"])
    return found


def packed(rows: Tensor, metric: str) -> str:
    """A bit per row where it is right or wrong, else 16 bits per row; as text."""
    if metric == "accuracy":
        bits = "".join("1" if right else "0" for right in rows.tolist())
        return f"b{len(bits)}:" + base64.b64encode(int(bits, 2).to_bytes(math.ceil(len(bits) / 8), "big")).decode()
    return f"h{len(rows)}:" + base64.b64encode(bytes(rows.to(torch.float16).view(torch.uint8).tolist())).decode()


def unpacked(text: str) -> Tensor:
    """The inverse of `packed`, float64 [rows]."""
    head, _, body = text.partition(":")
    data, count = base64.b64decode(body), int(head[1:])
    if head[0] == "b":
        bits = f"{int.from_bytes(data, 'big'):0{count}b}"
        return torch.tensor([float(bit) for bit in bits], dtype=torch.float64)
    return torch.frombuffer(bytearray(data), dtype=torch.float16).double()


def best(tried: Iterable[Run], done: Results) -> Run:
    """The run with the best dev result."""
    tried = list(tried)
    higher = done[tried[0]]["metric"] == "accuracy"
    return (max if higher else min)(tried, key=lambda run: done[run]["dev"])


def _csv_line(values: Iterable[object]) -> str:
    import io

    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(values)
    return out.getvalue()


def _add(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8", newline="") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
