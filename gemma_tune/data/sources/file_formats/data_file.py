"""Describes a file with rows, and opens it."""

import gzip
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gemma_tune.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_ALIASES = {".ndjson": ".jsonl"}
_DESCRIPTIONS = {"state.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "config.json"}


class DataFile(NamedTuple):
    """A file with rows.

    Attributes:
        path: Place of the file on this machine.
        name: Name of the file in messages: its path, or its address on the Hugging Face Hub.
        split: Split that is read where one file holds several.
    """

    path: Path
    name: str
    split: str


def format_of(name: str) -> str:
    """Returns the suffix that names a file's format, without `.gz`: `.jsonl` for `a.jsonl.gz` and `a.ndjson`."""
    suffix = os.path.splitext(name.lower().removesuffix(".gz"))[1]
    return _ALIASES.get(suffix, suffix)


def open_data_file(file: DataFile) -> BinaryIO:
    """Opens a file, which may be compressed with gzip. The stream has `peek`.

    Raises:
        DataError: The file can't be opened.
    """
    try:
        if file.path.name.lower().endswith(".gz"):
            return gzip.open(file.path, "rb")  # type: ignore[return-value]
        return open(file.path, "rb")
    except OSError as error:
        raise DataError(f"{file.name} can't be opened: {error.strerror or error}.") from error


def is_data(path: str) -> bool:
    """Returns whether a file's name has a known suffix, and isn't that of a file that describes a data set."""
    return format_of(path) in SUFFIXES and os.path.basename(path) not in _DESCRIPTIONS
