"""The command line: the parser of all commands, and how a command's errors and signals are shown."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..version import __version__
from . import (
    CliError,
    Stopped,
    chat,
    combine,
    completion,
    diff,
    doctor,
    evaluate,
    export,
    finetune,
    inspect,
    merge,
    plan,
    predict,
    ranks,
    select,
)
from .parser import Parser

COMMANDS = (
    doctor,
    finetune,
    select,
    evaluate,
    predict,
    chat,
    merge,
    combine,
    diff,
    inspect,
    plan,
    export,
)  # in the order of the help
EXIT_CODES = """exit codes:
  0    done
  1    the work failed: training diverged, a disk is full, a proof or self test does not hold
  2    wrong options or data
  130  stopped by Ctrl-C (143 by SIGTERM); the message says how to go on"""


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: without the program's name.

    Returns:
        The exit code: 0, 1 where the work failed, 2 where options or data are wrong, 130 or 143 where a signal stopped it, and
        141 where nobody reads the output any more.
    """
    parser = build_parser(brief="--help-all" not in arguments)
    try:
        options = parser.parse(arguments)
        with _library_lines():
            code = options.command(options)
        sys.stdout.flush()
        return code
    except Stopped as stop:
        how = "Begin again" if stop.go_on is None else "Go on"
        if ranks.is_first_here():
            print(f"sprand: {stop} {how} with:\n  {_again(arguments, stop.go_on or ())}", file=sys.stderr)
        return stop.exit_code
    except CliError as error:
        if ranks.is_first_here():
            print(f"sprand: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"sprand: Stopped. Begin again with:\n  {_again(arguments)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it flushes at exit
        return 141


def build_parser(brief: bool = False) -> Parser:
    """The parser of the whole command line.

    Args:
        brief: its help leaves out the options that few need.
    """
    parser = Parser(
        prog="sprand",
        description="Fine-tune a model by training a small set of its own weights.",
        epilog=EXIT_CODES,
        examples="""
            sprand doctor                          # is all well here?
            sprand finetune --out runs/first       # a demo, some minutes on a CPU
            sprand COMMAND --help                  # of one command, with examples
        """,
    )
    parser.add_argument("--version", action="version", version=f"sprand {__version__}", help="show the version")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    completion.add(commands, build_parser)
    if brief:
        for command in commands.choices.values():
            command.show_brief()
    return parser


def _again(arguments: Sequence[str], more: Sequence[str] = ()) -> str:
    """The command, as a shell reads it, with options added to it."""
    added = [option for option in more if list(arguments[-1:]) != [option]]
    return shlex.join([_program(), *arguments, *added])


def _program() -> str:
    """What a shell calls this program by: its name where that finds it, else the path that was called."""
    called, on_path = sys.argv[0], shutil.which("sprand")
    if Path(called).name != "sprand" or (on_path and os.path.samefile(on_path, called)):
        return "sprand"
    return called


@contextmanager
def _library_lines() -> Iterator[None]:
    """Show what the library logs, the time and memory of a calibration say, and what it warns of, as lines on standard error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated")  # DeepSpeed calls it at every step
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it tells of a package that it could use
    logger, handler = logging.getLogger("sprand"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, format_warning = logger.level, warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"sprand: {message}\n"
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        warnings.formatwarning = format_warning
