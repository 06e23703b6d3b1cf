"""Defines what a tracker of runs is, finds it by name, and checks that it is installed."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gemma_tune.errors import ConfigError

PROJECT = "gemma_tune"  # Project or experiment of all runs, unless the tracker's own variable names another one.
_PACKAGES = {"mlflow": "mlflow", "wandb": "wandb", "trackio": "trackio"}  # By tracker; each has an extra of its name.

Row = Mapping[str, Any]


class TrackedRun(NamedTuple):
    """What a tracker learns of a run at its beginning.

    Attributes:
        name: Name of the run, which is that of its workdir.
        workdir: Path of the workdir.
        settings: All settings, from `Config.to_dict`.
        id: ID of the tracker's run that goes on; '' for a new one.
    """

    name: str
    workdir: Path
    settings: Mapping[str, Any]
    id: str = ""


class Tracker(Protocol):
    """A run that is open in a tracker. All methods are called by one thread, and may fail or take any time.

    Attributes:
        id: ID by which the run can be opened again.
    """

    id: str

    def log_rows(self, rows: Sequence[Row]) -> None:
        """Takes rows of `metrics.jsonl`, in their order."""

    def add_files(self, path: Path) -> None:
        """Takes a file or a folder."""

    def finish(self, has_failed: bool) -> None:
        """Ends the run, and waits until everything is stored."""


def find_trackers(names: Sequence[str]) -> dict[str, Callable[[TrackedRun], Tracker]]:
    """Returns the functions that open runs in trackers, by the tracker's name, without importing its package.

    Args:
        names: Names of trackers, as in `training.report_to`. TensorBoard is left out: `MetricsWriter` writes its files.

    Raises:
        ConfigError: A package is not installed; says which extra to install.
    """
    openers = {"mlflow": _open_mlflow, "wandb": _open_wandb, "trackio": _open_trackio}
    chosen = [name for name in dict.fromkeys(names) if name in openers]
    for name in chosen:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ConfigError(
                f"training.report_to={name} needs the package {_PACKAGES[name]}. Run: pip install 'gemma-tune[{name}]'"
            )
    return {name: openers[name] for name in chosen}


def values_of(row: Row) -> dict[str, float]:
    """Returns the metrics of a row, without its step."""
    return {name: float(value) for name, value in row.items() if name != "step"}


def _open_mlflow(run: TrackedRun) -> Tracker:
    from gemma_tune.training.run.trackers.mlflow_run import MlflowRun

    return MlflowRun(run)


def _open_wandb(run: TrackedRun) -> Tracker:
    from gemma_tune.training.run.trackers.wandb_run import WandbRun

    return WandbRun(run)


def _open_trackio(run: TrackedRun) -> Tracker:
    from gemma_tune.training.run.trackers.trackio_run import TrackioRun

    return TrackioRun(run)
