"""Checkpoints with Orbax: the last ones and the best one, each with where in the run it was taken.

A checkpoint is written beside the steps, into a folder with another name. When all of it is there, `checksums.json` is
added, and the folder gets its name. So what is called by a step's number was whole once; whether it still is, is looked
up when a run opens its checkpoints, and what is damaged is put aside.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.checkpointers import async_checkpointer as orbax_async
from orbax.checkpoint._src.futures import future as orbax_future
from orbax.checkpoint._src.futures import signaling_client as orbax_signaling

from gemma_tune.errors import TrainingError
from gemma_tune.runtime.atomic_files import find_damage, write_checksums
from gemma_tune.runtime.processes import barrier, is_distributed, is_primary, raise_in_all_processes
from gemma_tune.training.state import TrainState

_TIMES = "_CHECKPOINT_METADATA"  # When it was begun and finished: written until the end, and not needed.
_BYTES_BESIDES = 100_000  # Of a checkpoint without its arrays, about.
_PARTIAL, _DAMAGED, _REMOVED = ".orbax-checkpoint-tmp", ".damaged", ".removed"


class Progress(NamedTuple):
    """What a run knows besides its state. The place in the data follows from the step.

    best_loss: lowest held-out loss so far (inf: none yet); best_step: where; num_bad_evals: evaluations since then;
    pending_evaluation: the run was stopped in this step's evaluation.
    """

    best_loss: float = math.inf
    best_step: int = -1
    num_bad_evals: int = 0
    pending_evaluation: bool = False


class Checkpoints:
    """The checkpoints of one run. Use as a context manager, which waits for the last one.

    Args:
        directory: Where they are.
        keep_last: How many of the newest stay, besides the best one.
        about: Plain values that each checkpoint is to hold besides: settings and versions. `read_about` finds them.
        on_problem: Called with a message: a checkpoint was damaged and put aside, or one can't be written. Neither ends
            the run.
    """

    def __init__(
        self,
        directory: Path,
        keep_last: int,
        about: dict[str, Any] | None = None,
        on_problem: Callable[[str], None] = lambda message: None,
    ):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every step; errors come here.
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self._keep_last, self._on_problem = directory.absolute(), keep_last, on_problem
        self._about = about or {}
        self._best_step = -1
        self._pending: int | None = None
        self._failed_step: int | None = None
        _wait_by_a_clock_that_never_jumps()
        self._writer = self._open_writer()
        if is_primary():
            self._clear_up()
        barrier("checkpoints are opened")

    @property
    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, oldest first."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def save(self, state: TrainState, progress: Progress, replace: bool = False) -> None:
        """Begins to write a checkpoint of this step, if there is none yet, and waits for no disk but the one before.

        Args:
            state: Copied before this returns, so that the next step may have its buffers.
            progress: Of the run.
            replace: Writes it anew if there is one.
        """
        step = int(state.step)
        self.wait()
        if (step in self.steps and not replace) or step == self._failed_step:
            return
        self._best_step = progress.best_step
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_to_tree(state)),
            progress=ocp.args.JsonSave(_to_json(progress)),
            about=ocp.args.JsonSave(self._about),
        )
        self._pending, self._failed_step = step, None
        with self._reported(), raise_in_all_processes():
            self._check_room(items)
            if replace and is_primary():
                _remove(self.directory / str(step))
        if self._pending is None:
            return
        with self._reported():
            self._writer.save(self.directory / str(step), args=items)

    def wait(self) -> bool:
        """Waits until what was begun last is on the disk, and removes what need not stay.

        Returns:
            Whether it could be written.
        """
        if self._pending is not None:
            with self._reported(), raise_in_all_processes():
                self._writer.wait_until_finished()
            if self._pending is not None:
                self._pending = None
                if is_primary():
                    self._remove_old()
                barrier("old checkpoints are removed")
        return self._failed_step is None

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, Progress]:
        """Reads a checkpoint, the newest by default.

        Args:
            like: A state of the same structure, shapes and dtypes.
            step: Which; one of `steps`.

        Raises:
            TrainingError: It can't be read, or is of another model or optimizer.
        """
        self.wait()
        step = self.steps[-1] if step is None else step
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _to_tree(like))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore())
        try:
            restored = self._writer.restore(self.directory / str(step), args=items)
        except Exception as error:  # Orbax, TensorStore and JSON each have their own kinds.
            raise TrainingError(
                f"The checkpoint of step {step} in {self.directory} can't be read: {str(error).splitlines()[0]} Was it "
                "made by another version of this program? Choose another --workdir."
            ) from error
        state, progress = _from_tree(restored["state"], like), _from_json(restored["progress"])
        if progress.best_step not in (-1, 0, step, *self.steps):
            self._on_problem(
                f"The best checkpoint, of step {progress.best_step}, is lost. The best from here on counts."
            )
            progress = progress._replace(best_loss=math.inf, best_step=-1)
        self._best_step = progress.best_step
        return state, progress

    def close(self) -> None:
        """Waits for what is under way."""
        self.wait()
        self._writer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is not None and is_distributed():
            return  # Others may be gone, and would be waited for.
        with contextlib.suppress(Exception):
            self.close()

    def _check_room(self, items: Any) -> None:
        """Raises OSError when the disk is too small, before anything is written: a failure in the middle costs more."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items.state.item)) + _BYTES_BESIDES
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(f"it needs {needed / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} left. Make room there.")

    def _open_writer(self) -> ocp.AsyncCheckpointer:
        handler = ocp.CompositeCheckpointHandler("state", "progress", "about")
        options = ocp.AsyncOptions(post_finalization_callback=self._seal)
        return ocp.AsyncCheckpointer(handler, async_options=options)

    def _seal(self) -> None:
        """Called when all files are there, before their folder gets its name."""
        if jax.process_index() == 0:
            for folder in self.directory.glob(f"{self._pending}{_PARTIAL}*"):
                write_checksums(folder, [_TIMES])

    @contextlib.contextmanager
    def _reported(self) -> Any:
        """Turns whatever goes wrong while writing into a message, and makes the next save possible."""
        try:
            yield
        except Exception as error:  # TensorStore's for a full disk is a ValueError.
            step = self._failed_step = self._pending
            self._pending = None
            _ignore_late_callbacks()
            with contextlib.suppress(Exception):
                self._writer.close()
            self._writer = self._open_writer()
            for folder in self.directory.glob(f"*{_PARTIAL}*") if is_primary() else ():
                shutil.rmtree(folder, ignore_errors=True)
            good = ", ".join(map(str, self.steps)) or "none"
            self._on_problem(
                f"The checkpoint of step {step} can't be written to {self.directory}: {_reason(error)} Training goes "
                f"on; the next checkpoint is tried when it is due. Good checkpoints: {good}."
            )

    def _remove_old(self) -> None:
        steps = self.steps
        for step in steps[: -self._keep_last]:
            if step != self._best_step:
                _remove(self.directory / str(step))

    def _clear_up(self) -> None:
        """Removes what a killed run left half done, and puts damaged checkpoints aside."""
        for path in list(self.directory.iterdir()):
            if _PARTIAL in path.name or path.name.endswith(_REMOVED):
                shutil.rmtree(path, ignore_errors=True)
        for step in self.steps:
            folder = self.directory / str(step)
            if problem := find_damage(folder):
                aside = folder.with_name(folder.name + _DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)
                self._on_problem(
                    f"The checkpoint of step {step} is damaged: {problem}. It is not used, and now called {aside.name}."
                )


