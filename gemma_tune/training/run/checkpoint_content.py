"""What a checkpoint holds besides settings and versions: the training state, and the progress of the run."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from gemma_tune.training.state import TrainState


class Progress(NamedTuple):
    """What a run knows besides its state. The position in the data follows from the step.

    Attributes:
        best_loss: Lowest held-out loss so far; inf if there is none yet.
        best_step: Step of the lowest held-out loss; -1 if there is none yet.
        num_bad_evals: Number of evaluations since then.
        pending_evaluation: Whether the run was stopped in this step's evaluation.
    """

    best_loss: float = math.inf
    best_step: int = -1
    num_bad_evals: int = 0
    pending_evaluation: bool = False


def state_to_tree(state: TrainState) -> dict[str, Any]:
    """Returns the state's arrays by their path in the state, since Orbax doesn't keep NamedTuples."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def state_from_tree(tree: dict[str, Any], like: TrainState) -> TrainState:
    """Returns the state with the structure of `like` from its arrays by path."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(structure, [tree[jax.tree_util.keystr(path)] for path, _ in paths])


def progress_to_json(progress: Progress) -> dict[str, Any]:
    """Returns plain values for a JSON file, which knows no infinity."""
    values = progress._asdict()
    values["best_loss"] = None if np.isinf(progress.best_loss) else progress.best_loss
    return values


def progress_from_json(values: dict[str, Any]) -> Progress:
    """Returns the progress that `progress_to_json` made these values of."""
    best_loss = values["best_loss"]
    return Progress(**{**values, "best_loss": math.inf if best_loss is None else best_loss})
