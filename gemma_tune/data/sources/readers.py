"""Reads rows from files, folders, the Hugging Face Hub, TFDS data sets and the shipped samples.

A reader yields `Row(fields, origin)`. The error of an unreadable row is passed to `on_error`, which raises it (the
default) or counts it and lets the reader continue (`data.on_error=skip`). What makes a whole file unreadable always
raises.
"""

from collections.abc import Iterator
from pathlib import Path

from gemma_tune.data.example import OnNote, OnRowError, Row
from gemma_tune.data.sources.file_formats.columnar_rows import read_arrow_rows, read_parquet_rows
from gemma_tune.data.sources.file_formats.csv_rows import read_csv_rows
from gemma_tune.data.sources.file_formats.data_file import format_of
from gemma_tune.data.sources.file_formats.json_rows import read_json_rows
from gemma_tune.data.sources.locations.source_files import SAMPLE, data_files, sample_path
from gemma_tune.data.sources.tfds import TFDS, read_tfds
from gemma_tune.errors import DataError

_READERS = {
    ".jsonl": read_json_rows,
    ".json": read_json_rows,
    ".csv": read_csv_rows,
    ".tsv": read_csv_rows,
    ".parquet": read_parquet_rows,
    ".arrow": read_arrow_rows,
}


def read_rows(source: str, split: str, on_error: OnRowError, on_note: OnNote = lambda note: None) -> Iterator[Row]:
    """Yields the rows of everything that `source` names.

    Args:
        source: Files, folders, globs, data sets on the Hugging Face Hub (`hf://datasets/ORG/NAME[:config][@split]` or
            `ORG/NAME`), or several of them with commas between; `tfds:NAME/CONFIG` or `tfds:/DIRECTORY`; `sample:NAME`
            (its training part) or `sample:NAME/heldout`.
        split: Split to read of a data set that has several.
        on_error: Function that is called with the error of each unreadable row.
        on_note: Function that is told what else the user should know of a file: its encoding, its delimiter, what of it
            isn't read.

    Raises:
        DataError: A file doesn't exist, is empty, or is not in the format that its name says.
    """
    if source.startswith(TFDS):
        yield from read_tfds(source.removeprefix(TFDS), split)
        return
    num_seen = 0

    def count_and_pass_on(error: DataError) -> None:
        nonlocal num_seen
        num_seen += 1
        on_error(error)

    for file in data_files(source, split, on_note):
        num_seen = 0
        for row in _READERS[format_of(file.path.name)](file, count_and_pass_on, on_note):
            num_seen += 1
            yield row
        if not num_seen:
            raise DataError(f"{file.name} has no rows. At least one was expected.")


def heldout_of(source: str) -> str:
    """Returns the held-out source of a sample, or an empty string where there is none."""
    if source.startswith(SAMPLE) and "/" not in source:
        heldout = source + "/heldout"
        return heldout if sample_path(heldout).exists() else ""
    return ""


def resolve_files(source: str, split: str = "train") -> list[Path]:
    """Returns the paths of the files that a source names; arguments and errors as in `data_files`."""
    return [file.path for file in data_files(source, split)]
