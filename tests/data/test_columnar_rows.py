"""Arrow and Parquet files, and folders that datasets' `save_to_disk` writes, read with pyarrow alone."""

import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from gemma_tune.data.sources.content_hash import source_fingerprint
from gemma_tune.data.sources.readers import read_rows
from gemma_tune.errors import DataError

ROWS = [{"prompt": f"Question {i}?", "completion": f"Answer {i}, é."} for i in range(10)]


def rows_of(source, split="train"):
    def fail(error):
        raise error

    return [dict(row.fields) for row in read_rows(str(source), split, fail)]


def write_arrow(path, rows, kind="stream", rows_per_batch=4, schema=None):
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = {"stream": pyarrow.ipc.new_stream, "file": pyarrow.ipc.new_file}[kind]
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return path


def save_to_disk(folder, rows, num_files=2, **state):
    """Writes the layout of datasets.Dataset.save_to_disk."""
    names = [f"data-{i:05}-of-{num_files:05}.arrow" for i in range(num_files)]
    size = -(-len(rows) // num_files)
    for i, name in enumerate(names):
        write_arrow(folder / name, rows[i * size : (i + 1) * size])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("zipped", [False, True])
def test_both_formats_of_arrow(tmp_path, kind, zipped):
    path = write_arrow(tmp_path / "a.arrow", ROWS, kind)
    if zipped:
        path = tmp_path / "a.arrow.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.arrow").read_bytes()))
    assert rows_of(path) == ROWS


def test_nested_values_and_nulls_come_out_as_in_parquet(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a", "name": None}], "n": 1.5}, {"messages": None, "n": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert rows_of(write_arrow(tmp_path / "a.arrow", rows)) == rows_of(tmp_path / "a.parquet") == rows


def test_a_saved_data_set_in_several_files(tmp_path):
    assert rows_of(save_to_disk(tmp_path / "saved", ROWS)) == ROWS
    assert rows_of(f"{tmp_path}/saved/*.arrow") == ROWS


def test_a_saved_dict_gives_the_split_that_is_asked_for(tmp_path):
    save_to_disk(tmp_path / "train", ROWS)
    save_to_disk(tmp_path / "test", ROWS[:2])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert rows_of(tmp_path) == ROWS
    assert rows_of(tmp_path, "test") == ROWS[:2]
    with pytest.raises(
        DataError, match=r"has no split 'tset'. It has train, test: set data.split. Did you mean test\?"
    ):
        rows_of(tmp_path, "tset")


def test_class_numbers_that_have_names_become_names(tmp_path):
    features = {"label": {"_type": "ClassLabel", "names": ["refund", "delivery"]}, "text": {"_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema([("text", pyarrow.string()), ("label", pyarrow.int64())], metadata=metadata)
    rows = [
        {"text": "a", "label": 1},
        {"text": "b", "label": 0},
        {"text": "c", "label": None},
        {"text": "d", "label": -1},
    ]
    expected = ["delivery", "refund", None, -1]
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for path in (write_arrow(tmp_path / "a.arrow", rows, schema=schema), tmp_path / "a.parquet"):
        assert [row["label"] for row in rows_of(path)] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "data-00001-of-00002.arrow").unlink(), "1 of 2 files are missing, the first is data-00001"),
        (lambda f: (f / "state.json").write_text("{}"), "doesn't name the files of the data set"),
        (lambda f: (f / "state.json").write_text("["), "state.json can't be read"),
        (
            lambda f: save_to_disk(f, ROWS, _indices_data_files=[{"filename": "i"}]),
            "saved by an old version of datasets",
        ),
        (lambda f: (f / "data-00000-of-00002.arrow").write_bytes(b"nothing"), "is not readable as Arrow"),
        (
            lambda f: (f / "data-00000-of-00002.arrow").write_bytes(
                (f / "data-00000-of-00002.arrow").read_bytes()[:-200]
            ),
            "is not readable as Arrow",
        ),
    ],
)
def test_damage_of_a_saved_data_set_is_named(tmp_path, change, message):
    change(save_to_disk(tmp_path, ROWS))
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path)


def test_the_fingerprint_knows_the_content_and_the_split(tmp_path):
    folder = save_to_disk(tmp_path / "train", ROWS)
    save_to_disk(tmp_path / "test", ROWS[:2])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    before = source_fingerprint(str(tmp_path), "train")
    assert source_fingerprint(str(tmp_path), "train") == before != source_fingerprint(str(tmp_path), "test")
    write_arrow(folder / "data-00001-of-00002.arrow", ROWS[5:9])
    assert source_fingerprint(str(tmp_path), "train") != before


def test_a_fingerprint_without_a_split_is_names_and_hashes(tmp_path):
    """The card of an export lists them."""
    folder = save_to_disk(tmp_path / "saved", ROWS)
    pairs = source_fingerprint(str(folder), "")
    assert [len(pair) for pair in pairs] == [2, 2]
    assert [path for path, _ in pairs] == [str(folder / f"data-0000{i}-of-00002.arrow") for i in range(2)]


def test_neither_datasets_nor_pandas_is_imported(tmp_path):
    save_to_disk(tmp_path, ROWS)
    code = (
        "import sys; from gemma_tune.data import load_examples; "
        "print(len(load_examples(sys.argv[1])), 'datasets' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["10", "False", "False"]
