"""The parser's own ways: a help that fits a screen, with examples, and all options where they are asked for."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

OTHER_WORDS = {
    "--out": ("output", "output-dir", "save", "save-to"),
    "--lr": ("learning-rate", "rate"),
    "--schedule": ("lr-scheduler", "lr-scheduler-type", "scheduler"),
    "--train": ("data", "dataset"),
    "--eval": ("validation", "valid", "dev", "test"),
    "--density": ("sparsity",),
    "--device": ("cpu", "cuda", "gpu"),
    "--dtype": ("bf16", "fp16", "precision"),
    "--checkpoint-every": ("save-every", "save-steps"),
    "--eval-every": ("eval-steps",),
    "--max-grad-norm": ("clip", "grad-clip", "gradient-clipping"),
    "--grad-accumulation": ("gradient-accumulation-steps",),
    "--overwrite": ("force",),
    "--to": ("form", "format"),
}  # what other programs call an option, by what it is called here
OPTION = re.compile(r"-(?!\.?\d)\S+$")  # no negative number, and nothing with a space: as argparse tells them apart


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
        commands = next(action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
        place = next((place for place, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
        self.refuse_unknown(arguments[:place])
        command = commands.get(arguments[place], self) if place < len(arguments) else self
        if command is not self:
            from .options_file import expanded

            arguments = [*arguments[: place + 1], *expanded(arguments[place + 1 :], command)]
            command.refuse_unknown(arguments[place + 1 :])
        options, more = self.parse_known_args(arguments)
        if more:
            command.error(f"unrecognized arguments: {' '.join(more)}")
        return options

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Refuse options that the parser does not have, before it misses others or takes `-out` for `-o ut`."""
        unknown: list[str] = []  # options, each with its value
        near, follows = [], False
        for word in arguments[: arguments.index("--") if "--" in arguments else None]:
            if OPTION.match(word) and self._knows(word.partition("=")[0]):
                follows = False
            elif OPTION.match(word):
                follows = True
                near.append(near_option(word, self._option_string_actions))
            unknown += [word] if follows else []
        hints = ", ".join(filter(None, near))
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {hints}?" if hints else ""))

    def _knows(self, option: str) -> bool:
        """Whether this is an option, or one of a letter with its value, -oDIR; but -out is a slip of --out."""
        known = self._option_string_actions
        return option in known or (option[:2] in known and f"-{option}" not in known)

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
    """Fills paragraphs, which blank lines part; one with indented lines stays as it is. An option of many is `FILE ...`."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            paragraph if "\n  " in paragraph else super(Paragraphs, self)._fill_text(paragraph, width, indent)
            for paragraph in paragraphs
        )


def near_option(option: str, known: Iterable[str]) -> str | None:
    """The option that one which is not known was meant for: by another program's name of it, its words, or its letters."""
    names = [other[2:] for other in known if other.startswith("--")]
    asked = option.partition("=")[0].lstrip("-").lower().replace("_", "-")
    for own, words in OTHER_WORDS.items():
        if asked in words and own[2:] in names:
            return own
    if len(asked) < 2:
        return None
    words = {*asked.split("-")}
    shorter = [name for name in names if words >= {*name.split("-")} or (len(name) > 2 and asked.startswith(name))]
    longer = [name for name in names if words <= {*name.split("-")} or name.startswith(asked)]
    alike = difflib.get_close_matches(asked, [name for name in names if name[0] == asked[0]], n=1, cutoff=0.65)
    nearest = [*sorted(shorter, key=len, reverse=True), *sorted(longer, key=len), *alike]
    return f"--{nearest[0]}" if nearest else None


def add_out(to: argparse._ActionsContainer, metavar: str, help: str, required: bool = True) -> None:
    """Add where a command writes: `-o` and `--out` of every command that does."""
    to.add_argument("-o", "--out", type=Path, required=required, metavar=metavar, help=help)


def add_json(to: argparse._ActionsContainer, help: str = "print what was written as JSON") -> None:
    """Add `--json` of every command that has results."""
    to.add_argument("--json", action="store_true", help=help)


def option_of(name: str) -> str:
    """The option that sets an attribute of the parsed options: `--batch-size` for `batch_size`."""
    return f"--{name.replace('_', '-')}"
