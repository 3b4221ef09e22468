"""`sprand chat`: talk with a fine-tuned language model in the terminal, and with its base beside it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch

from . import CliError, require
from .files import reason_of
from .finetune import generation
from .parser import option_of
from .tuned import Tuned, load_run

RESET, QUIT = "/reset", "/quit"
Shown = Callable[[str], None]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "chat",
        help="talk with a language model that sprand finetune trained, its base beside it",
        description="Talk with the tuned model and its base side by side: one model in memory, the adapter taken out for the "
        "base's turn. Each goes on with its own answers, through the tokenizer's chat template; without a template each line is "
        "continued as it is. Where standard input is no terminal, each line of it is a turn.",
        epilog=f"{RESET} forgets what was said, {QUIT} or Ctrl-D ends. Ctrl-C stops an answer.",
        examples="""
            sprand chat runs/mine
            sprand chat runs/mine --only-tuned --system "Answer in one word."
        """,
    )
    parser.add_argument("run", metavar="RUN", help="the folder --out of sprand finetune, or a model")
    parser.add_argument("--only-tuned", action="store_true", help="leave out the base")
    parser.add_argument("--system", metavar="TEXT", help="what the models are told first")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, takes the likeliest token")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default 256)")
    parser.add_argument("--device", default="auto", help="default auto: a GPU where there is one")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Talk until the input ends.

    Raises:
        CliError: There is no such run, it is no language model, or its chat template refuses what is said.
    """
    if options.max_new_tokens < 1 or not options.temperature >= 0:
        name, least = ("temperature", 0) if options.max_new_tokens >= 1 else ("max_new_tokens", 1)
        raise CliError(f"{option_of(name)}: expected at least {least}, got {getattr(options, name)}.")
    tuned = load_run(options.run, options.device)
    if tuned.task != "causal-lm":
        raise CliError(f"{options.run} is a text classifier, which does not talk; use sprand predict.")
    speakers = [Speaker("tuned", tuned, nullcontext, options)]
    if tuned.has_base and not options.only_tuned:
        speakers.insert(0, Speaker("base", tuned, tuned.base, options))
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if tuned.tokenizer.chat_template is None:
        print("The tokenizer has no chat template: each line is continued as it is.", file=sys.stderr)
    for line in _lines(is_terminal):
        if line == QUIT:
            break
        if line == RESET:
            for speaker in speakers:
                speaker.reset()
        elif line:
            _answer(speakers, line, is_terminal)
    return 0


class Speaker:
    """One side of the talk, with a history of its own.

    Args:
        name: what it is called.
        tuned: the model.
        state: the model is as it speaks inside of this `with` block.
        options: of the command.
    """

    def __init__(
        self, name: str, tuned: Tuned, state: Callable[[], AbstractContextManager[Any]], options: argparse.Namespace
    ) -> None:
        self.name, self.tuned, self.state, self.options = name, tuned, state, options
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.history = [{"role": "system", "content": self.options.system}] if self.options.system else []

    def answer(self, line: str, show: Shown) -> None:
        """Say what follows, in pieces as they come; Ctrl-C ends it, and what was said so far is kept.

        Raises:
            CliError: The chat template refuses the turns.
        """
        self.history.append({"role": "user", "content": line})
        said: list[str] = []

        def take(piece: str) -> None:
            said.append(piece)
            show(piece)

        try:
            with self.state():
                self._generate(self._tokens(line), take)
        except KeyboardInterrupt:
            show(" (stopped)")
        self.history.append({"role": "assistant", "content": "".join(said).strip()})

    def _tokens(self, line: str) -> list[int]:
        """The turns as tokens, the oldest left out where they do not fit; without a template the line alone."""
        tokenizer = self.tuned.tokenizer
        if tokenizer.chat_template is None:
            return tokenizer(line)["input_ids"]
        first = len(self.history) - len([turn for turn in self.history if turn["role"] != "system"])
        room = generation.room(self.tuned.model, self.options.max_new_tokens)[1]
        while True:
            try:
                text = tokenizer.apply_chat_template(self.history, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # of jinja, raised by the template
                raise CliError(f"The chat template refuses these turns: {reason_of(error)}.") from None
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(tokens) <= room or len(self.history) <= first + 1:
                return tokens
            del self.history[first : first + 2]

    @torch.no_grad()
    def _generate(self, tokens: list[int], take: Shown) -> None:
        model, tokenizer = self.tuned.model, self.tuned.tokenizer
        most, room = generation.room(model, self.options.max_new_tokens)
        how = generation.greedy(model, tokenizer, most)
        if self.options.temperature:
            how |= {"do_sample": True, "temperature": self.options.temperature}
        prompt = torch.tensor([tokens[-room:]], device=self.tuned.device)
        streamer = _streamer(tokenizer, take)
        with generation.quiet():
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **how)


def _streamer(tokenizer: Any, take: Shown) -> Any:
    """What `generate` gives its tokens to, and what hands them on as text."""

    class Streamer(require("transformers").TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            take(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _lines(is_terminal: bool) -> Iterator[str]:
    """The turns of the user, until the input ends or Ctrl-C comes where a turn is expected."""
    if not is_terminal:
        yield from (line.strip() for line in sys.stdin)
        return
    with suppress(ImportError):
        importlib.import_module("readline")  # input has a history then
    while True:
        try:
            line = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def _answer(speakers: list[Speaker], line: str, is_terminal: bool) -> None:
    """Let each answer, in columns on a terminal, else one after the other."""
    with _columns([speaker.name for speaker in speakers]) if is_terminal else _blocks() as column:
        for number, speaker in enumerate(speakers):
            speaker.answer(line, column(number, speaker.name))


@contextmanager
def _blocks() -> Iterator[Callable[[int, str], Shown]]:
    """Shows answers one after the other."""

    def begin(number: int, name: str) -> Shown:
        print(f"\n{name}: " if number else f"{name}: ", end="", flush=True)
        return lambda piece: print(piece, end="", flush=True)

    yield begin
    print(flush=True)


@contextmanager
def _columns(names: list[str]) -> Iterator[Callable[[int, str], Shown]]:
    """Shows answers side by side as they come."""
    texts = [""] * len(names)
    live, table, text = require("rich.live"), require("rich.table"), require("rich.text")

    def drawn() -> Any:
        grid = table.Table(expand=True)
        for name in names:
            grid.add_column(name, ratio=1, overflow="fold")
        grid.add_row(*map(text.Text, texts))
        return grid

    with live.Live(drawn(), refresh_per_second=8) as screen:

        def begin(number: int, name: str) -> Shown:
            def show(piece: str) -> None:
                texts[number] += piece
                screen.update(drawn())

            return show

        yield begin
