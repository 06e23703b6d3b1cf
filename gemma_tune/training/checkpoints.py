"""Checkpoints with Orbax: the last ones and the best one, each with where in the run it was taken."""

import contextlib
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gemma_tune.errors import TrainingError
from gemma_tune.training.step import TrainState

_BEST = "heldout_loss"


class Progress(NamedTuple):
    """What a run knows besides its state. The place in the data follows from the step.

    best_loss: lowest held-out loss so far (inf: none yet); best_step: where; num_bad_evals: evaluations since then.
    """

    best_loss: float = math.inf
    best_step: int = -1
    num_bad_evals: int = 0


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: Where they are.
        keep_last: How many of the newest stay, besides the best one.
    """

    def __init__(self, directory: Path, keep_last: int):
        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every step of every save.
        directory.mkdir(parents=True, exist_ok=True)
        keep = checkpoint_managers.AnyPreservationPolicy([
            checkpoint_managers.LatestN(keep_last),
            checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[_BEST], reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
        ])  # fmt: skip
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            item_names=("state", "progress"),
            options=ocp.CheckpointManagerOptions(preservation_policy=keep, enable_async_checkpointing=False),
        )

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: Progress, heldout_loss: float | None = None) -> None:
        """Writes a checkpoint of this step, if there is none yet. It has its name only once it is whole.

        Raises:
            TrainingError: It can't be written; earlier ones are untouched.
        """
        step = int(state.step)
        if step in self.steps:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_to_tree(state)), progress=ocp.args.JsonSave(_to_json(progress))
        )
        try:
            self._manager.save(step, args=items, metrics=None if heldout_loss is None else {_BEST: heldout_loss})
        except OSError as error:
            raise TrainingError(
                f"The checkpoint of step {step} can't be written to {self.directory}: {error}. Good checkpoints: "
                f"{self.steps or 'none'}."
            ) from error

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, Progress]:
        """Reads a checkpoint, the newest by default.

        Args:
            like: A state of the same structure, shapes and dtypes.
            step: Which; one of `steps`.

        Raises:
            TrainingError: It can't be read, or is of another model or optimizer.
        """
        step = self.steps[-1] if step is None else step
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _to_tree(like))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax, TensorStore and JSON each have their own kinds.
            raise TrainingError(
                f"The checkpoint of step {step} in {self.directory} can't be read: {str(error).splitlines()[0]} Delete "
                "its folder to go on "
                "from the one before, or choose another --workdir."
            ) from error
        return _from_tree(restored["state"], like), _from_json(restored["progress"])

    def close(self) -> None:
        """Waits for what is under way."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        with contextlib.suppress(Exception):
            self.close()


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
