"""`sprand completion`: what a shell needs to complete the commands and options of `sprand`, made by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from . import require

SHELLS = ("bash", "zsh", "fish")


def add(commands: argparse._SubParsersAction, build: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the command and its options; `build` makes the parser that it completes, with every command and every option."""
    parser = commands.add_parser(
        "completion",
        help="print what makes a shell complete sprand's commands and options",
        description="Print the completion of a shell, for the shell to read when it starts. It is made by the package shtab "
        "(pip install shtab); the command sprand itself does not need it.",
        examples="""
            sprand completion bash > ~/.local/share/bash-completion/completions/sprand
            sprand completion zsh > ~/.zfunc/_sprand     # a folder of $fpath, before compinit
            sprand completion fish > ~/.config/fish/completions/sprand.fish
        """,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(command=lambda options: run(build(), options.shell))


def run(parser: argparse.ArgumentParser, shell: str) -> int:
    """Print the completion of a parser.

    Raises:
        CliError: Shtab is not installed.
    """
    shtab = require("shtab")
    complete_files(parser, shtab)
    print(shtab.complete(parser, shell))
    return 0


def complete_files(parser: argparse.ArgumentParser, shtab: object) -> None:
    """Say which arguments are files or folders, by their metavar; those of commands as well."""
    kinds = {"FILE": "FILE", "PNG": "FILE", "MASK": "FILE", "DIR": "DIRECTORY", "OUT": "DIRECTORY"}
    kinds |= dict.fromkeys(("BASE", "TUNED", "MODEL", "ADAPTER", "ADAPTER[:WEIGHT]"), "FILE")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in set(action.choices.values()):
                complete_files(command, shtab)
        elif isinstance(action.metavar, str) and action.metavar in kinds:
            action.complete = getattr(shtab, kinds[action.metavar])
