"""The folder of a run: what is in it, and whether a command may use or resume it."""

import contextlib
import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.config import Config
from gemma_tune.errors import TrainingError
from gemma_tune.runtime.atomic_files import disk_errors_as, write_json
from gemma_tune.runtime.lock import LOCK_FILE, check_unlocked, lock_workdir
from gemma_tune.runtime.processes import is_primary, raise_in_all_processes
from gemma_tune.training.run.checkpoint_folder import read_about
from gemma_tune.training.run.same_settings import check_same_settings
from gemma_tune.workdir_config import CONFIG_JSON, settings_to_save

VERSIONS_FILE = "versions.json"
CHECKPOINTS, ADAPTER, MODEL, ANSWERS = "checkpoints", "adapter", "model", "answers"
_ADVICE = "Make room, and run the same command again to resume from the last checkpoint. Or choose another --workdir."
_LEFT_BEHIND = ("metrics.jsonl", "samples.json", "bad_steps.jsonl", "trackers.json")
_PACKAGES = ("gemma-tune", "keras", "keras-hub", "jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")


def check_workdir(config: Config) -> Path:
    """Checks, without writing anything, that this run may use the workdir, and returns its path.

    Raises:
        TrainingError: It holds something else, or checkpoints of a run with other settings, which the message names;
            another process is training there; or nothing can be written there.
    """
    workdir = Path(config.workdir).expanduser()
    check_unlocked(workdir)
    if about := read_about(workdir / CHECKPOINTS):
        check_same_settings(config, about, workdir)
    elif workdir.exists() and not workdir.is_dir():
        raise TrainingError(f"{workdir} is a file. Choose another --workdir.")
    elif workdir.exists() and not (workdir / CONFIG_JSON).exists() and not _is_empty(workdir):
        raise TrainingError(f"{workdir} is not empty and holds no run. Choose another --workdir.")
    _check_writable(workdir)
    return workdir


def _check_writable(workdir: Path) -> None:
    """Raises TrainingError if a workdir can't be made or written. Folders that are made to try it are removed."""
    missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        with disk_errors_as(TrainingError, f"The workdir {workdir}", "Choose another --workdir."):
            workdir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=workdir).close()
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _is_empty(workdir: Path) -> bool:
    """Returns whether a workdir holds nothing but what a run leaves that was killed at its very beginning."""
    return {path.name for path in workdir.iterdir()} <= {LOCK_FILE, f"{CONFIG_JSON}.partial", ".DS_Store"}


class OpenWorkdir(NamedTuple):
    """A workdir that this process has locked.

    Attributes:
        path: Path of the workdir; in processes other than the primary one, of a temporary folder.
        about: Settings and versions of the run, for its checkpoints.
        changed: Versions that changed since the newest checkpoint was written, in words.
        checkpoints: Folder of the checkpoints.
    """

    path: Path
    about: dict[str, Any]
    changed: list[str]
    checkpoints: Path


@contextlib.contextmanager
def open_workdir(config: Config, data_key: str) -> Iterator[OpenWorkdir]:
    """Opens the workdir in the primary process.

    The others write to a temporary folder that is removed, except for the checkpoints, which all write together.

    Args:
        config: Settings of the run.
        data_key: Key that changes with the content of the data and with its preparation.

    Raises:
        TrainingError: As `check_workdir`, in all processes; or something can't be written there, now or while it is
            open.
    """
    with contextlib.ExitStack() as stack:
        with raise_in_all_processes():
            if is_primary():
                workdir = stack.enter_context(_open_primary(config, data_key))
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemma_tune-")))
                checkpoints = Path(config.workdir).expanduser() / CHECKPOINTS
                workdir = OpenWorkdir(folder, _about(config, data_key), [], checkpoints)
        yield workdir


@contextlib.contextmanager
def _open_primary(config: Config, data_key: str) -> Iterator[OpenWorkdir]:
    """Makes and locks the workdir, writes config.json and versions.json, and removes what a run without checkpoints
    left there.
    """
    workdir = check_workdir(config)
    with disk_errors_as(TrainingError, f"The workdir {workdir}", _ADVICE):
        workdir.mkdir(parents=True, exist_ok=True)
        with lock_workdir(workdir):
            before = read_about(workdir / CHECKPOINTS)
            if before is None:
                for name in _LEFT_BEHIND:
                    (workdir / name).unlink(missing_ok=True)
                for folder in (ANSWERS, "tensorboard"):
                    shutil.rmtree(workdir / folder, ignore_errors=True)
            else:  # Another process may have begun a run since.
                check_same_settings(config, before, workdir, data_key)
            about = _about(config, data_key, (before or {}).get("config"), workdir)
            write_json(workdir / CONFIG_JSON, about["config"])
            write_json(workdir / VERSIONS_FILE, about["versions"])
            yield OpenWorkdir(workdir, about, _changed(before, about["versions"]), workdir / CHECKPOINTS)


def _about(
    config: Config, data_key: str, saved: dict[str, Any] | None = None, workdir: Path = Path()
) -> dict[str, Any]:
    return {"config": settings_to_save(config, saved, workdir), "versions": {**versions(), "data": data_key}}


def _changed(before: dict[str, Any] | None, now: dict[str, str]) -> list[str]:
    versions = (before or {}).get("versions", now)
    return [
        "the data, or what cleans and splits it" if name == "data" else f"{name} {versions.get(name)} → {value}"
        for name, value in now.items()
        if versions.get(name) != value
    ]


def versions() -> dict[str, str]:
    """Returns the versions of Python and the packages that a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
