"""Writes a run's metrics to `metrics.jsonl` and as TensorBoard events, and reads them back."""

import json
from pathlib import Path
from typing import Any

from gemma_tune.imports import hidden

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends metrics of a run.

    On resuming from step s, lines of later steps, which a killed run may have left, are taken out first, so that each
    step stands once.
    """

    def __init__(self, workdir: Path, resumed_step: int):
        self._path = workdir / METRICS_FILE
        kept = [row for row in read_metrics(workdir) if row["step"] <= resumed_step] if resumed_step else []
        self._path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)
        with hidden("torch"):  # 1.4 seconds, for plots of networks.
            from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1, flush_secs=20)

    def write(self, step: int, **values: float) -> None:
        """Writes one row: a step and its named values."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._events.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows written so far; a last line that was cut off is left out."""
    path = workdir / METRICS_FILE
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
