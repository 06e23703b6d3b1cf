"""Reads rows from Parquet and Arrow files, with pyarrow alone."""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gemma_tune.data.example import OnNote, OnRowError, Row
from gemma_tune.data.sources.file_formats.data_file import DataFile, open_data_file
from gemma_tune.errors import DataError

_ARROW_FILE_MAGIC = b"ARROW1"
_BATCH_ROWS = 4096


def read_parquet_rows(file: DataFile, on_error: OnRowError, on_note: OnNote) -> Iterator[Row]:
    """Yields the rows of a Parquet file, which is read completely or not at all.

    Raises:
        DataError: The file can't be read.
    """
    import pyarrow.parquet

    del on_error, on_note
    return _rows(file, "Parquet", lambda: _parquet_batches(pyarrow.parquet.ParquetFile(_source(file))))


def read_arrow_rows(file: DataFile, on_error: OnRowError, on_note: OnNote) -> Iterator[Row]:
    """Yields the rows of an Arrow file, in the format of files or in that of streams, as Hugging Face datasets writes.

    Raises:
        DataError: The file can't be read.
    """
    del on_error, on_note
    return _rows(file, "Arrow", lambda: _arrow_batches(file))


def _parquet_batches(parquet: Any) -> tuple[Any, Iterable[Any]]:
    return parquet.schema_arrow, parquet.iter_batches()


def _arrow_batches(file: DataFile) -> tuple[Any, Iterable[Any]]:
    import pyarrow
    import pyarrow.ipc

    source = _source(file)
    if isinstance(source, str):
        source = pyarrow.memory_map(source)
    is_file = source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    source.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(source)
        batches: Iterable[Any] = (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        reader = batches = pyarrow.ipc.open_stream(source)
    return reader.schema, (
        batch.slice(start, _BATCH_ROWS) for batch in batches for start in range(0, batch.num_rows, _BATCH_ROWS)
    )


def _rows(file: DataFile, kind: str, open_batches: Callable[[], tuple[Any, Iterable[Any]]]) -> Iterator[Row]:
    import pyarrow

    number = 0
    try:
        schema, batches = open_batches()
        classes = _class_names(schema)
        for batch in batches:
            for fields in batch.to_pylist():
                number += 1
                for name, names in classes.items():
                    fields[name] = _class_name(fields[name], names)
                yield Row(fields, f"{file.name}[{number}]")
    except (pyarrow.ArrowException, OSError, EOFError, ValueError, zlib.error) as error:
        behind = f" behind row {number}" if number else ""
        raise DataError(f"{file.name} is not readable as {kind}{behind}: {error}.") from error


def _source(file: DataFile) -> Any:
    """Returns a path, or the content of a compressed file."""
    import pyarrow

    if not file.path.name.lower().endswith(".gz"):
        with open_data_file(file):  # For the message if it can't be opened.
            return str(file.path)
    with open_data_file(file) as stream:
        return pyarrow.BufferReader(stream.read())


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Returns the names of classes that Hugging Face datasets stores as numbers, by column."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and name in schema.names
        }
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}


def _class_name(value: Any, names: list[str]) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
