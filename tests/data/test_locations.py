"""What a source may name: folders, paths with odd letters, addresses; and what is said where it names nothing."""

import json
import os

import pytest

from gemma_tune.data.sources.locations.source_files import data_files
from gemma_tune.data.sources.locations.split_names import split_of_file
from gemma_tune.data.sources.readers import read_rows, resolve_files
from gemma_tune.errors import DataError

LINE = '{"text": "a"}\n'


def names(source, split="train", notes=None):
    return [
        os.path.relpath(path, source)
        for path in (str(f.path) for f in data_files(str(source), split, (notes or []).append))
    ]


def test_a_folder_of_one_format_is_read_whole(write, tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.ndjson", "readme.txt", ".hidden.jsonl", ".git/d.jsonl", "config.json"):
        write(name, LINE)
    assert names(tmp_path) == ["a.jsonl.gz", "b.jsonl", "sub/c.ndjson"]


@pytest.mark.parametrize(
    "files",
    [
        {"train": "train.jsonl", "test": "test.jsonl", "validation": "dev.jsonl"},
        {"train": "train/a.jsonl", "test": "test/a.jsonl", "validation": "val/a.jsonl"},
        {"train": "my-train-2.jsonl", "test": "my-eval-2.jsonl", "validation": "my_valid.jsonl"},
        {
            "train": "train-00000-of-00001.jsonl",
            "test": "test-00000-of-00001.jsonl",
            "validation": "x_validation.jsonl",
        },
        {"train": "train.jsonl", "heldout": "heldout.jsonl"},
    ],
)
def test_a_folder_with_splits_gives_one_and_names_the_others(write, tmp_path, files):
    """A file of test questions is never trained on because it lies beside the others."""
    for name in files.values():
        write(name, LINE)
    for split, name in files.items():
        notes = []
        assert [os.path.relpath(f.name, tmp_path) for f in data_files(str(tmp_path), split, notes.append)] == [name]
        assert len(notes) == 1 and all(other in notes[0] for other in files.values())
    with pytest.raises(DataError, match=r"has no split 'nothing'. It has .*train.*: set data.split"):
        names(tmp_path, "nothing")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train_sft-00000-of-00003.parquet", "train_sft"),
        ("data/dev-00000-of-00003-0a1b2c.parquet", "validation"),
        ("testimonials.csv", ""),
        ("constrained/latest.csv", ""),
        ("train/test.csv", "test"),
        ("evaluation/part1.csv", "test"),
    ],
)
def test_the_split_of_a_name(path, split):
    assert split_of_file(path) == split


def test_the_card_of_a_copied_data_set_counts(write, tmp_path):
    write("README.md", "---\nconfigs:\n- config_name: a\n  data_files:\n  - split: train\n    path: one.jsonl\n---\n")
    write("one.jsonl", LINE)
    write("two.jsonl", LINE)
    assert names(tmp_path) == ["one.jsonl"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.jsonl", "b.csv"], r"has files of several formats: .csv, .jsonl. Name those to read, for example .*\*.csv"),
        (["readme.txt"], r"is a directory without data files \(.jsonl"),
        (["features.json", "dataset_info.json"], r"is a data set of TensorFlow Datasets. Write tfds:"),
        (["train-00000-of-00002.jsonl"], r"1 of 2 files are missing, the first is train-00001-of-00002"),
    ],
)
def test_a_folder_that_can_not_be_read_says_what_to_name(write, tmp_path, files, message):
    for name in files:
        write(name, LINE)
    with pytest.raises(DataError, match=message):
        names(tmp_path)


@pytest.mark.parametrize("folder", ["in put [v1]", "données, final", "~backup", "org/name"])
def test_odd_paths(write, tmp_path, monkeypatch, folder):
    path = write(f"{folder}/a, b [2].jsonl", LINE)
    write(f"{folder}/c.jsonl", LINE)
    monkeypatch.chdir(tmp_path)
    assert resolve_files(f"{folder}/a, b [2].jsonl") == [path.relative_to(tmp_path)]
    assert len(resolve_files(f"{tmp_path}/{folder}")) == 2
    if "," not in folder:  # A pattern with a comma is two.
        assert len(resolve_files(f"{folder}/*.jsonl")) == 2


def test_a_home_that_the_shell_leaves(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a, b.jsonl", LINE)
    write("sets/c.jsonl", LINE)
    write("sets/d.csv", "text\na\n")
    assert resolve_files("~/a, b.jsonl") == [tmp_path / "a, b.jsonl"]
    assert resolve_files("~/sets/c.jsonl, ~/sets/*.csv") == [tmp_path / "sets/c.jsonl", tmp_path / "sets/d.csv"]


def test_what_is_here_comes_before_the_hub(write, tmp_path, monkeypatch):
    """A file or folder ORG/NAME is read; no network is asked."""
    write("org/folder/a.jsonl", LINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "gemma_tune.data.sources.locations.source_files.hub_files", lambda *_: pytest.fail("the Hub was asked")
    )
    assert [row.fields for row in read_rows("org/folder", "train", print)] == [{"text": "a"}]
    with pytest.raises(
        DataError, match=r"There is no file org/foldre. Did you mean folder\? If you mean .* write hf://"
    ):
        resolve_files("org/foldre")


@pytest.mark.parametrize(
    ("address", "command", "file"),
    [
        ("https://example.org/a/train.jsonl", "curl -LO https://example.org/a/train.jsonl", "train.jsonl"),
        ("https://example.org/a.csv?id=1&key=2", "curl -LO 'https://example.org/a.csv?id=1&key=2'", "a.csv"),
        (
            "https://huggingface.co/datasets/org/name/blob/main/a.jsonl",
            "curl -LO https://huggingface.co/datasets/org/name/resolve/main/a.jsonl",
            "a.jsonl",
        ),
        ("https://github.com/o/n/blob/main/a.csv", "curl -LO https://github.com/o/n/raw/main/a.csv", "a.csv"),
        ("s3://bucket/a.parquet", "aws s3 cp s3://bucket/a.parquet .", "a.parquet"),
        ("gs://bucket/a.parquet", "gcloud storage cp gs://bucket/a.parquet .", "a.parquet"),
    ],
)
def test_addresses_are_refused_with_the_command_that_fetches_them(address, command, file):
    with pytest.raises(DataError) as error:
        resolve_files(address)
    assert f"Run `{command}`, then write --data={file}." in str(error.value)


@pytest.mark.parametrize("page", ["", "/", "/tree/main", "/viewer/default/train"])
def test_a_page_of_the_hub_is_refused_with_the_address_of_its_data(page):
    with pytest.raises(DataError, match=r"Write hf://datasets/org/name\."):
        resolve_files(f"https://huggingface.co/datasets/org/name{page}")


def test_a_file_named_twice_is_read_once(write, tmp_path):
    write("a.json", json.dumps([{"text": "a"}]))
    assert len(resolve_files(f"{tmp_path}/a.json,{tmp_path},{tmp_path}/*.json")) == 1
