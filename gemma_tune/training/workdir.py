"""The folder of a run: what is in it, and whether a command may go on with it."""

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from gemma_tune.config import Config
from gemma_tune.errors import TrainingError
from gemma_tune.settings import flatten

CONFIG_FILE, VERSIONS_FILE = "config.json", "versions.json"
CHECKPOINTS, ADAPTER, MODEL = "checkpoints", "adapter", "model"
# Settings that change nothing of what a run has computed so far.
_MAY_CHANGE = {
    "workdir",
    "training.keep_last",
    "training.log_every_steps",
    "training.num_sample_answers",
    "training.num_scored_answers",
}
_LEFT_BEHIND = ("metrics.jsonl", "samples.json")
_PACKAGES = ("gemma-tune", "keras", "keras-hub", "jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")


def check_workdir(config: Config) -> Path:
    """Returns the workdir's path after checking, without writing anything, that this run may use it.

    Raises:
        TrainingError: It holds something else, or checkpoints of a run with other settings: says which.
    """
    workdir = Path(config.workdir).expanduser()
    if has_checkpoints(workdir):
        _check_same(config, workdir)
    elif workdir.exists() and not (workdir / CONFIG_FILE).exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise TrainingError(f"{workdir} is not empty and holds no run. Choose another --workdir.")
    return workdir


def open_workdir(config: Config) -> Path:
    """Makes the workdir and writes config.json and versions.json. What a run left there that saved nothing is cleared
    away.

    Raises:
        TrainingError: As `check_workdir`; or the folder can't be written.
    """
    workdir = check_workdir(config)
    try:
        if not has_checkpoints(workdir):
            for name in _LEFT_BEHIND:
                (workdir / name).unlink(missing_ok=True)
            shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / CONFIG_FILE, config.to_dict())
        write_json(workdir / VERSIONS_FILE, versions())
    except OSError as error:
        raise TrainingError(f"The workdir {workdir} can't be written: {error}. Choose another --workdir.") from error
    return workdir


def has_checkpoints(workdir: Path) -> bool:
    """Whether anything was saved there to go on from."""
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def versions() -> dict[str, str]:
    """Returns the versions of Python and the packages that a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _check_same(config: Config, workdir: Path) -> None:
    try:
        before = flatten(json.loads((workdir / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{workdir / CONFIG_FILE} can't be read: {error}. Choose another --workdir.") from error
    now = flatten(config.to_dict())
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in _MAY_CHANGE and not key.startswith("generation.")
    ]
    if changed:
        raise TrainingError(
            f"{workdir} holds a run with other settings: {'; '.join(changed)}. Give the settings as they were to go on "
            "with it, or choose "
            "another --workdir."
        )
