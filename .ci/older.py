"""Prints a requirement of each named package that pins the newest release of the minor version before the newest one."""

from __future__ import annotations

import re
import subprocess
import sys


def pin(package: str) -> str:
    """For example `peft==0.20.0` where 0.21.2 is the newest release of `peft`."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    versions = re.search(r"^Available versions: (.*)$", listed, re.M).group(1).split(", ")
    newest = versions[0].split(".")[:2]
    return f"{package}=={next(version for version in versions if version.split('.')[:2] != newest)}"


if __name__ == "__main__":
    print(*map(pin, sys.argv[1:]), sep="\n")
