"""Files that a reader sees whole or not at all, and checksums that say whether they still are."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under another name, waits until it is on the disk, and gives it its name.

    Args:
        path: Its name. What was there before is replaced.
        write: Given the other name.

    Raises:
        OSError: It can't be written; what was there before is untouched.
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
    """Writes a text file whole."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fsync_file(path: Path) -> None:
    """Waits until a file is on the disk: after a power cut it could have its size, but zeros in it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_checksums(folder: Path, leave_out: Sequence[str] = ()) -> None:
    """Writes the size and SHA-256 of every file in a folder, but for some names, into its `checksums.json`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (CHECKSUMS, *leave_out))
    entries = {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in files}
    write_json(folder / CHECKSUMS, entries)


def find_damage(folder: Path) -> str:
    """Returns what is wrong with a sealed folder, and in which file; '' if every byte is as it was."""
    try:
        entries = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, (size, sha256) in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size:,} bytes, and had {size:,}"
            if _sha256(path) != sha256:
                return f"{path} holds other bytes than were written"
    except FileNotFoundError:
        return f"{folder / CHECKSUMS} is missing"
    except OSError as error:
        return f"{error.filename or folder} can't be read: {error.strerror or error}"
    except (ValueError, TypeError, AttributeError):
        return f"{folder / CHECKSUMS} is no list of checksums"
    return "" if entries else f"{folder / CHECKSUMS} is empty"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
