"""Formats and shapes: the same rows from every kind of file, nothing guessed, and a sentence on what cannot be used."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
import pyarrow

from sprand.cli import CliError, main
from sprand.cli.finetune import data
from sprand.cli.finetune.settings import Settings

LABELS = ["01", "1", "1.0", "NA", "null", "nan", "true", "-", "1e3"]
ROWS = [{"text": f'row {i}, "é"', "label": label} for i, label in enumerate(LABELS * 2)]
HELD_OUT = [{"text": "held", "label": "01"}]
CSV = "text,label\n" + "".join('"' + row["text"].replace('"', '""') + f'",{row["label"]}\n' for row in ROWS)
TSV = "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS)
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


def load(train, held_out=None, **fields):
    return data.load(Settings(model="m", train=train, eval=held_out or train, out=Path("out"), **fields))


def refused(train, **fields) -> str:
    with pytest.raises(CliError) as error:
        load(train, **fields)
    return str(error.value)


def arrow(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def folder_of_files(path: Path) -> None:
    (path / "data").mkdir(parents=True)
    (path / "README.md").write_text("what this is")
    (path / "data" / "train-0.jsonl").write_text("".join(LINES.splitlines(keepends=True)[:7]))
    (path / "data" / "train-1.jsonl").write_text("".join(LINES.splitlines(keepends=True)[7:]))
    (path / "data" / "test.jsonl").write_text(json.dumps(HELD_OUT[0]))


def saved_splits(path: Path) -> None:
    splits = {"train": ROWS, "validation": HELD_OUT}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(str(path))


FORMATS = {
    "a.csv": lambda path: path.write_text(CSV),
    "DATA.CSV": lambda path: path.write_text(CSV, encoding="utf-8-sig"),
    "a.Tsv": lambda path: path.write_text(TSV.replace("\n", "\r\n")),
    "a.jsonl": lambda path: path.write_text(LINES),
    "a.ndjson": lambda path: path.write_text("\n" + LINES),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text(LINES),
    "a.csv.gz": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "a.jsonl.BZ2": lambda path: path.write_bytes(bz2.compress(LINES.encode())),
    "a.tsv.xz": lambda path: path.write_bytes(lzma.compress(TSV.encode())),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(LINES.encode())),
    "a.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(str(path)),
    "a.arrow": arrow,
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
    "saved splits": saved_splits,
    "folder": folder_of_files,
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_from_every_kind_of_file(tmp_path, name):
    FORMATS[name](tmp_path / name)
    loaded = load(tmp_path / name)
    assert [(row.text, row.label) for row in loaded.train] == [(row["text"], row["label"]) for row in ROWS]
    assert set(loaded.labels) == {*LABELS} and loaded.task == "classification"
    held_out = HELD_OUT if name in ("saved splits", "folder") else ROWS
    assert [row.text for row in loaded.eval] == [row["text"] for row in held_out]


def test_names_of_classes_take_the_place_of_their_numbers(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    rows = datasets.Dataset.from_list([{"text": f"row {i}", "label": i % 2} for i in range(6)], features=features)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.map(lambda row, i: {"label": -1} if i == 4 else row, with_indices=True).save_to_disk(str(tmp_path / "hidden"))
    assert load(tmp_path / "a.parquet").labels == ("bad", "good")
    assert "hidden, row 5: the column 'label' is empty" in refused(tmp_path / "hidden")


def test_several_files_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        Path(f"part-{i}.csv").write_text(f"text,label\na{i},x\nb{i},y\n")
    for given in ("part-*.csv", ("part-0.csv", "part-1.csv", "part-2.csv"), ("part-[01].csv", "part-2.csv")):
        assert [row.text for row in load(given).train] == ["a0", "b0", "a1", "b1", "a2", "b2"]
    Path("part-1.csv").write_text("text,label\na,x\nb,\n")
    assert "part-1.csv, row 2: the column 'label' is empty" in refused("part-*.csv")
    Path("notes.txt").write_text("a line")
    assert "expected tables or plain text, got both (notes.txt is plain text)" in refused(("part-0.csv", "notes.txt"))
    assert "none-*.csv: no file has such a name" in refused("none-*.csv")


def test_a_data_set_of_the_hub_without_a_network(bert, tmp_path, capsys):
    code = main.run(["finetune", "--model", str(bert), "--train", "nobody/nothing", "--out", str(tmp_path / "out")])
    assert code == 2 and not (tmp_path / "out").exists()
    assert "nobody/nothing: no file or folder, and it could not be fetched from the Hub" in capsys.readouterr().err


MISSING = {
    "a.csv": "text,label\na,x\nb, \n",
    "a.tsv": "text\tlabel\na\tx\nb\t\n",
    "null.jsonl": '{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n',
    "none.jsonl": '{"text": "a", "label": "x"}\n{"text": "b"}\n',
    "nan.jsonl": '{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n',
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_label_is_refused_with_its_row(tmp_path, name):
    (tmp_path / name).write_text(MISSING[name])
    assert f"{name}, row 2: the column 'label' is empty" in refused(tmp_path / name)


def test_a_label_that_parquet_has_not_is_refused_with_its_row(tmp_path):
    for name, labels in {"null": ["x", None, "y"], "nan": [1.0, float("nan"), 2.0]}.items():
        rows = {"text": ["a", "b", "c"], "label": labels}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
        assert f"{name}.parquet, row 2: the column 'label' is empty" in refused(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a", "label": "x", "label": "y"}\n', "line 1: the name 'label' stands twice in one object"),
        ("a.json", '[{"text": "a"},\n', "a.json: not JSON"),
        ("a.json", '["a"]', "row 1: expected a JSON object, got str"),
        ("a.jsonl", '{"text": ["a"], "label": 1}\n', "row 1: the column 'text' holds a list; expected text"),
        (
            "a.jsonl",
            '{"question": "a", "answer": "b"}\n',
            "got the columns 'question', 'answer'. Name them with --messages-column",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}\n',
            "expected two texts or two lists of turns",
        ),
        ("a.jsonl", '{"prompt": "a", "completion": null}\n', "row 1: the column 'completion' is empty"),
        ("a.json", "[]", "a.json: there are no rows"),
        ("a.csv.gz", "no gzip", "a.csv.gz: cannot be read"),
        ("a.parquet", "no parquet", "a.parquet: cannot be read"),
    ],
)
def test_bad_content(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    assert said in (message := refused(path)) and str(path) in message


@pytest.mark.parametrize("name, pack", [("a.jsonl.zst", zstd), ("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)])
def test_a_compressed_file_that_breaks_off_is_refused(name, pack, tmp_path):
    packed = pack(LINES.encode())
    (tmp_path / name).write_bytes(packed + packed[:-9])
    assert f"{name}: cannot be read" in refused(tmp_path / name)


def test_folders_of_processes_that_were_killed_go(tmp_path):
    """A process that still runs keeps its own."""
    code = (
        "import os, signal\nfrom sprand.cli.finetune.rows import temporary_folder\nprint(temporary_folder(), flush=True)\n"
        "input()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": os.environ | {"TMPDIR": str(tmp_path)}}
    first, second = (subprocess.Popen([sys.executable, "-c", code], **options) for _ in range(2))
    folders = [Path(process.stdout.readline().strip()) for process in (first, second)]
    assert all(folder.is_dir() for folder in folders)
    first.communicate("\n")
    assert folders[0].is_dir()
    third = subprocess.run([sys.executable, "-c", code.partition("input")[0]], **options | {"stdin": None}, check=True)
    assert not folders[0].exists() and folders[1].is_dir() and not Path(third.stdout.strip()).exists()
    second.communicate("\n")


def test_bytes_that_are_no_text_are_named_by_their_place_in_a_compressed_file_too(tmp_path):
    content = b"text,label\n" + b"a" * 70000 + b"\xe9,1\n"
    (tmp_path / "a.csv").write_bytes(content)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(content))
    for name in ("a.csv", "a.csv.gz"):
        assert f"{name}: not UTF-8 (byte 70011 is 0xe9)" in refused(tmp_path / name)


def test_held_out_rows_have_their_share_of_each_class(tmp_path):
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10 + ["once"]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"t{i}\t{label}\n" for i, label in enumerate(labels)))
    loaded = data.load(Settings(model="m", train=tmp_path / "a.tsv", out=tmp_path))
    counts = {label: sum(row.label == label for row in loaded.eval) for label in ("a", "b", "c", "once")}
    assert counts == {"a": 6, "b": 3, "c": 1, "once": 0}


def test_rows_of_several_labels_and_of_numbers(tmp_path):
    several = [{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}, {"text": "c", "labels": ["y"]}]
    (tmp_path / "several.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))
    (tmp_path / "several.csv").write_text('text,labels\na,"[""x"", ""y""]"\nb,[]\nc,"[""y""]"\n')
    datasets.Dataset.from_list(several).to_parquet(str(tmp_path / "several.parquet"))
    for name, task in (("several.jsonl", "auto"), ("several.csv", "multi-label"), ("several.parquet", "auto")):
        loaded = load(tmp_path / name, task=task)
        assert (loaded.task, loaded.labels) == ("multi-label", ("x", "y"))
        assert [row.labels for row in loaded.train] == [["x", "y"], [], ["y"]]
    (tmp_path / "numbers.csv").write_text("text,label\na,1.5\nb,-2\nc,nan\n")
    assert "row 3: the column 'label' holds 'nan'; expected a number" in refused(tmp_path / "numbers.csv", task="regression")
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "labels": "x"}\n')
    assert "row 1: the column 'labels' holds no list of labels" in refused(tmp_path / "bad.jsonl", task="multi-label")
