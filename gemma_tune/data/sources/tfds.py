"""Reads rows from data sets of TensorFlow Datasets that are on this machine, without TensorFlow."""

import os
from collections.abc import Iterator
from typing import Any

from gemma_tune.data.example import Row
from gemma_tune.errors import DataError

TFDS = "tfds:"


def open_tfds(name: str, split: str) -> Any:
    """Opens a data set without TensorFlow.

    Args:
        name: `NAME/CONFIG[:VERSION]`, or the directory of a prepared data set.
        split: Name of the split.

    Raises:
        DataError: The data set isn't on this machine, or doesn't have the split.
    """
    import tensorflow_datasets as tfds

    name = os.path.expanduser(name)
    try:
        if os.path.isdir(name):
            return tfds.builder_from_directory(name).as_data_source(split=split)
        return tfds.data_source(name, split=split, data_dir=os.environ.get("TFDS_DATA_DIR"), download=False)
    except Exception as error:  # TFDS raises many kinds, and users can act on the text of each.
        raise DataError(
            f"{TFDS}{name}, split {split!r}, can't be read: {_first_line(error)} Data sets are looked for in "
            f"TFDS_DATA_DIR (now {os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')}) as array_record files. "
            "Prepare one with tfds.builder(NAME, file_format='array_record').download_and_prepare()."
        ) from error


def read_tfds(name: str, split: str) -> Iterator[Row]:
    """Yields the rows of a split, with strings and lists for bytes and arrays; arguments as in `open_tfds`."""
    for number, fields in enumerate(open_tfds(name, split), 1):
        yield Row({key: _plain(value) for key, value in fields.items()}, f"{TFDS}{name}[{number}]")


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first if first.endswith(".") else first + "."


def _plain(value):
    """Converts the bytes and arrays of TFDS to strings and lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
