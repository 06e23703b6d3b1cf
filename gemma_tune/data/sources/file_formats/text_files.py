"""Reads the lines of text files, whose encoding is found by looking at them.

A byte order mark decides; without one, NUL bytes at every other place mean UTF-16. Everything else is UTF-8, unless the
first byte above ASCII shows that it isn't: such a file is cp1252, the encoding of Windows in Western Europe, if its
bytes look so. Up to there it had ASCII alone, which is the same in both, so that nothing must be read again.
"""

import codecs
import io
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from gemma_tune.data.example import OnNote, OnRowError
from gemma_tune.data.sources.file_formats.data_file import DataFile, open_data_file
from gemma_tune.errors import DataError

_LOOKED_AT_BYTES = 1 << 16
_BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16.
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_HIGH_BYTES = re.compile(rb"[\x80-\xff]+")
_NOT_IN_CP1252_TEXT = re.compile(rb"[\x00\x81\x8d\x8f\x90\x9d\xff]")
_WORD_ABOVE_ASCII = re.compile(r"""[^\s"',;|:]*[^\x00-\x7f][^\s"',;|:]*""")
_READ_ERRORS = (OSError, EOFError, zlib.error)


def read_text_lines(file: DataFile, on_error: OnRowError, on_note: OnNote) -> Iterator[tuple[int, str]]:
    """Yields (number, line) of a text file, lines with their ends.

    Args:
        file: The file.
        on_error: Function that is called with the error of each line that can't be decoded. The line is left out.
        on_note: Function that is told an encoding that isn't UTF-8.

    Raises:
        DataError: The file can't be opened, is a damaged or truncated .gz file, or isn't what its byte order mark says.
    """
    with open_data_file(file) as stream:
        encoding = _wide_encoding(_peek(stream, file))
        if encoding:
            on_note(f"{file.name}: read as {encoding.upper()}.")
            yield from _wide_lines(stream, file, encoding)
        else:
            yield from _narrow_lines(stream, file, on_error, on_note)


def _peek(stream: BinaryIO, file: DataFile) -> bytes:
    try:
        return stream.peek(_LOOKED_AT_BYTES)[:_LOOKED_AT_BYTES]  # type: ignore[attr-defined]
    except _READ_ERRORS as error:
        raise _damaged(file, 0, error) from error


def _wide_encoding(beginning: bytes) -> str:
    """Returns UTF-16 or UTF-32, if a file that begins like this has it; otherwise ''."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if beginning.startswith(mark):
            return encoding
    even, odd = beginning[::2].count(0), beginning[1::2].count(0)
    most, least = max(even, odd), min(even, odd)
    if most * 10 > len(beginning) // 2 and least * 20 < most:  # Spaces, signs and line ends alone are a tenth.
        return "utf-16-le" if odd > even else "utf-16-be"
    return ""


def _wide_lines(stream: BinaryIO, file: DataFile, encoding: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(io.TextIOWrapper(stream, encoding, newline=""), 1):
            yield number, line
    except UnicodeError as error:
        raise DataError(f"{file.name} is not {encoding.upper()} after line {number}: {error}.") from error
    except _READ_ERRORS as error:
        raise _damaged(file, number, error) from error


def _narrow_lines(stream: BinaryIO, file: DataFile, on_error: OnRowError, on_note: OnNote) -> Iterator[tuple[int, str]]:
    encoding, only_ascii = "utf-8", True
    for number, line in _byte_lines(stream, file):
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            if only_ascii and _looks_like_cp1252(line + _peek(stream, file)):
                encoding = "cp1252"
                text = line.decode(encoding)
                on_note(
                    f"{file.name}: read as cp1252 (Western European), as in {_word_above_ascii(text)!r}. If that "
                    "looks wrong, save the file as UTF-8."
                )
            else:
                on_error(_undecodable(file, number, line, error))
                continue
        if only_ascii and not text.isascii():
            only_ascii = False
        yield number, text


def _byte_lines(stream: BinaryIO, file: DataFile) -> Iterator[tuple[int, bytes]]:
    number = 0
    while True:
        try:
            line = stream.readline()
        except _READ_ERRORS as error:
            raise _damaged(file, number, error) from error
        if not line:
            return
        number += 1
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _looks_like_cp1252(sample: bytes) -> bool:
    """Returns whether bytes that aren't UTF-8 may be Western European text.

    It has single letters above ASCII between others. Cyrillic, Greek or Chinese encodings have long runs of them.
    """
    runs = [len(run) for run in _HIGH_BYTES.findall(sample)]
    return not _NOT_IN_CP1252_TEXT.search(sample) and sum(n for n in runs if n > 3) * 4 <= sum(runs)


def _word_above_ascii(text: str) -> str:
    found = _WORD_ABOVE_ASCII.search(text)
    return found[0].rstrip(".?!)")[:30] if found else ""


def _undecodable(file: DataFile, number: int, line: bytes, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{file.name}:{number}: byte {error.start + 1} of the line is not {error.encoding.upper()} "
        f"(0x{line[error.start]:02x}). Save the file as UTF-8, or convert it, for example from cp1251: iconv -f CP1251 "
        "-t UTF-8 OLD > NEW."
    )


def _damaged(file: DataFile, number: int, error: Exception) -> DataError:
    return DataError(f"{file.name} is damaged after line {number}: {error}.")
