"""Reports a run to Trackio: its local database, or the Space that TRACKIO_SPACE_ID names."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tune.settings import flatten
from gemma_tune.training.run.trackers.tracker import PROJECT, Row, TrackedRun, values_of

_THAT_PRINT = ("trackio", "trackio.run", "trackio.utils", "trackio.deploy")


class TrackioRun:
    """A run in the project that TRACKIO_PROJECT names, or `gemma_tune`.

    Args:
        run: The run.
    """

    def __init__(self, run: TrackedRun):
        import trackio

        for name in _THAT_PRINT:  # To stdout, which is for the command's result.
            module: Any = importlib.import_module(name)
            module.print = lambda *texts, **options: None
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.name,
            config=flatten(run.settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        if run.id:  # By name, Trackio would resume the latest run of this name, which may be another workdir's.
            self._run.id = run.id
        self.id = self._run.id

    def log_rows(self, rows: Sequence[Row]) -> None:
        """Logs metrics by their step."""
        for row in rows:
            self._run.log(values_of(row), step=row["step"])

    def add_files(self, path: Path) -> None:
        """Logs a file or a folder as an artifact of the run."""
        self._run.log_artifact(path, name=f"{self._run.name}-{path.name}", type="report" if path.is_file() else "model")

    def finish(self, has_failed: bool) -> None:
        """Waits until everything is stored. Trackio has no status of a run."""
        del has_failed
        self._run.finish()
