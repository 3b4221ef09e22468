"""The parser's own ways: a help that fits a screen, with examples, and all options where they are asked for."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser of one command.

    Args:
        examples: command lines, each with a comment of what it does; shown below the options.
        brief: the options that `--help` shows, where it does not show all; `--help-all` does.
        keywords: as of `argparse.ArgumentParser`.
    """

    def __init__(self, *, examples: str = "", brief: Collection[str] = (), **keywords: Any) -> None:
        lines = [line.strip() for line in examples.strip().splitlines()]
        shown = "\n  ".join(["examples:", *lines]) if lines else None
        keywords["epilog"] = "\n\n".join(filter(None, [keywords.get("epilog"), shown]))
        super().__init__(formatter_class=Paragraphs, add_help=False, allow_abbrev=False, **keywords)
        self.examples = [line.partition("#")[0].strip() for line in lines]
        self.brief = frozenset(brief)
        self.add_argument("-h", "--help", action="help", help="show this help" + (", the options most used" if brief else ""))
        if brief:
            self.add_argument("--help-all", action="help", help="show every option")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options; one that is not known is refused by the command that it was given to, with what is close to it."""
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            commands = next(action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
            command = next(commands[word] for word in arguments if word in commands)
            known = [option for action in command._actions for option in action.option_strings]
            near = [close for word in unknown for close in difflib.get_close_matches(word.partition("=")[0], known, n=1)]
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options

    def show_brief(self) -> None:
        """Leave the options that are not of the brief help out of it; they are parsed as before."""
        if not self.brief:
            return
        needed = [action for action in self._actions if action.required and not isinstance(action, argparse._SubParsersAction)]
        words = [" ".join(filter(None, [*action.option_strings[:1], str(action.metavar)])) for action in needed]
        self.usage = " ".join([self.prog, "[options]", *words])
        for action in self._actions:
            kept = action in needed or isinstance(action, argparse._HelpAction) or self.brief & {*action.option_strings}
            if not kept:
                action.help = argparse.SUPPRESS


class Paragraphs(argparse.HelpFormatter):
    """Fills paragraphs, which blank lines part; one with indented lines stays as it is written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            paragraph if "\n  " in paragraph else super(Paragraphs, self)._fill_text(paragraph, width, indent)
            for paragraph in paragraphs
        )


def option_of(name: str) -> str:
    """The option that sets an attribute of the parsed options: `--batch-size` for `batch_size`."""
    return f"--{name.replace('_', '-')}"
