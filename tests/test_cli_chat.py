"""`sprand chat`: base and tuned model answer as each alone would, with their own histories, from a pipe and in a terminal."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import sprand
from sprand.cli import main
from sprand.cli.tuned import load_run
from tiny_models import WORDS, save_llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'system' and turn.content == 'w39' %}{{ raise_exception('no w39') }}{% endif %}"
    "{{ {'user': 'w30', 'assistant': 'w31', 'system': 'w32'}[turn.role] }} {{ turn.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}w31 {% endif %}"
)


def save_run(folder: Path, template: str | None) -> Path:
    """A Llama that learned to answer w2 w3 to anything."""
    base = save_llama(folder / "llama")
    if template:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(base)
    rows = [{"prompt": f"w30 w{i} [SEP] w31", "completion": "w2 w3"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--model", base, "--train", folder / "rows.jsonl", "--out", folder / "run", "--density", 0.5, "--lr", 0.02)
    assert main.run(["finetune", *map(str, (*asked, "--max-steps", 60))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("chat"), TEMPLATE)


def said(capsys, monkeypatch, lines: str, *arguments: object) -> list[str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    capsys.readouterr()
    assert main.run(["chat", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def replies(model, tokenizer, lines: list[str], most: int) -> list[str]:
    """What a model answers to each line, one after the other, token by token."""
    history, answers = [], []
    for line in lines:
        history.append({"role": "user", "content": line})
        text = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = len(tokens)
        while len(tokens) < prompt + most:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        answers.append(tokenizer.decode(tokens[prompt:], skip_special_tokens=True))
        history.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_both_answer_as_each_alone_would_with_its_own_history(talker, capsys, monkeypatch):
    turns = ["w1", "w5"]
    printed = said(capsys, monkeypatch, "w1\nw5\n\n/reset\nw5\n/quit\nw7\n", talker, "--max-new-tokens", 5)
    base = transformers.LlamaForCausalLM.from_pretrained(talker.parent / "llama").eval()
    tuned = load_run(talker)
    merged = sprand.merge(tuned.model)
    for name, model in (("base", base), ("tuned", merged)):
        own = [line.removeprefix(f"{name}: ") for line in printed if line.startswith(f"{name}: ")]
        assert own == [*replies(model, tuned.tokenizer, turns, 5), *replies(model, tuned.tokenizer, turns[1:], 5)]
    assert printed[1] == "tuned: w2 w3" and len(printed) == 6


def test_the_oldest_turns_make_room_for_new_ones(talker, capsys, monkeypatch):
    lines = [" ".join(WORDS[:20]), " ".join(WORDS[5:25]), "w1"]
    printed = said(capsys, monkeypatch, "\n".join(lines) + "\n", talker, "--max-new-tokens", 30, "--only-tuned")
    tuned = load_run(talker)
    assert len(printed) == 3 and printed[2] == "tuned: " + replies(tuned.model, tuned.tokenizer, lines[1:], 30)[-1]


def test_without_a_template_a_line_is_continued(tmp_path, capsys, monkeypatch):
    run = save_run(tmp_path, None)
    monkeypatch.setattr("sys.stdin", io.StringIO("w30 w4 [SEP] w31\n"))
    assert main.run(["chat", str(run), "--only-tuned", "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "tuned: w2 w3"
    assert "has no chat template: each line is continued as it is" in printed.err


def test_what_cannot_be_is_said(talker, bert, rows, tmp_path, capsys, monkeypatch):
    assert main.run(["finetune", "--model", str(bert), "--train", str(rows), "--out", str(tmp_path), "--max-steps", "1"]) == 0
    cases = [
        ((tmp_path,), "is a text classifier, which does not talk; use sprand predict"),
        ((talker, "--system", "w39"), "The chat template refuses these turns: no w39"),
        ((talker, "--max-new-tokens", 0), "--max-new-tokens: expected at least 1, got 0"),
        ((talker, "--temperature", -1), "--temperature: expected at least 0, got -1.0"),
        ((bert,), "expected a language model or a text classifier, its config.json says BertModel"),
        ((tmp_path / "none",), "no task.json and no config.json"),
    ]
    for arguments, expected in cases:
        monkeypatch.setattr("sys.stdin", io.StringIO("w1\n"))
        assert main.run(["chat", *map(str, arguments)]) == 2
        assert expected in capsys.readouterr().err


def read_until(terminal: int, expected: bytes, most: float = 120.0) -> bytes:
    output, end = b"", time.monotonic() + most
    while expected not in output:
        assert time.monotonic() < end, output
        if select.select([terminal], [], [], 1.0)[0]:
            output += os.read(terminal, 1 << 16)
    return output


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
@pytest.mark.parametrize("leave", [b"\x04", b"\x03", b"/quit\n"], ids=["Ctrl-D", "Ctrl-C", "quit"])
def test_in_a_terminal_the_answers_stand_side_by_side_and_one_leaves_politely(talker, leave):
    terminal, other = os.openpty()
    command = [sys.executable, "-m", "sprand", "chat", str(talker), "--max-new-tokens", "4"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}

    def own_terminal() -> None:
        os.setsid()
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(
        command, cwd=ROOT, stdin=other, stdout=other, stderr=other, env=environment, preexec_fn=own_terminal
    ) as process:
        try:
            read_until(terminal, b"you> ")
            os.write(terminal, b"w1\n")
            shown = read_until(terminal, b"you> ").decode()
            os.write(terminal, leave)
            for _ in range(30):  # a Ctrl-C between the prompt and the read behind it is heard with the next key
                with suppress(subprocess.TimeoutExpired):
                    process.wait(3)
                    break
                os.write(terminal, b"\n")
            assert process.returncode == 0
        finally:
            process.kill()
            os.close(terminal)
            os.close(other)
    lines = [line for line in shown.splitlines() if "w2 w3" in line]
    assert "base" in shown and "tuned" in shown and lines and "Traceback" not in shown
