"""Locks that only one process can hold: of a file, and of a workdir."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import filelock

from gemma_tune.errors import TrainingError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Holds a lock file, which is made if it doesn't exist.

    The operating system releases the lock when the process ends, however it does. On a file system without locks
    nothing is held.

    Raises:
        BlockingIOError: Another process holds it.
    """
    lock = filelock.FileLock(file, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise BlockingIOError(errno.EAGAIN, "another process is writing there", str(file.parent)) from error
    except (OSError, NotImplementedError):
        pass  # A file system without locks.
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Holds a workdir, so that no second process writes there.

    Args:
        workdir: Existing folder.

    Raises:
        TrainingError: Another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(workdir / LOCK_FILE))
        except BlockingIOError as error:
            raise TrainingError(
                f"Another process is training in {workdir}. Wait for it, stop it, or choose another --workdir."
            ) from error
        yield


def check_unlocked(workdir: Path) -> None:
    """Checks that no other process holds a workdir, and leaves nothing there.

    Raises:
        TrainingError: Another process holds it.
    """
    if (workdir / LOCK_FILE).exists():
        with lock_workdir(workdir):
            pass
