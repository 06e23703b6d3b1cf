"""The state of a trial between two steps, in the host's memory or in a file, from which it can go on."""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemma_tune.models.sharding.placement import put_sharded
from gemma_tune.runtime.atomic_files import write_atomically
from gemma_tune.runtime.processes import fetch_to_host
from gemma_tune.training.run.checkpoint_content import Progress, state_from_tree, state_to_tree
from gemma_tune.training.state import TrainState

HostArrays = dict[str, np.ndarray]


class TrialState(NamedTuple):
    """A trial between two steps, from which it can go on. All arrays are in the host's memory.

    Attributes:
        arrays: Arrays of the training state by their path in it.
        progress: Progress of the trial.
        best: Trained weights of the best step so far, by variable path.
        metrics: Held-out metrics of that step.
    """

    arrays: HostArrays
    progress: Progress
    best: HostArrays
    metrics: dict[str, float]

    @property
    def step(self) -> int:
        """Returns the number of steps done."""
        return int(self.arrays[".step"])


def save_state(file: Path, state: TrialState) -> None:
    """Writes the state of a trial into a file, atomically.

    Raises:
        OSError: It can't be written.
    """
    tensors: dict[str, Any] = {}
    names: list[tuple[str, str, str]] = []
    for group, arrays in (("arrays", state.arrays), ("best", state.best)):
        for path, array in arrays.items():
            names.append((group, path, array.dtype.name))
            # NumPy's files know no bfloat16.
            tensors[f"tensor_{len(names)}"] = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
    about = json.dumps({"tensors": names, "progress": state.progress._asdict(), "metrics": state.metrics})

    def write(path: Path) -> None:
        with open(path, "wb") as stream:
            np.savez(stream, about=np.array(about), **tensors)

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, write)


def load_state(file: Path) -> TrialState | None:
    """Returns the state of a trial that `save_state` wrote; None if there is no such file, or if it can't be read."""
    arrays: dict[str, HostArrays] = {"arrays": {}, "best": {}}
    try:
        with np.load(file) as content:
            about = json.loads(str(content["about"]))
            for index, (group, path, dtype) in enumerate(about["tensors"], start=1):
                array = content[f"tensor_{index}"]
                arrays[group][path] = array.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else array
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return TrialState(arrays["arrays"], Progress(**about["progress"]), arrays["best"], about["metrics"])


class KeptStates:
    """Keeps the trained weights of a trial's best step in the host's memory, and passes states on.

    Args:
        start: State that the trial began with; None: the beginning.
        metrics: Held-out metrics by step, to which those of each evaluation are added.
        on_checkpoint: Called with states.

    Attributes:
        best: Trained weights of the best step.
        steps: Steps whose states were kept.
    """

    def __init__(
        self,
        start: TrialState | None,
        metrics: Mapping[int, dict[str, float]],
        on_checkpoint: Callable[[TrialState], None] | None,
    ):
        self._metrics, self._on_checkpoint = metrics, on_checkpoint
        self.best: HostArrays = start.best if start else {}
        self.steps: list[int] = []

    def save(self, state: TrainState, progress: Progress, replace: bool = False) -> None:
        """Keeps the weights of a best step, and passes the state on, once for each step."""
        step = int(state.step)
        if progress.best_step == step and step not in self.steps:
            self.best = to_host(state.trainable)
        if self._on_checkpoint and (step not in self.steps or replace):
            metrics = self._metrics.get(progress.best_step, {})
            self._on_checkpoint(TrialState(to_host(state_to_tree(state)), progress, self.best, metrics))
        self.steps.append(step)

    def wait(self) -> bool:
        """Returns whether the last state was kept: always."""
        return True


def to_host(arrays: Mapping[str, jax.Array]) -> HostArrays:
    """Returns copies in the host's memory: the next step takes over the arrays themselves."""
    return {path: np.array(fetch_to_host(array)) for path, array in arrays.items()}


def state_on_device(arrays: HostArrays, like: TrainState) -> TrainState:
    """Returns the training state of these arrays, where the arrays of another one lie."""
    places = state_to_tree(like)
    # Copied: XLA can't reuse memory that NumPy owns.
    put = {path: jnp.array(put_sharded(array, _mesh_place(places[path])), copy=True) for path, array in arrays.items()}
    return state_from_tree(put, like)


def _mesh_place(array: jax.Array) -> Any:
    return array.sharding if isinstance(array.sharding, jax.sharding.NamedSharding) else None
