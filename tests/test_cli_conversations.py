"""Conversations: one gives the same tokens and the same loss in every format, and what a template cannot do is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_models import WORDS, save_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
import transformers

from sprand.cli import CliError
from sprand.cli.finetune import data, tasks
from sprand.cli.finetune.settings import Settings

TURNS = [("system", "w0"), ("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
HEAD = {"system": "w30", "user": "w31", "assistant": "w32"}
PLAIN = (
    "{% for m in messages %}{{ {'system': 'w30', 'user': 'w31', 'assistant': 'w32'}[m['role']] + ' ' }}"
    "{{ m['content'] }} [SEP] {% endfor %}{% if add_generation_prompt %}{{ 'w32 ' }}{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ m['content'] }} [SEP] ",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' [SEP]' }}{% endgeneration %}{{ ' ' }}"
    "{% else %}{{ m['content'] + ' [SEP] ' }}{% endif %}",
)
TEMPLATES = {"without marks": PLAIN, "with marks": MARKED}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def messages(turns=TURNS) -> list[dict]:
    return [{"role": role, "content": text} for role, text in turns]


def save(folder: Path, name: str, rows: list[dict]) -> Path:
    """Rows in the format that the name ends with."""
    path = folder / name
    if path.suffix == ".parquet":
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".csv":
        cells = [json.dumps(value).replace('"', '""') for row in rows for value in row.values()]
        path.write_text(",".join(rows[0]) + "\n" + "\n".join(f'"{cell}"' for cell in cells) + "\n")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def made(path: Path, tokenizer, **fields) -> tasks.Task:
    settings = Settings(model="m", train=path, eval=path, out=path.parent, **fields)
    return tasks.make(data.load(settings), tokenizer, settings)


def words(tokenizer, row: dict) -> list[str]:
    """The tokens of a row; those that are learned in brackets."""
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    return [f"<{token}>" if label != -100 else token for token, label in zip(tokens, row["labels"], strict=True)]


def expected(turns, learned=("assistant",)) -> list[str]:
    """By hand: the head of each turn, its words, its end; answers and their ends are learned."""
    lines = []
    for role, text in turns:
        said = [*text.split(), "[SEP]"]
        lines += [HEAD[role], *(f"<{word}>" if role in learned else word for word in said)]
    return lines


def sharegpt() -> list[dict]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": text} for role, text in TURNS]


ROWS = {
    "messages.jsonl": {"messages": messages()},
    "messages.parquet": {"messages": messages()},
    "messages.csv": {"messages": messages()},
    "sharegpt.json": {"conversations": sharegpt()},
    "sharegpt.parquet": {"conversations": sharegpt()},
    "system apart.jsonl": {"conversations": sharegpt()[1:], "system": "w0"},
    "named.jsonl": {"talk": messages()},
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ROWS)
def test_one_conversation_is_the_same_in_every_format(tokenizer, tmp_path, monkeypatch, template, name):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[template])
    named = {"messages_column": "talk"} if name == "named.jsonl" else {}
    task = made(save(tmp_path, name, [ROWS[name]]), tokenizer, **named)
    assert words(tokenizer, task.train[0]) == expected(TURNS)
    assert task.said[0] == "1 conversation, 17 tokens on average, loss on the assistant's 29 %"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("form", ["turns", "texts"])
def test_of_a_prompt_and_completion_the_completion_alone_is_learned(tokenizer, tmp_path, monkeypatch, template, form):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[template])
    if form == "turns":
        row = {"prompt": messages()[:-1], "completion": messages()[-1:]}
        task = made(save(tmp_path, "a.jsonl", [row]), tokenizer)
        assert words(tokenizer, task.train[0]) == expected(TURNS[:-1], ()) + expected(TURNS[-1:])
    else:
        task = made(save(tmp_path, "a.jsonl", [{"prompt": "w1 w2", "completion": "w3"}]), tokenizer, chat=True)
        assert words(tokenizer, task.train[0]) == expected(TURNS[1:3])


def test_instructions_are_conversations_where_there_is_a_template(tokenizer, tmp_path, monkeypatch):
    path = save(tmp_path, "a.jsonl", [{"instruction": "w1", "input": "w2", "output": "w3"}])
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN)
    assert words(tokenizer, made(path, tokenizer).train[0]) == expected(TURNS[1:3])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    task = made(path, tokenizer)
    assert words(tokenizer, task.train[0])[-2:] == ["<w3>", "<[SEP]>"] and "w2" in words(tokenizer, task.train[0])
    assert "in Alpaca's words" in task.said[0]


def test_turns_of_weight_0_are_not_learned(tokenizer, tmp_path, monkeypatch):
    turns = messages()
    turns[2]["weight"] = 0
    for template in TEMPLATES.values():
        monkeypatch.setattr(tokenizer, "chat_template", template)
        task = made(save(tmp_path, "a.jsonl", [{"messages": turns}]), tokenizer)
        assert words(tokenizer, task.train[0]) == expected(TURNS[:3], ()) + expected(TURNS[3:])


def test_an_end_token_follows_the_last_answer_of_a_template_that_has_none(tokenizer, tmp_path, monkeypatch):
    path = save(tmp_path, "a.jsonl", [{"messages": messages(TURNS[1:])}])
    for template in TEMPLATES.values():
        monkeypatch.setattr(tokenizer, "chat_template", template.replace("[SEP]", "w33"))
        row = words(tokenizer, made(path, tokenizer).train[0])
        assert row == [word.replace("[SEP]", "w33") for word in expected(TURNS[1:])] + ["<[SEP]>"]


def test_templates_that_trl_knows_are_learned_as_its_own_for_training(tmp_path):
    """Qwen3's and GPT-OSS's templates render a turn otherwise once others follow, that of Qwen3-VL does not."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    if not folder.is_dir():
        pytest.skip("this version of TRL keeps its templates elsewhere")
    save_tokenizer(tmp_path)
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"))
    ]
    for name, replaced in (("qwen3", 1), ("gptoss", 1), ("qwen3_vl", 0)):
        own, training = ((folder / f"{name}{end}.jinja").read_text() for end in ("", "_training"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        marks = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|return|>", "<|message|>", "<|channel|>"]
        tokenizer.add_special_tokens({"extra_special_tokens": marks})
        tokenizer.chat_template = own
        task = made(save(tmp_path, f"{name}.jsonl", [{"messages": turns}]), tokenizer)
        options = {"return_dict": True, "return_assistant_tokens_mask": True, "chat_template": training}
        reference = tokenizer.apply_chat_template(turns, **options)
        assert task.train[0]["input_ids"] == reference["input_ids"]
        learned = [label != -100 for label in task.train[0]["labels"]]
        assert learned == list(map(bool, reference["assistant_masks"]))
        assert any("that TRL has for training" in said for said in task.said) == bool(replaced)


FORGETS = PLAIN.replace("{{ m['content'] }}", "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}")
REFUSED = {
    "no template": (None, messages(), "its tokenizer has no chat template"),
    "no prefix": (FORGETS, messages(), "it renders a turn otherwise once others follow"),
    "a role it has not": (
        PLAIN,
        [*messages(), {"role": "tool", "content": "w7"}],
        "does not fit the conversation that begins 'w0'",
    ),
    "nobody": (PLAIN, [{"role": "narrator", "content": "w1"}], "row 1: a turn of 'narrator'; expected one of"),
    "no text": (PLAIN, [{"role": "user", "content": 3}], "row 1: a turn of 'user' holds no text"),
    "left out": (
        PLAIN.replace("{{ m['content'] }}", "{{ m['content'][0]['text'] }}"),
        messages(),
        "leaves out what is said there",
    ),
    "no turns": (PLAIN, ["w1", "w2"], "row 1: the column 'messages' holds no list of turns"),
    "no answer": (PLAIN, messages(TURNS[:2]), "No row holds an answer to learn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learned_is_refused(tokenizer, tmp_path, monkeypatch, case):
    template, turns, said = REFUSED[case]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(CliError) as error:
        made(save(tmp_path, "a.jsonl", [{"messages": turns}]), tokenizer)
    assert said in str(error.value)


def test_rows_are_cut_at_their_end_or_left_out_and_that_is_said(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN)
    short, long_answer = [("user", "w1"), ("assistant", "w2")], [("user", "w1"), ("assistant", " ".join(WORDS[:9]))]
    late, unanswered = [("user", " ".join(WORDS[:9])), ("assistant", "w2")], [("user", "w1")]
    rows = [{"messages": messages(turns)} for turns in (short, long_answer, late, late, unanswered)]
    path = save(tmp_path, "a.jsonl", rows)
    task = made(path, tokenizer, max_length=8)
    assert [words(tokenizer, row) for row in task.train] == [expected(short), expected(long_answer)[:8]]
    assert task.said[1:3] == [
        "3 of 5 training rows are longer than 8 tokens (--max-length): "
        "1 lose the end of their answer and 2 are left out, as their answer begins later",
        "1 of 5 training rows hold no answer to learn, and are left out",
    ]
    dropped = made(path, tokenizer, max_length=8, long_rows="drop")
    assert [words(tokenizer, row) for row in dropped.train] == [expected(short)]
    assert dropped.said[1] == "3 of 5 training rows are longer than 8 tokens (--max-length): 3 are left out"
