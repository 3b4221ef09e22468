"""Reads what ptxas printed (`-Xptxas=-v`) and fails where a kernel spills, or takes more registers, than ALLOWED says.

python .ci/ptxas.py build.log [more logs]
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REGISTERS_PER_BLOCK = 65536
MOST_REGISTERS = 255


@dataclass(frozen=True)
class Limit:
    """What a kernel may take.

    Attributes:
        spill: bytes of spill stores and of spill loads, each.
        threads: threads that must fit on a multiprocessor at once: those of a block, times the blocks that its launch bounds
            ask for. 0 where any count will do.
        why: the reason for a spill.
    """

    spill: int = 0
    threads: int = 0
    why: str = ""

    @property
    def registers(self) -> int:
        """The most registers per thread with which `threads` of them fit; hardware hands them out in eights."""
        return min(REGISTERS_PER_BLOCK // self.threads // 8 * 8, MOST_REGISTERS) if self.threads else MOST_REGISTERS


# By regular expression on the name with its template arguments, from the name's beginning; the first that matches counts, and
# Limit() holds for what is not named: no spill, and 255 registers, with which 256 threads fit. A kernel of larger blocks
# belongs here, r"wide_kernel<.*, 512>": Limit(threads=512), and so does a spill that was measured to be worth it.
ALLOWED: dict[str, Limit] = {}


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture: its demangled name, registers, and the bytes of stack, spills and shared memory."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def name(self) -> str:
        """The kernel's name with its template arguments, without return type, namespaces and parameters."""
        text = re.sub(r"\b(?:\w+::)+", "", self.kernel.replace("(anonymous namespace)::", "")).removeprefix("void ")
        depth = 0
        for place, letter in enumerate(text):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                return text[:place]
        return text


def read(log: str) -> list[Usage]:
    """The kernels of a build log, once per architecture; of a kernel compiled twice, the last."""
    found: dict[tuple[str, str], Usage] = {}
    entry, architecture, stack, stores, loads = "", "", 0, 0, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)' for '([^']+)'", line):
            entry, architecture = match.groups()
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
        elif entry and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            usage = Usage(entry, architecture, int(match[1]), stack, stores, loads, int(shared[1]) if shared else 0)
            found[entry, architecture] = usage
            entry = ""
    readable = demangled([usage.kernel for usage in found.values()])
    return [Usage(name, *list(vars(usage).values())[1:]) for name, usage in zip(readable, found.values(), strict=True)]


def demangled(names: Sequence[str]) -> list[str]:
    """The names as C++ writes them."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def faults(usages: Iterable[Usage], allowed: Mapping[str, Limit]) -> list[str]:
    """What breaks a limit, one sentence each; also an entry of the table that no kernel needs."""
    wrong, needed = [], set()
    for usage in usages:
        pattern = next((pattern for pattern in allowed if re.match(pattern, usage.name)), None)
        needed.add(pattern)
        limit = allowed[pattern] if pattern is not None else Limit()
        spill = max(usage.spill_stores, usage.spill_loads)
        if spill > limit.spill:
            wrong.append(f"{usage.name} on {usage.architecture} spills {spill} bytes, allowed {limit.spill}")
        if usage.registers > limit.registers:
            bound = f"{limit.registers} ({limit.threads} threads)" if limit.threads else str(limit.registers)
            wrong.append(f"{usage.name} on {usage.architecture} takes {usage.registers} registers, allowed {bound}")
    wrong += [f"{pattern}: no such kernel was compiled; remove it from ALLOWED" for pattern in allowed if pattern not in needed]
    unexplained = [pattern for pattern, limit in allowed.items() if limit.spill and not limit.why]
    wrong += [f"{pattern}: a spill is allowed without a reason" for pattern in unexplained]
    return wrong


def table(usages: Iterable[Usage]) -> str:
    """One line per kernel and architecture, the largest first."""
    lines = [f"{'registers':>9} {'spill':>6} {'stack':>6} {'shared':>7}  architecture  kernel"]
    for u in sorted(usages, key=lambda u: (-u.registers, u.name, u.architecture)):
        spill = max(u.spill_stores, u.spill_loads)
        lines.append(f"{u.registers:>9} {spill:>6} {u.stack:>6} {u.shared:>7}  {u.architecture:<12}  {u.name}")
    return "\n".join(lines)


def main(logs: Sequence[str]) -> int:
    usages = read("\n".join(Path(log).read_text(errors="replace") for log in logs))
    if not usages:
        print(f"ptxas: expected the output of -Xptxas=-v in {', '.join(logs) or 'a build log'}, got no kernel", file=sys.stderr)
        return 2
    print(table(usages))
    wrong = faults(usages, ALLOWED)
    for line in wrong:
        print(f"ptxas: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
