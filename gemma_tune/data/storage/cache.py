"""Caches folders of files that take long to make, under a key.

An entry is complete or not there: it is written to another folder, which is renamed. It holds the checksums of its
files; an entry that doesn't match them is deleted and built again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.errors import DataError
from gemma_tune.runtime.atomic_files import disk_errors_as, find_damage, write_text
from gemma_tune.runtime.atomic_folder import PARTIAL, atomic_folder

CONTENTS = "contents.json"
_FORMAT = 4  # Increase it when the files of an entry, or their meaning (what cleaning changes and drops too), change.
_DAYS_KEPT_UNUSED = 30
_DAYS_KEPT_PARTIAL = 1
_ADVICE = "Make room there, or name another folder in the environment variable GEMMA_TUNE_CACHE."


class CacheEntry(NamedTuple):
    """An entry of the cache.

    Attributes:
        folder: Folder of its files.
        values: Plain values that were stored with them.
        owner: Temporary folder where there is no cache. It is deleted when nothing refers to it any more.
    """

    folder: Path
    values: dict[str, Any]
    owner: Any = None


def cache_key(settings: dict[str, Any]) -> str:
    """Returns a key for settings, which are plain values. Any change of a setting changes the key."""
    text = json.dumps({"format": _FORMAT, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:32]


def cached(root: Path | None, key: str, build: Callable[[Path], dict[str, Any]]) -> CacheEntry:
    """Returns the entry of a key. Builds it first if it doesn't exist or is damaged.

    Args:
        root: Folder of the cache. If it is None or can't be written, the entry is built in a temporary folder.
        key: Key from `cache_key`.
        build: Function that writes files to the folder it is given, and returns plain values to store with them.

    Raises:
        DataError: Writing failed, for example because the disk is full. What `build` raises is raised too. Nothing is
            left behind then.
    """
    if root is None or not _is_writable(root):
        owner = tempfile.TemporaryDirectory(prefix="gemma_tune-", ignore_cleanup_errors=True)
        with disk_errors_as(DataError, f"The prepared data in {owner.name}", _ADVICE):
            return CacheEntry(Path(owner.name), build(Path(owner.name)), owner)
    folder = root / key
    values = _read(folder)
    if values is None:
        with disk_errors_as(DataError, f"The prepared data in {root}", _ADVICE):
            values = _build(folder, build)
        _remove_unused(root)
    with contextlib.suppress(OSError):
        os.utime(folder)  # It is in use.
    return CacheEntry(folder, values)


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)  # A damaged entry.
    values: dict[str, Any] = {}
    try:
        with atomic_folder(folder, exclusive=False, checksums=True, mode=0o700) as new:
            values = build(new)
            write_text(new / CONTENTS, json.dumps(values))
    except OSError:
        if _read(folder) is None:  # Otherwise another process has built the same entry in the meantime.
            raise
    return values


def _read(folder: Path) -> dict[str, Any] | None:
    """Returns the values of an entry, or None where it is missing or damaged."""
    try:
        return None if find_damage(folder) else json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_writable(root: Path) -> bool:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(root, os.W_OK)


def _remove_unused(root: Path) -> None:
    for folder in root.iterdir():
        days = _DAYS_KEPT_PARTIAL if PARTIAL in folder.name else _DAYS_KEPT_UNUSED
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > days * 86400:
                shutil.rmtree(folder, ignore_errors=True)
