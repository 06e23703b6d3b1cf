"""Reads rows from files, TFDS data sets and the shipped samples.

A reader yields `Row(fields, origin)`. The error of an unreadable row is passed to `on_error`, which raises it (the
default) or counts it and lets the reader continue (`data.on_error=skip`). What makes a whole file unreadable always
raises.
"""

import csv
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gemma_tune.data.example import OnRowError, Row
from gemma_tune.data.sources.tfds import TFDS, read_tfds
from gemma_tune.errors import DataError, did_you_mean

SAMPLES = Path(__file__).parents[1] / "samples"
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_LONGEST_CSV_FIELD = 1 << 27


def read_rows(source: str, split: str, on_error: OnRowError) -> Iterator[Row]:
    """Yields the rows of everything that `source` names.

    Args:
        source: Files, globs, or several of them with commas between; `tfds:NAME/CONFIG` or `tfds:/DIRECTORY`;
            `sample:NAME` (its training part) or `sample:NAME/heldout`.
        split: Split of a TFDS data set.
        on_error: Function that is called with the error of each unreadable row.

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

    for path in resolve_files(source):
        num_seen = 0
        for row in _READERS[_suffix(path)](path, count_and_pass_on):
            num_seen += 1
            yield row
        if not num_seen:
            raise DataError(f"{path} has no rows. At least one was expected.")


def heldout_of(source: str) -> str:
    """Returns the held-out source of a sample, or an empty string where there is none."""
    if source.startswith("sample:") and "/" not in source:
        heldout = source + "/heldout"
        return heldout if _sample_path(heldout).exists() else ""
    return ""


def resolve_files(source: str) -> list[Path]:
    """Returns the files that a source names, in order and without repetition.

    Raises:
        DataError: A file doesn't exist, or has an unknown suffix.
    """
    if source.startswith("sample:"):
        return [_existing_sample(source)]
    paths: list[Path] = []
    for part in [source] if os.path.exists(source) else source.split(","):
        part = os.path.expanduser(part.strip())
        matches = [part] if os.path.exists(part) else sorted(glob.glob(part, recursive=True))
        if not matches:
            raise DataError(_not_found(part))
        paths += [Path(match) for match in matches]
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path} is a directory. Name its files, for example {path}/*.jsonl.")
        if _suffix(path) not in _READERS:
            raise DataError(f"{path} has an unknown suffix. Known suffixes: {', '.join(SUFFIXES)}, each also with .gz.")
    return list(dict.fromkeys(paths))


def _not_found(part: str) -> str:
    if glob.has_magic(part):
        return f"No file matches {part}."
    folder = os.path.dirname(part) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return f"There is no file {part}.{did_you_mean(os.path.basename(part), names)}"


def _sample_path(source: str) -> Path:
    name, _, part = source.removeprefix("sample:").partition("/")
    return SAMPLES / name / f"{part or 'train'}.jsonl"


def _existing_sample(source: str) -> Path:
    path = _sample_path(source)
    if not path.exists():
        names = sorted(folder.name for folder in SAMPLES.iterdir() if folder.is_dir())
        name = source.removeprefix("sample:").partition("/")[0]
        raise DataError(f"There is no sample {source!r}. Samples: {', '.join(names)}.{did_you_mean(name, names)}")
    return path


def _suffix(path: Path) -> str:
    """Returns the suffix that names the format, without `.gz`: `.jsonl` for `a.jsonl.gz`."""
    name = path.name.lower().removesuffix(".gz")
    ending = os.path.splitext(name)[1]
    return ".jsonl" if ending == ".ndjson" else ending


def _open(path: Path) -> BinaryIO:
    try:
        if path.name.lower().endswith(".gz"):
            return gzip.open(path, "rb")  # type: ignore[return-value]
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} can't be opened: {error.strerror or error}.") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number, line) of a text file.

    Raises:
        DataError: The file can't be opened, or is a damaged or truncated .gz file.
    """
    with _open(path) as file:
        number = 0
        while True:
            try:
                line = file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path} is damaged after line {number}: {error}.") from error
            if not line:
                return
            number += 1
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _text_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file with their line ends, of which there are three kinds."""
    num_bytes = 0
    for _, line in _lines(path):
        yield from io.StringIO(_decode(line, str(path), num_bytes), newline="")
        num_bytes += len(line)


def _decode(line: bytes, origin: str, num_bytes_before: int = 0) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{origin}: byte {num_bytes_before + error.start + 1} of the line is not UTF-8 "
            f"(0x{line[error.start]:02x}). Save the file as UTF-8."
        ) from error


def _read_jsonl(path: Path, on_error: OnRowError) -> Iterator[Row]:
    for number, line in _lines(path):
        origin = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            yield Row(_parse_object(_decode(line, origin), origin), origin)
        except DataError as error:
            on_error(error)


def _parse_object(text: str, origin: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = _why_no_json(error, f"column {getattr(error, 'colno', '')}")
        raise DataError(f"{origin}: not valid JSON: {reason}. Found: {_shorten(text)}") from error
    return _require_object(value, origin)


def _why_no_json(error: Exception, place: str) -> str:
    """Returns what `json.loads` found and, if it says so, where."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at {place}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"


def _require_object(value: object, origin: str) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: expected a JSON object, found {type(value).__name__}: {_shorten(str(value))}")
    return value


def _shorten(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _read_json(path: Path, on_error: OnRowError) -> Iterator[Row]:
    text = _decode(b"".join(line for _, line in _lines(path)), str(path))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = _why_no_json(error, f"line {getattr(error, 'lineno', '')}, column {getattr(error, 'colno', '')}")
        raise DataError(
            f"{path} is not valid JSON: {reason}. If each line is an object, name the file .jsonl."
        ) from error
    if isinstance(value, dict):
        lists = [name for name, entry in value.items() if isinstance(entry, list)]
        if len(lists) != 1:
            raise DataError(
                f"{path}: expected a list of objects, or an object with one list in it; found keys {sorted(value)}."
            )
        value = value[lists[0]]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found {type(value).__name__}.")
    for number, entry in enumerate(value, 1):
        origin = f"{path}[{number}]"
        try:
            yield Row(_require_object(entry, origin), origin)
        except DataError as error:
            on_error(error)


def _read_csv(path: Path, on_error: OnRowError) -> Iterator[Row]:
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    reader = csv.reader(_text_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        origin = f"{path}:{reader.line_num + 1}"
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{origin}: not valid CSV: {error}.") from error
        if not any(cell.strip() for cell in record):
            continue
        if header is None:
            header = [cell.strip() for cell in record]
            if len(set(header)) != len(header):
                raise DataError(f"{origin}: two columns have the same name: {header}.")
        elif len(record) != len(header):
            on_error(DataError(f"{origin}: expected {len(header)} columns ({', '.join(header)}), found {len(record)}."))
        else:
            yield Row(dict(zip(header, record, strict=True)), origin)


def _read_parquet(path: Path, on_error: OnRowError) -> Iterator[Row]:
    del on_error  # A Parquet file is read completely or not at all.
    import pyarrow
    import pyarrow.parquet

    try:
        source = pyarrow.BufferReader(_open(path).read()) if path.name.lower().endswith(".gz") else str(path)
        table = pyarrow.parquet.ParquetFile(source)
        number = 0
        for batch in table.iter_batches():
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, f"{path}[{number}]")
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not readable as Parquet: {error}.") from error


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