def read_about(directory: Path) -> dict[str, Any] | None:
    """Returns what the newest checkpoint that can be read says of its run; None where there is none."""
    if directory.is_dir():
        for step in sorted((int(path.name) for path in directory.iterdir() if path.name.isdigit()), reverse=True):
            with contextlib.suppress(OSError, ValueError):
                about = json.loads((directory / str(step) / "about" / "metadata").read_text(encoding="utf-8"))
                if isinstance(about, dict):
                    return about
    return None


def _remove(folder: Path) -> None:
    """Removes a checkpoint; killed at any moment, it leaves none that is half there."""
    removed = folder.with_name(folder.name + _REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def _wait_by_a_clock_that_never_jumps() -> None:
    """Orbax waits by the time of day. When that is set right, or a laptop wakes up, a save would count as hanging."""
    for module in (orbax_future, orbax_signaling, orbax_async):
        module.time = types.SimpleNamespace(**{**vars(time), "time": time.monotonic})


def _ignore_late_callbacks() -> None:
    """TensorStore calls back into the event loop of a save that has failed, which is closed; that is no news."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "No space left" in text or "RESOURCE_EXHAUSTED" in text:
        return "the disk is full. Make room there."
    return text[:300] + ("" if text.endswith(".") else ".")


def _to_tree(state: TrainState) -> dict[str, Any]:
    """Names every array by its place, since Orbax doesn't keep NamedTuples."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _from_tree(tree: dict[str, Any], like: TrainState) -> TrainState:
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(structure, [tree[jax.tree_util.keystr(path)] for path, _ in paths])


def _to_json(progress: Progress) -> dict[str, Any]:
    values = progress._asdict()
    values["best_loss"] = None if np.isinf(progress.best_loss) else progress.best_loss
    return values


def _from_json(values: dict[str, Any]) -> Progress:
    best = values.pop("best_loss")
    return Progress(best_loss=math.inf if best is None else best, **values)
