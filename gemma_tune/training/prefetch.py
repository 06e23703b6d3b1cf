"""Prepares the next batches in a thread while the steps run, so that a step needn't wait for its input."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

DEPTH = 2  # Batches: one that is ready, one that is being made. More would only fill the device's memory.


class Batches(Protocol):
    """A sequence of batches by step, counted from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int, /) -> Any: ...


class _Failure(NamedTuple):
    error: BaseException


def to_device(batch: Any) -> Any:
    """Puts a batch on the device, unless it is on devices already."""
    return batch if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch)) else jax.device_put(batch)


class Prefetch:
    """The batches of a run in the order of its steps, made and put on the device ahead of time.

    Use as a context manager; on leaving it the thread ends, however the loop ended.

    Args:
        batches: Batches by step.
        first_step: Step of the first batch.
        put: Function that puts a batch where the step reads it.

    Attributes:
        wait_seconds: Duration of the last `next`.
    """

    def __init__(self, batches: Batches, first_step: int, put: Callable[[Any], Any] = to_device):
        self._batches, self._first_step, self._put = batches, first_step, put
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = threading.Semaphore(DEPTH)
        self._is_over = False
        # A daemon: if the process has to end while a batch is being made, it does.
        self._thread = threading.Thread(target=self._make, name="prefetch", daemon=True)
        self.wait_seconds = 0.0

    def __enter__(self) -> "Prefetch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over = True
        self._room.release()  # It may be waiting for room.
        self._thread.join()

    def next(self) -> Any:
        """Returns the next batch, or raises the error that making it raised."""
        start = time.perf_counter()
        batch = self._ready.get()
        self.wait_seconds = time.perf_counter() - start
        if isinstance(batch, _Failure):
            raise batch.error
        self._room.release()
        return batch

    def _make(self) -> None:
        try:
            for step in range(self._first_step, len(self._batches)):
                self._room.acquire()
                if self._is_over:
                    return
                self._ready.put(self._put(self._batches[step]))
            raise IndexError(f"The run has {len(self._batches)} steps; a batch beyond the last one was requested.")
        except BaseException as error:  # Whatever it is, the loop must not wait for a batch that never comes.
            self._ready.put(_Failure(error))
