"""Reports a run to MLflow: its server, or its local database."""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from gemma_tune.settings import flatten
from gemma_tune.training.run.trackers.tracker import PROJECT, Row, TrackedRun, values_of

_PARAMS_AT_ONCE, _METRICS_AT_ONCE = 100, 1000  # MLflow's limits of one request.
_MAX_PARAM_LENGTH = 6000


class MlflowRun:
    """A run in MLflow's store: that of MLFLOW_TRACKING_URI, or MLflow's default, a database in the current folder.

    Args:
        run: The run. Its experiment is that of MLFLOW_EXPERIMENT_NAME, or `gemma_tune`.
    """

    def __init__(self, run: TrackedRun):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # Nothing is sent that nobody asked for.
        import mlflow
        from mlflow import entities

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # It reports each table that it creates.
        self._entities, self._client = entities, mlflow.MlflowClient()
        if run.id:
            self.id = run.id
            self._client.update_run(run.id, status="RUNNING")
            return
        self.id = self._client.create_run(self._experiment_id(), run_name=run.name).info.run_id
        params = [entities.Param(path, str(value)[:_MAX_PARAM_LENGTH]) for path, value in flatten(run.settings).items()]
        for part in _batches(params, _PARAMS_AT_ONCE):
            self._client.log_batch(self.id, params=part)

    def _experiment_id(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)

    def log_rows(self, rows: Sequence[Row]) -> None:
        """Logs metrics by their step."""
        now = int(time.time() * 1000)
        metric = self._entities.Metric
        metrics = [metric(name, value, now, row["step"]) for row in rows for name, value in values_of(row).items()]
        for part in _batches(metrics, _METRICS_AT_ONCE):
            self._client.log_batch(self.id, metrics=part)

    def add_files(self, path: Path) -> None:
        """Logs a file, or a folder under its name, as artifact."""
        self._client.log_artifact(self.id, str(path))

    def finish(self, has_failed: bool) -> None:
        """Sets the run's status."""
        self._client.set_terminated(self.id, "FAILED" if has_failed else "FINISHED")


def _batches(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]
