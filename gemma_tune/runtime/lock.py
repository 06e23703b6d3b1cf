"""One process to a workdir."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from gemma_tune.errors import TrainingError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Holds a workdir, so that no second process writes there.

    The operating system lets go when the process ends, however it does. Where a file system knows no locks, nothing is
    held.

    Args:
        workdir: Must exist.

    Raises:
        TrainingError: Another process holds it.
    """
    lock = filelock.FileLock(workdir / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise TrainingError(
            f"Another process is training in {workdir}. Wait for it, stop it, or choose another --workdir."
        ) from error
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def check_unlocked(workdir: Path) -> None:
    """Looks whether a workdir is held, and leaves nothing there.

    Raises:
        TrainingError: Another process holds it.
    """
    if (workdir / LOCK_FILE).exists():
        with lock_workdir(workdir):
            pass
