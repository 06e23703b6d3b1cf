"""Identifies sources and tokenizers by their content."""

import hashlib
from pathlib import Path
from typing import Any

from gemma_tune.data.example import Tokenizer
from gemma_tune.data.sources.readers import resolve_files
from gemma_tune.data.sources.tfds import TFDS, open_tfds
from gemma_tune.errors import DataError


def source_fingerprint(source: str, split: str) -> list[Any]:
    """Returns plain values that change when the content of a source changes.

    For files, these are their names, which say how they are read and occur in messages, and their SHA-256. For a TFDS
    data set, they are its name with version, the split, and its files with size and time.

    Args:
        source: Source as in `read_rows`.
        split: Split of a TFDS data set.

    Raises:
        DataError: Something doesn't exist or can't be opened.
    """
    if source.startswith(TFDS):
        info = open_tfds(source.removeprefix(TFDS), split).dataset_info
        files = sorted(path for path in Path(info.data_dir).rglob("*") if path.is_file())
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return [source, info.full_name, split, stats]
    return [[str(path), _file_hash(path)] for path in resolve_files(source)]


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
