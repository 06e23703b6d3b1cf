"""A folder that a reader sees whole or not at all: written under another name, waited for, and renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from gemma_tune.errors import ModelError
from gemma_tune.runtime.atomic_files import fsync_file

MARK = "export.json"  # Says that a folder was written here, so that --overwrite never removes anything else.
_LOCK, _NEW, _OLD = "lock", "new", "old"


def check_output(directory: str | os.PathLike, overwrite: bool) -> Path:
    """Returns the folder that an export may be written to.

    Raises:
        ModelError: There is something already, that isn't to be overwritten or is no export.
    """
    path = Path(directory).expanduser()
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return path
    if not overwrite:
        raise ModelError(f"{path} exists already. Name another output, or --overwrite it.")
    if not (path / MARK).is_file():
        raise ModelError(
            f"{path} is no export of gemma_tune: it has no {MARK}, so it isn't overwritten. Name another output, or "
            "remove it."
        )
    return path


def check_room(path: Path, num_bytes: int) -> None:
    """Raises ModelError if the disk of a path that needn't exist has less room than is needed."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ModelError(
            f"{path} needs about {num_bytes / 1e9:,.2f} GB, and the disk has {free / 1e9:,.2f} GB left. Make room, or "
            "name an output on another disk."
        )


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to write to, which gets its name at the end of the block, once all of it is on the disk.

    What had the name before stays until then. A process that is killed leaves `PATH.partial`, which the next one to
    write there clears away.

    Args:
        path: As `check_output` returned it.

    Raises:
        ModelError: It can't be written, or another process is writing there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _held(partial, path):
            _clear(partial, path)
            new = partial / _NEW
            new.mkdir()
            yield new
            _folder_to_disk(new)
            if path.exists():
                os.replace(path, partial / _OLD)
            os.replace(new, path)
            _entries_to_disk(path.absolute().parent)
    except OSError as error:
        reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        raise ModelError(f"{path} can't be written: {reason}.") from error


@contextlib.contextmanager
def _held(partial: Path, path: Path) -> Iterator[None]:
    """Holds the partial folder while it is written, and removes it."""
    lock = filelock.FileLock(partial / _LOCK, timeout=0)
    try:
        with contextlib.suppress(NotImplementedError):  # Where a file system knows no locks, nothing is held.
            lock.acquire()
    except filelock.Timeout as error:
        raise ModelError(f"Another process is writing {path}. Wait for it, or name another output.") from error
    try:
        yield
    finally:
        if not path.exists() and (partial / _OLD).exists():
            os.replace(partial / _OLD, path)
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()


def _clear(partial: Path, path: Path) -> None:
    """Clears away what a killed process left, and puts back what it was about to replace."""
    old = partial / _OLD
    if old.exists() and not path.exists():
        os.replace(old, path)
    for left in (partial / _NEW, old):
        shutil.rmtree(left, ignore_errors=True)


def _folder_to_disk(folder: Path) -> None:
    for directory, _, names in os.walk(folder):
        for name in names:
            fsync_file(Path(directory) / name)
        _entries_to_disk(Path(directory))


def _entries_to_disk(directory: Path) -> None:
    """Waits until the names in a folder are on the disk, where the operating system can open folders."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
