"""Reading training data: what the formats mean, and one clear sentence for every file that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sprand.cli import CliError
from sprand.cli.finetune import data
from sprand.cli.finetune.settings import Settings

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def settings(train: Path, **fields) -> Settings:
    return Settings(model="m", train=train, out=train.parent / "out", **fields)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(count: int, sep: str = "\t") -> str:
    return f"text{sep}label\n" + "".join(f"row {i}{sep}{'yes' if i % 2 else 'no'}\n" for i in range(count))


def test_tsv_keeps_quotes_and_csv_reads_them(tmp_path):
    tsv = write(tmp_path, "a.tsv", 'text\tlabel\nsay "hi", she\t1\n"open\t0\n')
    csv = write(tmp_path, "a.csv", 'text,label\n"say ""hi"",\nshe",1\nplain,0\n')
    assert data.read_table(tsv)[1] == [{"text": 'say "hi", she', "label": "1"}, {"text": '"open', "label": "0"}]
    assert data.read_table(csv)[1] == [{"text": 'say "hi",\nshe', "label": "1"}, {"text": "plain", "label": "0"}]


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = write(tmp_path, "a.tsv", b"\xef\xbb\xbftext\tlabel\r\none\tx\r\ntwo\ty\r\n")
    assert data.read_table(path) == (["text", "label"], [{"text": "one", "label": "x"}, {"text": "two", "label": "y"}])


def test_columns_by_option_and_pairs(tmp_path):
    path = write(tmp_path, "a.csv", "q,a,ok\nwhy,because,1\nwho,me,0\n")
    loaded = data.load(settings(path, eval=path, text_column="q", text2_column="a", label_column="ok"))
    assert loaded.task == "classification"
    assert loaded.labels == ("0", "1")
    assert loaded.train[0] == data.Example("why", "because", "1")


def test_jsonl_of_prompts_is_for_a_language_model(tmp_path):
    lines = [json.dumps({"question": f"{i}?", "answer": str(i)}) for i in range(20)]
    path = write(tmp_path, "a.jsonl", "\n".join(lines))
    loaded = data.load(settings(path, prompt_column="question", completion_column="answer"))
    assert (loaded.task, len(loaded.train), len(loaded.eval)) == ("causal-lm", 18, 2)
    assert {e.text for e in loaded.train}.isdisjoint({e.text for e in loaded.eval})


def test_labels_of_digits_sort_as_numbers(tmp_path):
    path = write(tmp_path, "a.tsv", "text\tlabel\n" + "".join(f"t{i}\t{i % 11}\n" for i in range(44)))
    assert data.load(settings(path, eval=path)).labels == tuple(map(str, range(11)))


def test_labels_that_only_look_like_numbers_sort_as_names(tmp_path):
    path = write(tmp_path, "a.tsv", "text\tlabel\n" + "".join(f"t{i}\t{label}\n" for i, label in enumerate(["10", "²", "9"] * 4)))
    assert data.load(settings(path, eval=path)).labels == ("9", "10", "²")


def test_held_out_rows_are_disjoint_and_seeded(tmp_path):
    path = write(tmp_path, "a.tsv", rows(50))
    first, again, other = (data.load(settings(path, seed=seed)) for seed in (1, 1, 2))
    assert [*first.train] == [*again.train] and [*first.eval] == [*again.eval]
    assert [*first.eval] != [*other.eval]
    assert len(first.eval) == 5 and len(first.train) == 45
    assert not {e.text for e in first.train} & {e.text for e in first.eval}


def test_plain_text_holds_out_its_end(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    loaded = data.load(settings(write(tmp_path, "a.txt", text)))
    assert loaded.train[0].text + loaded.eval[0].text == text
    assert loaded.eval[0].text.startswith("line 90\n")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "", "a.tsv: the file is empty"),
        ("a.txt", " \n\n", "a.txt: the file is empty"),
        ("a.tsv", "text\tlabel\n", "no rows follow"),
        ("a.tsv", "text\tclass\na\tb\n", "no column 'label', only 'text', 'class'. Name it with --label-column"),
        ("a.tsv", "body\tlabel\na\tb\nc\td\n", "no column 'text', only 'body', 'label'. Name it with --text-column"),
        ("a.tsv", "text\tlabel\na\tb\tc\n", "line 2: expected 2 columns as in the header, got 3"),
        ("a.csv", 'text,label\n"open,1\n', "a.csv, line 2: unexpected end of data"),
        ("a.tsv", "text\ttext\na\tb\n", "two columns of the header have the same name"),
        ("a.tsv", "text\tlabel\na\tx\nb\tx\n", "every row has the label 'x'"),
        (
            "a.tsv",
            "text\tlabel\n" + "".join(f"t\t{i / 7}\n" for i in range(9)),
            "9 different labels in 9 rows; is 'label' the label column?",
        ),
        ("a.tsv", "text\tlabel\n \tx\nb\ty\n", "row 1: the column 'text' is empty"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", '["a"]\n', "line 1: expected a JSON object, got list"),
        ("a.tsv", b"text\tlabel\ncaf\xe9\t1\n", "not UTF-8 (byte 14 is 0xe9)"),
        ("a.txt", b"\x00\x01\x02", "binary file"),
    ],
)
def test_bad_file(tmp_path, name, content, said):
    path = write(tmp_path, name, content)
    with pytest.raises(CliError) as error:
        data.load(settings(path, eval=path))
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_label_unknown_to_training(tmp_path):
    train, held_out = write(tmp_path, "a.tsv", rows(6)), write(tmp_path, "b.tsv", "text\tlabel\nx\tmaybe\n")
    with pytest.raises(CliError, match="label 'maybe' is not among those of the training rows \\('no', 'yes'\\)"):
        data.load(settings(train, eval=held_out))


def test_missing_file(tmp_path):
    with pytest.raises(CliError, match="No such file"):
        data.load(settings(tmp_path / "none.tsv"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lr": float("nan")}, "--lr: expected a positive number"),
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": -1}, "--batch-size"),
        ({"eval_share": 1.0}, "--eval-share"),
        ({"compare": ("lora", "ia3")}, "expected some of lora, full, head, got 'ia3'"),
        ({"compare_lr": (("lora", -1.0),)}, "--compare-lr lora"),
    ],
)
def test_bad_option(fields, said):
    with pytest.raises(CliError) as error:
        settings(Path("a.tsv"), **fields)
    assert said in str(error.value)


def test_real_files_read_as_their_table_says():
    if not SHARED.is_dir():
        pytest.skip("no shared/data beside the repository")
    for folder, count, columns in (("sst2", 872, ["text", "label"]), ("qnli_small", 500, ["text", "text2", "label"])):
        found, table = data.read_table(SHARED / folder / "dev.tsv")
        assert (found, len(table)) == (columns, count)
