"""The folder of a run's checkpoints: which steps are in it, what each says of its run, and damaged ones put aside.

What is called by a step's number was complete once. Whether it still is, its checksums say.
"""

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_tune.runtime.atomic_files import find_damage

PARTIAL = ".orbax-checkpoint-tmp"  # What Orbax adds to the name until the checkpoint is complete.
_DAMAGED, _REMOVED = ".damaged", ".removed"


class PlainPath:
    """A path of a folder that Orbax takes literally.

    Orbax finds what its processes wrote by epath's `glob`, which reads `[v1]` in the folder's own path as a pattern. It
    finds nothing, says nothing, and leaves a checkpoint that can't be read. TensorStore takes a backslash for a slash.
    Such a folder is given to them through a link in a temporary folder, which is removed with this object.

    Attributes:
        path: The folder, or the link.
    """

    def __init__(self, folder: Path):
        self.path = folder
        if glob.has_magic(str(folder)) or "\\" in str(folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="gemma_tune-", ignore_cleanup_errors=True)
            self.path = Path(self._temporary.name) / folder.name
            self.path.symlink_to(folder, target_is_directory=True)


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps that have a complete checkpoint, oldest first."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def read_about(directory: Path) -> dict[str, Any] | None:
    """Returns what the newest readable checkpoint says of its run: settings and versions; None if there is none."""
    if directory.is_dir():
        for step in reversed(saved_steps(directory)):
            with contextlib.suppress(OSError, ValueError):
                about = json.loads((directory / str(step) / "about" / "metadata").read_text(encoding="utf-8"))
                if isinstance(about, dict):
                    return about
    return None


def clear_checkpoints(directory: Path, on_problem: Callable[[str], None]) -> None:
    """Removes what a killed run left half done, and gives damaged checkpoints another name.

    Args:
        directory: Folder of the checkpoints.
        on_problem: Called with a message for each damaged checkpoint.
    """
    remove_partial_checkpoints(directory)
    for path in directory.glob(f"*{_REMOVED}"):
        shutil.rmtree(path, ignore_errors=True)
    for step in saved_steps(directory):
        folder = directory / str(step)
        if problem := find_damage(folder):
            aside = folder.with_name(folder.name + _DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            on_problem(
                f"The checkpoint of step {step} is damaged: {problem}. It is not used, and was renamed to {aside.name}."
            )


def remove_partial_checkpoints(directory: Path) -> None:
    """Removes checkpoints that were begun and never finished."""
    for path in directory.glob(f"*{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoint(directory: Path, step: int) -> None:
    """Removes a checkpoint. A process that is killed at any moment leaves none that is half there."""
    folder = directory / str(step)
    removed = folder.with_name(folder.name + _REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)
