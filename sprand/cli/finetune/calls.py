"""The built-in task: what somebody says in a smart home, and the function call that it means."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

SYSTEM = "Answer with one call."
HELD_OUT = 8  # one in so many pairs of arguments is kept from training
FAMILIAR = 6  # the phrasings of a function that training shows; those after them only held-out rows have

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

Value = tuple[str, str]
"""An argument as it is said, and as it is written."""


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of two arguments, and how people ask for it.

    Attributes:
        name: of the function.
        first, second: the values of its arguments.
        phrasings: sentences with a place for each argument.
    """

    name: str
    first: tuple[Value, ...]
    second: tuple[Value, ...]
    phrasings: tuple[str, ...]

    def row(self, arguments: tuple[Value, Value], phrasing: str) -> tuple[str, str]:
        """A sentence and its call."""
        said = phrasing.format(*(value[0] for value in arguments))
        return said[0].upper() + said[1:], f"{self.name}({', '.join(value[1] for value in arguments)})"


def in_words(number: int) -> str:
    """A number from 0 to 99 as it is said."""
    tens, ones = divmod(number, 10)
    if number < len(ONES):
        return ONES[number]
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def _quoted(text: str) -> tuple[Value, ...]:
    return tuple((part.strip(), f'"{part.strip()}"') for part in text.split(","))


def _numbers(numbers: Iterable[int]) -> tuple[Value, ...]:
    return tuple((in_words(number), str(number)) for number in numbers)


def _degrees() -> Iterator[Value]:
    for degrees in range(15, 26):
        yield f"{in_words(degrees)} degrees", str(degrees)
        yield f"{in_words(degrees)} and a half degrees", f"{degrees}.5"


def _times() -> Iterator[Value]:
    for hour in range(5, 12):
        yield f"{in_words(hour)} o'clock", f'"{hour:02}:00"'
        yield f"quarter past {in_words(hour)}", f'"{hour:02}:15"'
        yield f"half past {in_words(hour)}", f'"{hour:02}:30"'
        yield f"quarter to {in_words(hour + 1)}", f'"{hour:02}:45"'


ROOMS = _quoted("kitchen, bedroom, bathroom, hall, cellar, attic, garage, office, nursery, dining room, living room, guest room")
FOODS = _quoted("eggs, pasta, rice, tea, bread, soup, pizza, beans, cake, potatoes, chicken, coffee")
DAYS = _quoted("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
SOUNDS = _quoted(
    "jazz, Bach, old blues, the news, piano music, folk songs, rain sounds, a podcast, Cuban salsa, soft rock, fairy tales, opera"
)
DEEDS = _quoted(
    "water the plants, feed the cat, call my sister, take out the bins, pay the rent, lock the door, walk the dog, "
    "buy some milk, check the oven, book the train, turn off the iron, write to Ana"
)
FUNCTIONS = (
    Function("light", ROOMS, _numbers(range(5, 100)), (
        "Dim the {0} light to {1} percent.",
        "Set the light in the {0} to {1} percent.",
        "{1} percent light in the {0}, please.",
        "I want the {0} light at {1} percent.",
        "Could the {0} light go to {1} percent?",
        "Bring the lamp in the {0} to {1} percent.",
        "Lights in the {0}: {1} percent.",
        "Make it {1} percent bright in the {0}.",
    )),
    Function("heat", ROOMS, tuple(_degrees()), (
        "Heat the {0} to {1}.",
        "Make the {0} {1} warm.",
        "I would like {1} in the {0}.",
        "Keep the {0} at {1}.",
        "{1} in the {0}, please.",
        "Can you set the {0} to {1}?",
        "The {0} should be at {1}.",
        "Turn the heating in the {0} to {1}.",
    )),
    Function("timer", FOODS, _numbers(range(2, 91)), (
        "Set a timer of {1} minutes for the {0}.",
        "Count down {1} minutes for the {0}.",
        "The {0} will take {1} minutes.",
        "Tell me when the {0} had {1} minutes.",
        "{1} minutes for the {0}, please.",
        "Time the {0}: {1} minutes.",
        "The {0} must be out in {1} minutes.",
        "Start {1} minutes on the clock for the {0}.",
    )),
    Function("alarm", DAYS, tuple(_times()), (
        "Wake me on {0} at {1}.",
        "Set an alarm for {1} on {0}.",
        "I have to get up at {1} on {0}.",
        "{0} alarm at {1}, please.",
        "Get me up on {0} at {1}.",
        "Can you wake me at {1} on {0}?",
        "On {0} I want to be awake at {1}.",
        "Ring at {1} on {0} morning.",
    )),
    Function("play", SOUNDS, ROOMS, (
        "Play {0} in the {1}.",
        "I want to hear {0} in the {1}.",
        "Put on {0} in the {1}.",
        "In the {1}, play {0}.",
        "{0} in the {1}, please.",
        "Let the {1} hear {0}.",
        "Can we have {0} in the {1}?",
        "Start {0} for the {1}.",
    )),
    Function("remind", DEEDS, DAYS, (
        "Remind me on {1} to {0}.",
        "On {1} I have to {0}.",
        "Tell me on {1} to {0}.",
        "Don't let me forget to {0} on {1}.",
        "I must {0} on {1}, remind me.",
        "Reminder for {1}: {0}.",
        "Please say on {1} that I should {0}.",
        "{1} is the day to {0}.",
    )),
)  # fmt: skip


def rows(seed: int, training: int, held_out: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Sentences and their calls, all different, each function about as often as another.

    No two arguments of a held-out row occur together in training, and every second held-out sentence is phrased as none there.

    Args:
        seed: of the draw.
        training, held_out: numbers of rows.

    Returns:
        The rows to train on, and those held out.
    """
    split, draw = random.Random(seed), random.Random(f"rows {seed}")
    shown, hidden = [], []
    for function in FUNCTIONS:
        pairs = list(itertools.product(function.first, function.second))
        split.shuffle(pairs)
        cut = len(pairs) // HELD_OUT
        familiar, new = function.phrasings[:FAMILIAR], function.phrasings[FAMILIAR:]
        shown.append(_drawn(draw, function, pairs[cut:], itertools.repeat(familiar)))
        hidden.append(_drawn(draw, function, pairs[:cut], itertools.cycle((familiar, new))))
    return _mixed(draw, shown, training), _mixed(draw, hidden, held_out)


def write(folder: Path, seed: int, training: int = 512, held_out: int = 96) -> None:
    """Write train.jsonl and eval.jsonl: conversations as `prompt` and `completion`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "eval"), rows(seed, training, held_out), strict=True):
        lines = (json.dumps(_conversation(*row)) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _drawn(
    draw: random.Random, function: Function, pairs: list[tuple[Value, Value]], phrasings: Iterator[tuple[str, ...]]
) -> Iterator[tuple[str, str]]:
    seen = set()
    for choice in phrasings:
        row = function.row(draw.choice(pairs), draw.choice(choice))
        while row in seen:
            row = function.row(draw.choice(pairs), draw.choice(choice))
        seen.add(row)
        yield row


def _mixed(draw: random.Random, streams: list[Iterator[tuple[str, str]]], count: int) -> list[tuple[str, str]]:
    mixed = [row for row, _ in zip(itertools.chain.from_iterable(zip(*streams, strict=True)), range(count), strict=False)]
    draw.shuffle(mixed)
    return mixed


def _conversation(sentence: str, call: str) -> dict[str, list[dict[str, str]]]:
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": sentence}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": call}]}
