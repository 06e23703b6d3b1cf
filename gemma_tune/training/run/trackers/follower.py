"""Passes rows of metrics on to trackers, each from a thread of its own, so that none can stop or slow a run.

A row is passed on once. How far each tracker has come is kept in the workdir, so that a resumed run goes on in the same
run of the tracker. A tracker that fails is left out until the run is resumed, and then gets what it missed.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.runtime.atomic_files import write_json
from gemma_tune.training.run.trackers.tracker import Row, TrackedRun, Tracker

TRACKERS_FILE = "trackers.json"
_SECONDS_BETWEEN_ROWS = 1.0  # Rows of a second are passed on together.
_FINISH_SECONDS, _STOP_SECONDS = 60.0, 5.0  # The longest that a call may still take when the run has ended, or failed.

Place = tuple[int, int]
_NOTHING_SENT: Place = (-1, -1)


class Followers:
    """The trackers of a run. Use as a context manager, which waits for them on leaving, though not for long.

    Args:
        openers: Functions that open the run in a tracker, by the tracker's name, from `find_trackers`.
        run: The run.
        on_problem: Called with a message when a tracker fails; from another thread.
    """

    def __init__(
        self,
        openers: Mapping[str, Callable[[TrackedRun], Tracker]],
        run: TrackedRun,
        on_problem: Callable[[str], None],
    ):
        self._openers, self._run, self._on_problem = openers, run, on_problem
        self._followers: list[_Follower] = []
        self._files: list[Path] = []
        self._lock = threading.Lock()
        self._saved = _read_saved(run.workdir)

    def follow(self, rows: Sequence[Row]) -> None:
        """Begins to pass rows on, those that are there and those that will be added to the list."""
        for name, opener in self._openers.items():
            saved = self._saved.get(name, {})
            run = self._run._replace(id=saved.get("id", ""))
            sent = tuple(saved.get("sent", _NOTHING_SENT))
            follower = _Follower(name, opener, run, rows, sent, self._save, self._on_problem)
            self._followers.append(follower)
            follower.start()

    def wake(self) -> None:
        """Says that rows were added."""
        for follower in self._followers:
            follower.has_work.set()

    def add_files(self, paths: Sequence[Path]) -> None:
        """Adds files and folders that the trackers get at the end."""
        self._files += paths

    def __enter__(self) -> "Followers":
        return self

    def __exit__(self, *exception: Any) -> None:
        for follower in self._followers:
            follower.end(self._files, has_failed=exception[0] is not None)
        for follower in self._followers:
            follower.wait()

    def _save(self, name: str, tracker_id: str, sent: Place) -> None:
        """Keeps the ID of a tracker's run, and the place of the last row that it got."""
        with self._lock, contextlib.suppress(OSError):  # Without it, a resumed run is a new one for the tracker.
            self._saved[name] = {"id": tracker_id, "sent": list(sent)}
            write_json(self._run.workdir / TRACKERS_FILE, self._saved)


class _Follower(threading.Thread):
    """The thread of one tracker."""

    def __init__(
        self,
        tracker_name: str,
        opener: Callable[[TrackedRun], Tracker],
        run: TrackedRun,
        rows: Sequence[Row],
        sent: Place,
        save: Callable[[str, str, Place], None],
        on_problem: Callable[[str], None],
    ):
        super().__init__(name=tracker_name, daemon=True)
        self._opener, self._run, self._rows, self._sent = opener, run, rows, sent
        self._save, self._on_problem = save, on_problem
        self._num_read = 0
        self._files: Sequence[Path] = ()
        self._has_failed = False
        self._is_ending = threading.Event()
        self._busy_since = math.inf
        self.has_work = threading.Event()

    def run(self) -> None:
        try:
            tracker = self._call(self._opener, self._run)
            self._save(self.name, tracker.id, self._sent)
            while not self._is_ending.is_set():
                self.has_work.wait()
                self.has_work.clear()
                self._pass_on(tracker)
                self._is_ending.wait(_SECONDS_BETWEEN_ROWS)
            self._pass_on(tracker)
            for path in self._files:
                self._call(tracker.add_files, path)
            self._call(tracker.finish, self._has_failed)
        except Exception as error:  # Each tracker has its own kinds.
            reason = (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
            self._on_problem(
                f"{self.name} gets no more metrics: {reason}. The run goes on; metrics.jsonl has all of them. "
                f"{self.name} gets what it missed when the run is resumed."
            )

    def end(self, files: Sequence[Path], has_failed: bool) -> None:
        """Says that the run has ended, and with which files."""
        self._files, self._has_failed = () if has_failed else files, has_failed
        self._is_ending.set()
        self.has_work.set()

    def wait(self) -> None:
        """Waits until the tracker has everything, unless a call of it takes too long."""
        limit = _STOP_SECONDS if self._has_failed else _FINISH_SECONDS
        while self.is_alive():
            self.join(0.05)
            if time.monotonic() - self._busy_since > limit:
                self._on_problem(
                    f"{self.name} hasn't answered for {limit:g} seconds, and may lack the last metrics. metrics.jsonl "
                    "has all of them."
                )
                return

    def _pass_on(self, tracker: Tracker) -> None:
        """Passes on the rows that the tracker hasn't got."""
        rows = self._rows[self._num_read :]
        self._num_read += len(rows)
        new = [row for row in rows if _place(row) > self._sent]
        if new:
            self._call(tracker.log_rows, new)
            self._sent = _place(new[-1])
            self._save(self.name, tracker.id, self._sent)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of the tracker, and remembers since when."""
        self._busy_since = time.monotonic()
        try:
            return function(*arguments)
        finally:
            self._busy_since = math.inf


def _place(row: Row) -> Place:
    """Returns a row's place among all rows of a run: an evaluation follows the step that it is of."""
    return row["step"], int("heldout_loss" in row)


def _read_saved(workdir: Path) -> dict[str, dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        saved = json.loads((workdir / TRACKERS_FILE).read_text(encoding="utf-8"))
        if isinstance(saved, dict):
            return {name: value for name, value in saved.items() if isinstance(value, dict)}
    return {}
