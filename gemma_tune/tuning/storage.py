"""Opens the study of a search: in one journal file of the workdir, or in a database."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from gemma_tune.errors import ConfigError, TrainingError

JOURNAL = "study.jsonl"
_FINGERPRINT, _NAME = "fingerprint", "gemma_tune"
_TAIL_BYTES = 4096


def optuna_module() -> Any:
    """Returns the package Optuna, with its log lines switched off.

    Raises:
        ConfigError: It isn't installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("A search needs the package optuna. Run: pip install 'gemma-tune[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


@contextlib.contextmanager
def study_lock(workdir: Path) -> Iterator[None]:
    """Waits until no other worker takes a trial from the study, and keeps others from it.

    The operating system releases the lock when the process ends, however it does.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(workdir / "study.lock"):
        yield


def open_study(workdir: Path, storage: str, directions: Sequence[str], fingerprint: Mapping[str, Any]) -> Any:
    """Opens a study, or makes it. Call it while `study_lock` is held.

    Args:
        workdir: Folder of the search.
        storage: URL of a database, `sqlite:///…` or `postgresql://…`; empty: a journal file in `workdir`.
        directions: `minimize` or `maximize` for each metric.
        fingerprint: What must be the same for all trials: data, model, metrics, space and fixed settings, by name.

    Raises:
        TrainingError: The study there has another fingerprint; says what differs.
        ConfigError: The database can't be opened.
    """
    optuna = optuna_module()
    try:
        backend = optuna.storages.RDBStorage(storage) if storage else _journal(optuna, workdir / JOURNAL)
    except Exception as error:
        if not storage:
            raise
        raise ConfigError(f"--storage={storage} can't be opened: {error}") from error
    names = [each.study_name for each in backend.get_all_studies()]
    if _NAME in names:
        _check_fingerprint(
            optuna.study.load_study(study_name=_NAME, storage=backend).user_attrs.get(_FINGERPRINT),
            fingerprint,
            storage or str(workdir),
        )
    study = optuna.create_study(storage=backend, study_name=_NAME, directions=list(directions), load_if_exists=True)
    if _FINGERPRINT not in study.user_attrs:
        study.set_user_attr(_FINGERPRINT, dict(fingerprint))
    return study


def _journal(optuna: Any, file: Path) -> Any:
    """Returns storage in a file."""

    class WholeLines:
        """Locks the file for writing, and first removes the rest of a line that was cut off.

        A killed process or a full disk cuts lines off, and nobody could read what others wrote behind it. The lock is
        the operating system's: Optuna's own outlives a killed process by 30 seconds.
        """

        def __init__(self) -> None:
            self._lock = filelock.FileLock(f"{file}.lock")

        def acquire(self) -> bool:
            self._lock.acquire()
            _drop_torn_line(file)
            return True

        def release(self) -> None:
            self._lock.release()

    backend = optuna.storages.journal.JournalFileBackend(str(file), lock_obj=WholeLines())
    return optuna.storages.JournalStorage(backend)


def _drop_torn_line(file: Path) -> None:
    """Removes the end of a file behind its last line break."""
    if not file.exists():
        return
    with open(file, "rb+") as journal:
        size = position = journal.seek(0, os.SEEK_END)
        tail = b""
        while position and b"\n" not in tail:
            position = max(0, position - _TAIL_BYTES)
            journal.seek(position)
            tail = journal.read(_TAIL_BYTES)
        end = position + tail.rfind(b"\n") + 1
        if end < size:
            journal.truncate(end)


def _check_fingerprint(found: Mapping[str, Any] | None, wanted: Mapping[str, Any], where: str) -> None:
    if found is None:  # Its maker was killed before it wrote one; it has no trial yet.
        return
    differing = [
        f"{name} was {found.get(name)!r:.120} and is now {wanted.get(name)!r:.120}"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise TrainingError(
            f"{where} holds a search of something else: {'; '.join(differing)}. Its trials can't be compared with new "
            "ones. Use the same settings, or another --workdir (or --storage)."
        )
