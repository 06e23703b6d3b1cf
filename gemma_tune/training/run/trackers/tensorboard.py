"""Writes metrics as TensorBoard events."""

import contextlib
import os
import time
from pathlib import Path

from gemma_tune.runtime.imports import hide_packages


class TensorBoardEvents:
    """Scalars for TensorBoard, written at once: SummaryWriter's thread dies of a full disk, then its queue blocks.

    Args:
        folder: Folder of the event files.
        resumed_step: Step at which the run is resumed; 0 at its beginning.
    """

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
        """Writes the values of a step. Raises OSError when the disk is full."""
        for name, value in values.items():
            self._file.write_event(self._event(step=step, wall_time=time.time(), summary=self._scalar(name, value)))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # metrics.jsonl has the same values.
            self._file.close()
