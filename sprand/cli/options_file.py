"""Options of a command from a YAML file: `--config FILE`; what is given in the shell goes before what stands there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import CliError, require
from .parser import near_option

OPTION = "--config"


def add_config(to: argparse._ActionsContainer) -> None:
    """Add the option to a command."""
    to.add_argument(OPTION, metavar="FILE", help="options from a YAML file, by their names here; those of the shell go first")


def expanded(arguments: Sequence[str], command: argparse.ArgumentParser) -> list[str]:
    """Arguments of a command with the options of its file among them.

    Args:
        arguments: those after the command's name.
        command: its parser.

    Raises:
        CliError: The file cannot be read, or names an option that the command does not have.
    """
    words = list(arguments)
    place = next((i for i, word in enumerate(words) if word.partition("=")[0] == OPTION), None)
    if place is None or OPTION not in command._option_string_actions:
        return words
    _, equals, file = words.pop(place).partition("=")
    if not equals:
        if place == len(words):
            raise CliError(f"{OPTION}: expected a file after it.")
        file = words.pop(place)
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    return [*_options(Path(file), command, given), *words]


def _options(file: Path, command: argparse.ArgumentParser, given: set[str]) -> list[str]:
    """The words of a shell that the content of a file stands for, without the options that are given."""
    words: list[str] = []
    for name, value in _content(file).items():
        option = f"--{str(name).replace('_', '-')}"
        action = command._option_string_actions.get(option)
        if action is None or option == OPTION:
            near = near_option(option, command._option_string_actions)
            raise CliError(f"{file}: {command.prog} has no option {option}" + (f"; did you mean {near}?" if near else "."))
        if not given & {*action.option_strings}:
            words += _words(option, value, action)
    return words


def _words(option: str, value: Any, action: argparse.Action) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    if isinstance(value, dict):
        return [word for name, part in value.items() for word in (option, f"{name}={part}")]
    values = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    return [option, *values] if action.nargs == "+" else [option, ",".join(values)]


def _content(file: Path) -> dict[str, Any]:
    yaml = require("yaml")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CliError(f"{OPTION}: {file} cannot be read: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise CliError(f"{OPTION}: expected options with their values in {file}, one a line (density: 0.01).")
    return content
