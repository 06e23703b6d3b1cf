"""Files that appear whole or not at all, and checksums that tell whether they are still as they were written."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.errors import GemmaTuneError

CHECKSUMS = "checksums.json"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under another name, flushes it to the disk, and gives it its name.

    Args:
        path: Final path. A file of that name is replaced.
        write: Function that writes the file to the path it is given.

    Raises:
        OSError: The file can't be written; one that was there is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        fsync_file(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file atomically, line by line, so that it is never in memory as a whole."""

    def write(partial: Path) -> None:
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fsync_file(path: Path) -> None:
    """Waits until a file is on the disk: after a power cut it could have its size, but zeros in it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def disk_errors_as(error_type: type[GemmaTuneError], what: object, advice: str = "") -> Iterator[None]:
    """Turns an OSError into an error that says what can't be written, why, and what to do.

    Args:
        error_type: Type of the error to raise.
        what: Path or thing that is written; the message begins with it.
        advice: Sentences to add to the message.
    """
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        raise error_type(f"{what} can't be written: {reason}.{advice and ' '}{advice}") from error


def write_checksums(folder: Path, leave_out: Sequence[str] = ()) -> None:
    """Writes the size and SHA-256 of every file in a folder into its `checksums.json`.

    Args:
        folder: Folder; files in its subfolders count too.
        leave_out: Names of files without a checksum.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (CHECKSUMS, *leave_out))
    entries = {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in files}
    write_json(folder / CHECKSUMS, entries)


def find_damage(folder: Path) -> str:
    """Returns what is wrong with a folder that has checksums, and in which file; an empty string if nothing is."""
    try:
        entries = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, (size, sha256) in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size:,} bytes, but {size:,} were written"
            if _sha256(path) != sha256:
                return f"{path} holds other bytes than were written"
    except FileNotFoundError:
        return f"{folder / CHECKSUMS} is missing"
    except OSError as error:
        return f"{error.filename or folder} can't be read: {error.strerror or error}"
    except (ValueError, TypeError, AttributeError):
        return f"{folder / CHECKSUMS} is not a list of checksums"
    return "" if entries else f"{folder / CHECKSUMS} is empty"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
