"""Catches Ctrl-C and SIGTERM, so that the training loop can ask between steps whether to save and stop."""

import signal
import threading
from types import FrameType

from gemma_tune.errors import TrainingError
from gemma_tune.runtime.processes import all_reduce_max


class Interrupted(TrainingError):
    """A run was stopped by a signal, and saved.

    Attributes:
        exit_code: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequested(Exception):
    """A signal has come: what is under way is abandoned, so that the loop can save."""


class Interrupts:
    """A context manager that records the first SIGINT or SIGTERM. A second SIGINT raises KeyboardInterrupt at once.

    Attributes:
        received: Number of the signal; 0: none has come.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._previous: dict[int, object] = {}

    def check(self) -> None:
        """Raises StopRequested if a signal has come to any process; for long work that can be started again."""
        self.received = all_reduce_max(self.received)
        if self.received:
            raise StopRequested

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers only there.
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
