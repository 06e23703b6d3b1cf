"""Writes a run's metrics to `metrics.jsonl` and as TensorBoard events, and reads them."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.runtime.atomic_files import write_text
from gemma_tune.runtime.imports import hide_packages

METRICS_FILE, BAD_STEPS_FILE = "metrics.jsonl", "bad_steps.jsonl"


class MetricsWriter:
    """Appends the metrics of a run to its files, and keeps them.

    When a run is resumed at step s, rows of later steps, which a killed run may have left, are removed first, so that
    each step is there once. Rows that can't be written, as when the disk is full, wait in memory and are tried again
    with the next one.

    Args:
        workdir: Folder of the run.
        resumed_step: Step at which the run is resumed; 0 at its beginning.
        on_problem: Called with a message when a row can't be written and the one before could.

    Attributes:
        rows: All rows of the run so far, whether they could be written or not.
    """

    def __init__(self, workdir: Path, resumed_step: int, on_problem: Callable[[str], None] = lambda message: None):
        self._path, self._on_problem = workdir / METRICS_FILE, on_problem
        self.rows = [row for row in read_metrics(workdir) if row["step"] <= resumed_step] if resumed_step else []
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._waiting: list[bytes] = []
        self._events = _Events(workdir / "tensorboard", resumed_step)

    def write(self, step: int, **values: float) -> None:
        """Writes one row: a step and its named values."""
        row = {"step": step, **values}
        self.rows.append(row)
        had_waiting = bool(self._waiting)
        self._waiting.append((json.dumps(row) + "\n").encode())
        try:
            self._append()
            self._events.write(step, values)
        except OSError as error:
            if not had_waiting:
                self._on_problem(
                    f"{self._path} can't be written: {error.strerror or error}. Its rows wait in memory; make room."
                )

    def write_bad_step(self, step: int, what: str, origins: Sequence[str]) -> None:
        """Adds a line to `bad_steps.jsonl`: the step, what is wrong, and where its examples come from."""
        row = {"step": step, "problem": what, "examples": list(origins)}
        with contextlib.suppress(OSError), open(self._path.with_name(BAD_STEPS_FILE), "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _append(self) -> None:
        text = b"".join(self._waiting)
        with open(self._path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(text) != len(text):
                    raise OSError(28, os.strerror(28))  # ENOSPC: there was room for a part.
            except OSError:
                file.truncate(size)  # Half a row would spoil the next one.
                raise
        self._waiting = []

    def close(self) -> None:
        """Tries the waiting rows once more, and closes the files."""
        try:
            if self._waiting:
                self._append()
        except OSError as error:
            self._on_problem(
                f"{len(self._waiting)} rows could not be written to {self._path}: {error.strerror or error}."
            )
        self._events.close()


class _Events:
    """Scalars for TensorBoard, written at once: SummaryWriter's thread dies of a full disk, then its queue blocks."""

    def __init__(self, folder: Path, resumed_step: int):
        with hide_packages("torch"):  # Importing it takes 1.4 seconds, for plots of networks.
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2

        self._scalar, self._event = summary.scalar, event_pb2.Event
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if resumed_step:  # TensorBoard then hides what a killed run wrote of later steps.
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._file.write_event(self._event(step=resumed_step + 1, session_log=log))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._file.write_event(self._event(step=step, wall_time=time.time(), summary=self._scalar(name, value)))
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # metrics.jsonl has the same values.
            self._file.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of `metrics.jsonl`; lines that are damaged or cut off are left out."""
    path = workdir / METRICS_FILE
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows
