"""Reads rows from TensorFlow Datasets that are prepared on this machine, without TensorFlow."""

import os
from collections.abc import Iterator
from typing import Any

from gemma_tune.data.example import Row
from gemma_tune.errors import DataError

TFDS = "tfds:"


def open_tfds(name: str, split: str) -> Any:
    """Opens `name/config[:version]`, or a prepared data set's directory, without TensorFlow.

    Raises:
        DataError: It isn't there, or doesn't have the split.
    """
    import tensorflow_datasets as tfds

    try:
        if os.path.isdir(name):
            return tfds.builder_from_directory(name).as_data_source(split=split)
        return tfds.data_source(name, split=split, data_dir=os.environ.get("TFDS_DATA_DIR"), download=False)
    except Exception as error:  # TFDS raises many kinds; whichever it is, the user can act on the text.
        raise DataError(
            f"{TFDS}{name}, split {split!r}, can't be read: {_shorten_lines(error)} Data sets are looked for in "
            "TFDS_DATA_DIR "
            f"(now {os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')}) as array_record files; prepare one with "
            "tfds.builder(NAME, file_format='array_record').download_and_prepare()."
        ) from error


def read_tfds(name: str, split: str) -> Iterator[Row]:
    """Yields a split's rows, with text and lists instead of bytes and arrays; name and errors as in `open_tfds`."""
    for number, fields in enumerate(open_tfds(name, split), 1):
        yield Row({key: _plain(value) for key, value in fields.items()}, f"{TFDS}{name}[{number}]")


def _shorten_lines(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first if first.endswith(".") else first + "."


def _plain(value):
    """Turns TFDS's bytes and arrays into text and lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
