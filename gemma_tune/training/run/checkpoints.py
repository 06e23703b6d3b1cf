"""Writes and reads checkpoints with Orbax: the newest ones and the best one, each with the progress of the run.

A checkpoint is written while training goes on, into a folder with another name. When all of it is there,
`checksums.json` is added, and the folder gets its name. Orbax renames it, not `runtime.atomic_folder`: several
processes write one checkpoint together, in the background, and only Orbax knows when the last of them is done.
"""

import contextlib
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gemma_tune.errors import TrainingError
from gemma_tune.runtime.atomic_files import write_checksums
from gemma_tune.runtime.processes import barrier, is_distributed, is_primary, raise_in_all_processes
from gemma_tune.training.run.checkpoint_content import (
    Progress,
    progress_from_json,
    state_from_tree,
    state_to_tree,
)
from gemma_tune.training.run.checkpoint_folder import (
    PARTIAL,
    PlainPath,
    clear_checkpoints,
    remove_checkpoint,
    remove_partial_checkpoints,
    saved_steps,
)
from gemma_tune.training.state import TrainState

_TIMES = "_CHECKPOINT_METADATA"  # When it was begun and finished: written until the end, and not needed.
_OTHER_BYTES = 100_000  # Size of a checkpoint without its arrays, about.
# Orbax measures its timeouts by the time of day. When the clock is set, or a laptop wakes up, an ordinary timeout would
# make every save under way fail, so there is practically none: half of what threads can wait for, in seconds.
_NO_TIMEOUT = min(4_000_000_000, int(threading.TIMEOUT_MAX / 2))


class Checkpoints:
    """The checkpoints of one run. Use as a context manager, which waits for the last one on leaving.

    Args:
        directory: Folder of the checkpoints.
        keep_last: Number of the newest checkpoints that stay, besides the best one.
        about: Plain values that each checkpoint also holds: settings and versions. `read_about` reads them.
        on_problem: Called with a message when a checkpoint was damaged and put aside, or can't be written. Neither ends
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
        self._path_for_orbax = PlainPath(self.directory)
        self._about = about or {}
        self._best_step = -1
        self._pending: int | None = None
        self._failed_step: int | None = None
        self._until_closed = contextlib.ExitStack()
        self._writer = self._open_writer()
        if is_primary():
            clear_checkpoints(self.directory, on_problem)
        barrier("checkpoints are opened")

    @property
    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first."""
        return saved_steps(self.directory)

    def save(self, state: TrainState, progress: Progress, replace: bool = False) -> None:
        """Begins to write a checkpoint of this step unless there is one, after waiting for the one before.

        Args:
            state: State to save. It is copied before this returns, so that the next step may reuse its buffers.
            progress: Progress of the run.
            replace: Whether a checkpoint of this step is written anew.
        """
        step = int(state.step)
        self.wait()
        if (step in self.steps and not replace) or step == self._failed_step:
            return
        self._best_step = progress.best_step
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state_to_tree(state)),
            progress=ocp.args.JsonSave(progress._asdict()),
            about=ocp.args.JsonSave(self._about),
        )
        self._pending, self._failed_step = step, None
        with self._reported(), raise_in_all_processes():
            self._check_room(items)
            if replace and is_primary():
                remove_checkpoint(self.directory, step)
        if self._pending is None:
            return
        with self._reported():
            self._writer.save(self._path_for_orbax.path / str(step), args=items)

    def wait(self) -> bool:
        """Waits until the last checkpoint is on the disk, and removes old ones.

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
            like: State of the same structure, shapes and dtypes.
            step: One of `steps`.

        Raises:
            TrainingError: It can't be read, or is of another model or optimizer.
        """
        self.wait()
        step = self.steps[-1] if step is None else step
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state_to_tree(like))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore())
        try:
            restored = self._writer.restore(self._path_for_orbax.path / str(step), args=items)
        except Exception as error:  # Orbax, TensorStore and JSON each have their own kinds.
            raise TrainingError(
                f"The checkpoint of step {step} in {self.directory} can't be read: {str(error).splitlines()[0]} Was it "
                "written by another version of this program? Choose another --workdir."
            ) from error
        state, progress = state_from_tree(restored["state"], like), progress_from_json(restored["progress"])
        if progress.best_step not in (-1, 0, step, *self.steps):
            self._on_problem(
                f"The best checkpoint, of step {progress.best_step}, is lost. The best one from here on counts."
            )
            progress = progress._replace(best_value=None, best_step=-1)
        self._best_step = progress.best_step
        return state, progress

    def close(self) -> None:
        """Waits for the checkpoint that is being written."""
        with self._until_closed:
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
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items.state.item)) + _OTHER_BYTES
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(
                f"it needs {needed / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB left. Make room there."
            )

    def _open_writer(self) -> ocp.AsyncCheckpointer:
        # Folders are created at once: threads that wait for them have a timeout of their own.
        options = ocp.AsyncOptions(
            timeout_secs=_NO_TIMEOUT, create_directories_asynchronously=False, post_finalization_callback=self._seal
        )
        handler = ocp.CompositeCheckpointHandler(
            "state", "progress", "about", composite_options=ocp.CompositeOptions(async_options=options)
        )
        return ocp.AsyncCheckpointer(handler, async_options=options)

    def _seal(self) -> None:
        """Adds the checksums when all files are there, before their folder gets its name."""
        if is_primary():
            for folder in self.directory.glob(f"{self._pending}{PARTIAL}*"):
                write_checksums(folder, [_TIMES])

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turns whatever goes wrong while writing into a message, and makes the next save possible."""
        try:
            yield
        except Exception as error:  # TensorStore's for a full disk is a ValueError.
            step = self._failed_step = self._pending
            self._pending = None
            self._until_closed.pop_all().close()
            self._until_closed.enter_context(_late_callbacks_ignored())
            with contextlib.suppress(Exception):
                self._writer.close()
            self._writer = self._open_writer()
            if is_primary():
                remove_partial_checkpoints(self.directory)
            good = ", ".join(map(str, self.steps)) or "none"
            self._on_problem(
                f"The checkpoint of step {step} can't be written to {self.directory}: {_reason(error)} Training goes "
                f"on; the next checkpoint is tried when it is due. Good checkpoints: {good}."
            )

    def _remove_old(self) -> None:
        for step in self.steps[: -self._keep_last]:
            if step != self._best_step:
                remove_checkpoint(self.directory, step)


@contextlib.contextmanager
def _late_callbacks_ignored() -> Iterator[None]:
    """A context that suppresses the errors of late callbacks.

    TensorStore calls back into the event loop of a save that has failed. The loop is closed by then, and Python would
    print each of these errors.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "No space left" in text or "RESOURCE_EXHAUSTED" in text:
        return "the disk is full. Make room there."
    return text[:300] + ("" if text.endswith(".") else ".")
