"""Readers: each format gives the same rows, and each kind of damage a message that says where and what."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from gemma_tune.data import load_examples
from gemma_tune.data.sources.readers import read_rows, resolve_files
from gemma_tune.errors import DataError

ROWS = [{"instruction": f"Question {i}, «q»?", "response": f'Answer {i}\nwith "quotes".'} for i in range(3)]


def raise_error(error):
    raise error


def rows_of(source, report=raise_error):
    return [dict(row.fields) for row in read_rows(str(source), "train", report)]


def as_csv(rows, delimiter):
    quoted = lambda text: '"' + text.replace('"', '""') + '"'
    lines = [delimiter.join(ROWS[0])] + [delimiter.join(quoted(value) for value in row.values()) for row in rows]
    return "\r\n".join(lines) + "\r\n"


CONTENTS = {
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "utf8.jsonl": "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "a.json": json.dumps(ROWS),
    "b.json": json.dumps({"version": 1, "data": ROWS}),
    "a.csv": as_csv(ROWS, ","),
    "a.tsv": as_csv(ROWS, "\t"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_text_format_gives_the_same_rows(write, name, zipped):
    content = CONTENTS[name].encode()
    path = write(name + ".gz", gzip.compress(content)) if zipped else write(name, content)
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("zipped", [False, True])
def test_parquet(tmp_path, write, zipped):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    if zipped:
        path = write("a.parquet.gz", gzip.compress(path.read_bytes()))
    assert rows_of(path) == ROWS


def test_globs_lists_and_single_files(write, tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c,d.jsonl"):
        write(name, CONTENTS["a.jsonl"])
    names = [path.name for path in resolve_files(f"{tmp_path}/*.jsonl")]
    assert names == ["a.jsonl", "b.jsonl", "c,d.jsonl"]
    assert [path.name for path in resolve_files(f"{tmp_path}/b.jsonl, {tmp_path}/a.jsonl,{tmp_path}/b.jsonl")] == [
        "b.jsonl",
        "a.jsonl",
    ]
    assert [path.name for path in resolve_files(f"{tmp_path}/c,d.jsonl")] == ["c,d.jsonl"]


def test_the_sample_and_its_heldout_part():
    assert len(load_examples("sample:smartphone_support")) == 790
    assert len(load_examples("sample:smartphone_support/heldout")) == 66


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", r"empty.jsonl has no rows"),
        ("blank.jsonl", "\n  \n", r"blank.jsonl has no rows"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a.jsonl:2: not valid JSON: .* column .*Found: '\{\"text\":'"),
        ("a.jsonl", '["x"]\n', r"a.jsonl\[1\]: expected a JSON object, found str"),
        ("a.jsonl", '["x"]\n["y"]', r"a.jsonl:1: expected a JSON object, found list"),
        ("deep.jsonl", "[" * 100_000, r"deep.jsonl:1: not valid JSON: nested too deeply"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a.jsonl:2: byte 11 of the line is not UTF-8 \(0xff\)"),
        ("a.json", '[{"text": 1}', r"a.json is not valid JSON: .* at line 1, column 13"),
        ("a.json", '{"a": [], "b": []}', r"a.json: expected a list of objects, .* found keys \['a', 'b'\]"),
        ("a.json", "7", r"a.json: expected a list of objects, found int"),
        ("a.json", '[{"text": "a"}, 3]', r"a.json\[2\]: expected a JSON object, found int"),
        ("a.csv", "text,text\na,b\n", r"a.csv:1: two columns have the same name"),
        ("a.csv", "text,other\na\n", r"a.csv:2: expected 2 columns \(text, other\), found 1"),
        ("a.csv", 'text\n"a', r"a.csv:2: not valid CSV"),
        ("a.csv", b"text\n\xff\n", r"a.csv:2: byte 1 of the line is not UTF-8"),
        ("a.csv", "text\n", r"a.csv has no rows"),
        ("a.parquet", "PAR1 but no more", r"a.parquet is not readable as Parquet"),
        ("a.jsonl.gz", "not gzip", r"a.jsonl.gz is damaged after line 0"),
        (
            "a.jsonl.gz",
            gzip.compress(CONTENTS["a.jsonl"].encode() * 50)[:-40],
            r"a.jsonl.gz is damaged after line \d+",
        ),
        ("a.xlsx", "x", r"a.xlsx has an unknown suffix. Save it as CSV. Known suffixes: .jsonl"),
    ],
)
def test_damage_is_named(write, name, content, message):
    with pytest.raises(DataError, match=message):
        rows_of(write(name, content))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/trian.jsonl", r"There is no file .*trian.jsonl. Did you mean train.jsonl\?"),
        ("{}/*.csv", r"No file matches .*\*.csv"),
        ("{}/chats", r"chats is a directory without data files"),
        (
            "sample:smartphone",
            r"There is no sample 'sample:smartphone'. Samples: smartphone_support. Did you mean smartphone_support\?",
        ),
        ("tfds:no_such_set", r"tfds:no_such_set, split 'train', can't be read: .* TFDS_DATA_DIR"),
    ],
)
def test_missing_sources_are_named(write, tmp_path, source, message):
    write("train.jsonl", CONTENTS["a.jsonl"])
    write("chats/readme.txt", "none here")
    with pytest.raises(DataError, match=message):
        rows_of(source.format(tmp_path))


def test_skipping_counts_and_goes_on(write):
    path = write("a.jsonl", '{"text": "a"}\nbroken\n[1]\n{"text": "b"}\n{"txt": "c"}\n')
    errors = []
    assert [row["text"] for row in rows_of(path, errors.append) if "text" in row] == ["a", "b"]
    assert len(errors) == 2
    assert [example.turns[0].content for example in load_examples(str(path), on_error="skip")] == ["a", "b"]
    with pytest.raises(DataError, match=r"a.jsonl:2: not valid JSON.*--on_error=skip skips such rows"):
        load_examples(str(path))


def test_a_file_whose_rows_are_all_broken_is_refused_even_when_skipping(write):
    with pytest.raises(DataError, match=r"none of 2 rows can be used. The first: .*a.jsonl:1"):
        load_examples(str(write("a.jsonl", "broken\nbroken\n")), on_error="skip")
