"""Reads rows from CSV and TSV files, whose delimiter is found by looking at their beginning.

A row with a broken quote is an error that names the line in which it begins. Reading goes on at the line after that.
"""

import csv
import io
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from gemma_tune.data.example import OnNote, OnRowError, Row
from gemma_tune.data.sources.file_formats.data_file import DataFile, format_of
from gemma_tune.data.sources.file_formats.text_files import read_text_lines
from gemma_tune.errors import DataError

_DELIMITERS = {",": "','", ";": "';'", "\t": "tabs", "|": "'|'"}
_LOOKED_AT_LINES = 200
_LONGEST_CELL = 1 << 27
_MOST_LINES_IN_ROW = 100_000
_SEPARATOR_LINE = "sep="  # Excel's way to name the delimiter, in the first line.

_Line = tuple[int, str]


def read_csv_rows(file: DataFile, on_error: OnRowError, on_note: OnNote) -> Iterator[Row]:
    """Yields the rows of a CSV or TSV file, by the names in its first line.

    Args:
        file: The file.
        on_error: Function that is called with the error of each row that has a broken quote or another number of cells.
        on_note: Function that is told a delimiter or an encoding that the file's name doesn't say.

    Raises:
        DataError: Two columns have the same name, or the file can't be read as text.
    """
    csv.field_size_limit(_LONGEST_CELL)
    lines = _all_line_ends(read_text_lines(file, on_error, on_note))
    sample = list(itertools.islice(lines, _LOOKED_AT_LINES))
    usual = "\t" if format_of(file.path.name) == ".tsv" else ","
    delimiter = _named_delimiter(sample)
    if delimiter:
        sample = sample[1:]
    else:
        delimiter = _find_delimiter([text for _, text in sample], usual)
    if delimiter != usual:
        on_note(f"{file.name}: cells are separated by {_DELIMITERS.get(delimiter, repr(delimiter))}.")
    header: list[str] = []
    for first, last, record in _records(_LineFeed(itertools.chain(sample, lines)), delimiter, file, on_error):
        if not any(cell.strip() for cell in record):
            continue
        if not header:
            header = _header(record, f"{file.name}:{first}")
            continue
        while len(record) > len(header) and not record[-1].strip():
            record.pop()  # Spreadsheets write empty cells behind the last column.
        if len(record) == len(header):
            yield Row(dict(zip(header, record, strict=True)), f"{file.name}:{first}")
        else:
            on_error(_wrong_width(file, first, last, header, record))


class _LineFeed:
    """Gives lines to a csv.reader, and can give lines of a broken row again.

    Args:
        lines: Numbers and texts of lines.

    Attributes:
        row: Lines that were given for the current row.
    """

    def __init__(self, lines: Iterable[_Line]):
        self._lines = iter(lines)
        self._returned: deque[_Line] = deque()
        self.row: list[_Line] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if len(self.row) > _MOST_LINES_IN_ROW:
            raise csv.Error("unexpected end of data")
        self.row.append(self._returned.popleft() if self._returned else next(self._lines))
        return self.row[-1][1]

    def give_again_after_first(self) -> None:
        """Gives all lines of the current row again, except its first."""
        self._returned.extendleft(reversed(self.row[1:]))

    def skip_until_quoted(self) -> None:
        """Skips lines until one that begins with a quote."""
        for line in self:
            if line.startswith('"'):
                self._returned.appendleft(self.row[-1])
                return
            self.row.clear()


def _records(
    feed: _LineFeed, delimiter: str, file: DataFile, on_error: OnRowError
) -> Iterator[tuple[int, int, list[str]]]:
    """Yields (number of the first line, number of the last line, cells) of each row."""
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    is_quoted: bool | None = None  # Whether all rows begin with a quote, as the header does.
    while True:
        feed.row = []
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            on_error(_broken_quote(file, feed.row[0], error))
            feed.give_again_after_first()
            if is_quoted:  # Other lines are the rest of the broken row.
                feed.skip_until_quoted()
            continue
        if is_quoted is None:
            is_quoted = feed.row[0][1].startswith('"')
        yield feed.row[0][0], feed.row[-1][0], record


def _all_line_ends(lines: Iterable[_Line]) -> Iterator[_Line]:
    """Splits lines at single carriage returns too, which old spreadsheets write, and counts these lines."""
    num_more = 0
    for number, line in lines:
        if "\r" not in line or line.find("\r") >= len(line) - 2:
            yield number + num_more, line
            continue
        parts = list(io.StringIO(line, newline=""))
        for index, part in enumerate(parts):
            yield number + num_more + index, part
        num_more += len(parts) - 1


def _named_delimiter(sample: Sequence[_Line]) -> str:
    first = sample[0][1].strip("\r\n").strip('"') if sample else ""
    return first[-1] if first.lower().startswith(_SEPARATOR_LINE) and len(first) == len(_SEPARATOR_LINE) + 1 else ""


def _find_delimiter(sample: Sequence[str], usual: str) -> str:
    """Returns the delimiter with which most rows have as many cells as the header; the usual one where several do."""

    def fit(delimiter: str) -> tuple[float, int]:
        try:
            records = [record for record in csv.reader(sample, delimiter=delimiter) if any(record)]
        except csv.Error:
            return 0.0, 0
        width = len(records[0]) if records else 0
        if width < 2:
            return 0.0, 0
        rows = records[1:] or records
        return sum(len(record) == width for record in rows) / len(rows), width

    return max([usual, *_DELIMITERS], key=fit)


def _header(record: list[str], origin: str) -> list[str]:
    header = [cell.strip() for cell in record]
    while not header[-1]:
        header.pop()
    if len(set(header)) != len(header):
        raise DataError(f"{origin}: two columns have the same name: {header}.")
    return header


def _wrong_width(file: DataFile, first: int, last: int, header: list[str], record: list[str]) -> DataError:
    lines = f", in lines {first} to {last}" if last > first else ""
    return DataError(
        f"{file.name}:{first}: expected {len(header)} columns ({', '.join(header)}), found {len(record)}{lines}. Text "
        "that contains the separator needs quotes around it."
    )


def _broken_quote(file: DataFile, line: _Line, error: csv.Error) -> DataError:
    number, text = line
    reason = f"the quote that opens in this row doesn't close as it should ({error})"
    if "field larger" in str(error):
        reason = f"a cell has more than {_LONGEST_CELL} characters"
    shown = text.strip() if len(text.strip()) <= 60 else text.strip()[:57] + "..."
    return DataError(
        f'{file.name}:{number}: not valid CSV: {reason}: {shown!r}. Write quotes inside a quoted cell twice: "".'
    )
