"""Folders that appear whole or not at all: written under another name, flushed to the disk, and renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gemma_tune.errors import ModelError
from gemma_tune.runtime.atomic_files import fsync_file, write_checksums
from gemma_tune.runtime.lock import file_lock

PARTIAL = ".partial"  # In the name of a folder that is being written.
_LOCK, _NEW, _OLD = "lock", "new", "old"


def check_output(directory: str | os.PathLike, overwrite: bool = False, marker: str = "") -> Path:
    """Returns the path of a folder to write to, after checking that it doesn't exist, is empty, or may be replaced.

    Args:
        directory: Path of the folder; `~` is expanded.
        overwrite: Whether a folder that holds `marker` may be replaced.
        marker: Name of a file that only such folders have, so that nothing else is ever replaced. Empty: nothing can
            be replaced.

    Raises:
        ModelError: Something is there that can't be replaced.
    """
    path = Path(directory).expanduser()
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return path
    if not overwrite:
        raise ModelError(f"{path} exists already. Name another output, or {'--overwrite' if marker else 'remove'} it.")
    if not (path / marker).is_file():
        raise ModelError(
            f"{path} is no export of gemma_tune: it has no {marker}, so it isn't overwritten. Name another output, or "
            "remove it."
        )
    return path


def check_disk_space(path: Path, num_bytes: int) -> None:
    """Raises ModelError if the disk of a path, which needn't exist, has less free space than is needed."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ModelError(
            f"{path} needs about {num_bytes / 1e9:,.2f} GB, and the disk has {free / 1e9:,.2f} GB left. Make room, or "
            "name an output on another disk."
        )


@contextlib.contextmanager
def atomic_folder(
    path: Path, *, replace: bool = False, exclusive: bool = True, checksums: bool = False, mode: int = 0o777
) -> Iterator[Path]:
    """Yields a new folder to write to, which gets the name `path` at the end, when all of it is on the disk.

    If the block raises, or the process is killed, no folder of that name appears, and one that was there stays. A
    killed process leaves a folder with `.partial` in its name beside `path`; the next exclusive writer removes it.

    Args:
        path: Final path. Missing parent folders are made.
        replace: Whether a folder of that name is replaced. False: it must not exist by then, or be empty.
        exclusive: Whether a second process that writes the same path is refused. False: each writes a folder of its
            own, and the first to be done gives it its name.
        checksums: Whether `checksums.json` is added, by which `find_damage` recognizes damage later.
        mode: Permissions of the folder, less the process's umask.

    Raises:
        OSError: The folder can't be written, or (BlockingIOError) another process is writing it.
    """
    partial = _make_partial(path, exclusive)
    with file_lock(partial / _LOCK):
        try:
            _restore(partial, path)
            new = partial / _NEW
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(mode)
            yield new
            if checksums:
                write_checksums(new)
            _fsync_folder(new)
            if replace and path.exists():
                os.replace(path, partial / _OLD)
            os.replace(new, path)
            _fsync_entries(path.absolute().parent)
        finally:
            _restore(partial, path)
            shutil.rmtree(partial, ignore_errors=True)


def _make_partial(path: Path, exclusive: bool) -> Path:
    if exclusive:
        partial = path.with_name(path.name + PARTIAL)
        partial.mkdir(parents=True, exist_ok=True)
        return partial
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{path.name}{PARTIAL}-", dir=path.parent))


def _restore(partial: Path, path: Path) -> None:
    """Puts back the old folder if the new one didn't take its place, now or in a process that was killed."""
    old = partial / _OLD
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _fsync_folder(folder: Path) -> None:
    for directory, _, names in os.walk(folder):
        for name in names:
            fsync_file(Path(directory) / name)
        _fsync_entries(Path(directory))


def _fsync_entries(directory: Path) -> None:
    """Waits until the names in a folder are on the disk, where the operating system can open folders."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
