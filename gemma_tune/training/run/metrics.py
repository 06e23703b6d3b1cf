"""Writes a run's metrics to `metrics.jsonl` and, if wanted, as TensorBoard events; and reads them."""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.runtime.atomic_files import write_text
from gemma_tune.training.run.trackers.tensorboard import TensorBoardEvents

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
        writes_events: Whether TensorBoard events are written too.
        on_row: Called after each row.

    Attributes:
        rows: All rows of the run so far, whether they could be written or not.
    """

    def __init__(
        self,
        workdir: Path,
        resumed_step: int,
        on_problem: Callable[[str], None] = lambda message: None,
        *,
        writes_events: bool = True,
        on_row: Callable[[], None] = lambda: None,
    ):
        self._path, self._on_problem, self._on_row = workdir / METRICS_FILE, on_problem, on_row
        self.rows = [row for row in read_metrics(workdir) if row["step"] <= resumed_step] if resumed_step else []
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._waiting: list[bytes] = []
        self._events = TensorBoardEvents(workdir / "tensorboard", resumed_step) if writes_events else None

    def write(self, step: int, **values: float) -> None:
        """Writes one row: a step and its named values."""
        row = {"step": step, **values}
        self.rows.append(row)
        had_waiting = bool(self._waiting)
        self._waiting.append((json.dumps(row) + "\n").encode())
        try:
            self._append()
            if self._events:
                self._events.write(step, values)
        except OSError as error:
            if not had_waiting:
                self._on_problem(
                    f"{self._path} can't be written: {error.strerror or error}. Its rows wait in memory; make room."
                )
        self._on_row()

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
        if self._events:
            self._events.close()


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
