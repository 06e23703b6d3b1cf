"""What a checkpoint holds besides settings and versions: the training state, and the progress of the run."""

from typing import Any, NamedTuple

import jax

from gemma_tune.training.state import TrainState


class Progress(NamedTuple):
    """What a run knows besides its state. The position in the data follows from the step.

    Attributes:
        best_value: Best held-out value so far of the metric that `training.best_by` names; None if there is none yet.
        best_step: Step of the best value; -1 if there is none yet.
        num_bad_evals: Number of evaluations since then.
        pending_evaluation: Whether the run was stopped in this step's evaluation.
    """

    best_value: float | None = None
    best_step: int = -1
    num_bad_evals: int = 0
    pending_evaluation: bool = False


def state_to_tree(state: TrainState) -> dict[str, Any]:
    """Returns the state's arrays by their path in the state, since Orbax doesn't keep NamedTuples.

    The hyperparameters are not among them: they follow from the run's settings.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state._replace(hyperparameters=None))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def state_from_tree(tree: dict[str, Any], like: TrainState) -> TrainState:
    """Returns the state with the structure and the hyperparameters of `like` from its arrays by path."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like._replace(hyperparameters=None))
    state = jax.tree_util.tree_unflatten(structure, [tree[jax.tree_util.keystr(path)] for path, _ in paths])
    return state._replace(hyperparameters=like.hyperparameters)


def progress_from_json(values: dict[str, Any]) -> Progress:
    """Returns the progress whose fields are in a checkpoint. Earlier versions knew only the loss as what is best."""
    renamed = {"best_loss": "best_value"}
    return Progress(**{renamed.get(name, name): value for name, value in values.items()})
