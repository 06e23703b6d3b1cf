"""Reads rows from JSON files. Their content says whether each line is an object or the file is one document."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator

from gemma_tune.data.example import OnNote, OnRowError, Row
from gemma_tune.data.sources.file_formats.data_file import DataFile, format_of
from gemma_tune.data.sources.file_formats.json_documents import require_object, rows_of_document
from gemma_tune.data.sources.file_formats.text_files import read_text_lines
from gemma_tune.errors import DataError

_WHITE_SPACE = re.compile(r"[ \t\r\n]*")

_Line = tuple[int, str]


def read_json_rows(file: DataFile, on_error: OnRowError, on_note: OnNote) -> Iterator[Row]:
    """Yields the rows of a JSON or JSON Lines file, whichever its content is.

    Args:
        file: The file. Where a document holds several splits, its split is read.
        on_error: Function that is called with the error of each line or entry that isn't an object.
        on_note: Function that is told what isn't read.

    Raises:
        DataError: The file is a document that isn't valid JSON, or has no rows in any known arrangement.
    """
    undecodable: list[DataError] = []
    is_lines = False

    def report_or_keep(error: DataError) -> None:
        if is_lines:
            on_error(error)
        else:
            undecodable.append(error)

    lines = read_text_lines(file, report_or_keep, on_note)
    beginning = list(_two_lines_with_text(lines))
    with_text = [text for _, text in beginning if not text.isspace()]
    is_lines = len(with_text) + len(undecodable) > 1 and _are_objects(with_text)
    if is_lines:
        for error in undecodable:
            on_error(error)
        yield from _rows_of_lines(itertools.chain(beginning, lines), file, on_error)
    elif with_text or undecodable:
        text = "".join(text for _, text in itertools.chain(beginning, lines))
        if undecodable:
            raise undecodable[0]
        yield from _rows_of_text(text, file, on_error, on_note)


def _two_lines_with_text(lines: Iterator[_Line]) -> Iterator[_Line]:
    """Yields lines up to the second one that isn't blank."""
    num_with_text = 0
    for line in lines:
        yield line
        num_with_text += not line[1].isspace()
        if num_with_text == 2:
            return


def _are_objects(lines: list[str]) -> bool:
    """Returns whether a file that begins with these lines, which aren't blank, has an object on each line."""
    first, second = lines[0].strip() if lines else "", lines[1].strip() if len(lines) > 1 else ""
    if _is_object(first) or first[:1] not in "[{":
        return True
    return _is_object(second) and first[-1] not in "[{,:"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _rows_of_lines(lines: Iterable[_Line], file: DataFile, on_error: OnRowError) -> Iterator[Row]:
    for number, text in lines:
        if not text or text.isspace():
            continue
        origin = f"{file.name}:{number}"
        try:
            yield Row(_parse_line(text, origin), origin)
        except DataError as error:
            on_error(error)


def _parse_line(text: str, origin: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = _why_no_json(error, f"column {getattr(error, 'colno', '')}")
        text = text.strip()
        found = text if len(text) <= 60 else text[:57] + "..."
        raise DataError(f"{origin}: not valid JSON: {reason}. Found: {found!r}") from error
    return require_object(value, origin)


def _rows_of_text(text: str, file: DataFile, on_error: OnRowError, on_note: OnNote) -> Iterator[Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _rows_of_objects(text, file, on_error)
        elif format_of(file.path.name) == ".jsonl":
            yield from _rows_of_lines(enumerate(text.split("\n"), 1), file, on_error)
        else:
            raise _not_json(file, error, error.lineno, error.colno) from error
    except (ValueError, RecursionError) as error:
        if format_of(file.path.name) != ".jsonl":
            raise _not_json(file, error) from error
        yield from _rows_of_lines(enumerate(text.split("\n"), 1), file, on_error)
    else:
        yield from rows_of_document(value, file, on_error, on_note)


def _rows_of_objects(text: str, file: DataFile, on_error: OnRowError) -> Iterator[Row]:
    """Yields a row for each of several objects, one behind the other, that may have several lines each."""
    decoder, place, line = json.JSONDecoder(), 0, 1
    while True:
        start = _WHITE_SPACE.match(text, place).end()  # type: ignore[union-attr]
        line += text.count("\n", place, start)
        if start == len(text):
            return
        try:
            value, place = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _not_json(file, error, error.lineno, error.colno) from error
        except (ValueError, RecursionError) as error:
            raise _not_json(file, error, line) from error
        origin = f"{file.name}:{line}"
        line += text.count("\n", start, place)
        try:
            yield Row(require_object(value, origin), origin)
        except DataError as error:
            on_error(error)


def _not_json(file: DataFile, error: Exception, line: int = 1, column: int = 1) -> DataError:
    return DataError(f"{file.name} is not valid JSON: {_why_no_json(error, f'line {line}, column {column}')}.")


def _why_no_json(error: Exception, place: str) -> str:
    """Returns what `json.loads` found and, if it says so, where."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at {place}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"
