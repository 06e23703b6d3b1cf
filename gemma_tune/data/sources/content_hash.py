"""Identifies sources and tokenizers by their content."""

import hashlib
from pathlib import Path
from typing import Any

from gemma_tune.data.example import Tokenizer
from gemma_tune.data.sources.locations.source_files import data_files
from gemma_tune.data.sources.tfds import TFDS, open_tfds
from gemma_tune.errors import DataError


def source_fingerprint(source: str, split: str) -> list[Any]:
    """Returns plain values that change when the content of a source changes.

    For files, these are their names, which say how they are read and occur in messages, their SHA-256, and the split,
    by which the rows of some files are chosen. A folder and a data set on the Hub stand for the files of the split. For
    a TFDS data set, the values are its name with version, the split, and its files with size and time.

    Args:
        source: Source as in `read_rows`.
        split: Split of a data set that has several. Empty: `train`, and the values don't contain it.

    Raises:
        DataError: Something doesn't exist or can't be opened.
    """
    if source.startswith(TFDS):
        info = open_tfds(source.removeprefix(TFDS), split).dataset_info
        files = sorted(path for path in Path(info.data_dir).rglob("*") if path.is_file())
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return [source, info.full_name, split, stats]
    hashes = [[file.name, _file_hash(file.path)] for file in data_files(source, split or "train")]
    return [[*each, split] for each in hashes] if split else hashes


def without_folders(fingerprint: list[Any]) -> list[Any]:
    """Returns the fingerprint of a source with the names of files alone, so that it stays when they are moved."""
    return [[Path(each[0]).name, *each[1:]] if isinstance(each, list) else each for each in fingerprint]


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 hash of a tokenizer's SentencePiece model."""
    return hashlib.sha256(tokenizer.proto).hexdigest()


def _file_hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} can't be opened: {error.strerror or error}.") from error
