"""Several processes that train one model together, each with devices of its own: `jax.distributed`.

All of them run the same program on the same settings, and take part in the same computations in the same order. The
first one writes the workdir; the others write what they would have written to a folder that is thrown away. Checkpoints
all of them write together.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # The service's client, to which there is no public way.

from gemma_tune.errors import ConfigError, TrainingError

_AUTO = "auto"
_HOW = (
    "Write auto, which asks the cluster (TPU pods, SLURM, Open MPI, Kubernetes), or HOST:PORT,NUM_PROCESSES,INDEX with "
    "the address of process 0, like 10.0.0.1:1234,4,0"
)
_AGAIN = "Start all of them again with the same command: the run goes on from its last checkpoint."
_BEAT_SECONDS, _LOST_SECONDS, _LAST_SECONDS = 2, 30, 10
_ALIVE, _LEFT, _FAILED = "gemma_tune/alive", "left", "failed"
_watch: "_Heartbeat | None" = None


def initialize_distributed(text: str) -> None:
    """Makes this process one of several. To be called before anything is computed.

    Args:
        text: `auto`, or `HOST:PORT,NUM_PROCESSES,INDEX`.

    Raises:
        ConfigError: It is written otherwise, or the others can't be found.
    """
    arguments: dict[str, Any] = {}
    if text != _AUTO:
        address, *numbers = text.split(",")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers) or ":" not in address:
            raise ConfigError(f"--distributed={text} can't be read. {_HOW}.")
        num_processes, index = map(int, numbers)
        if index >= num_processes:
            raise ConfigError(f"--distributed={text}: of {num_processes} processes the last is {num_processes - 1}.")
        arguments = {"coordinator_address": address, "num_processes": num_processes, "process_id": index}
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"--distributed={text}: the other processes can't be found: {first_line} {_HOW}.") from error
    global _watch
    _watch = _Heartbeat()
    _watch.start()


def is_distributed() -> bool:
    """Whether others take part."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Waits until all processes are here."""
    if is_distributed():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def all_reduce_max(value: int) -> int:
    """Returns the largest of what the processes have."""
    if not is_distributed():
        return value
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def all_reduce_and(is_so: bool) -> bool:
    """Returns whether all processes say so."""
    return not all_reduce_max(int(not is_so))


@contextlib.contextmanager
def raise_in_all_processes() -> Iterator[None]:
    """Makes what fails in one process fail in all, so that they stay together."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    if not all_reduce_and(problem is None):
        raise problem or TrainingError("Another process of this run has failed; it says why.")


def fetch_to_host(array: jax.Array) -> np.ndarray:
    """Returns all of an array, also where other processes hold parts of it; then all have to ask."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class _Heartbeat(threading.Thread):
    """Tells the others that this process is there, and ends it when one of them is not.

    A collective computation waits for ever for a process that is gone; JAX's own service ends the rest after a minute
    or more, with a stack trace.
    """

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        state = distributed.global_state  # jax.process_index() would start the backend, in this thread.
        self._client: Any = state.client
        self._index, self._num_processes = state.process_id, state.num_processes
        self._is_over = threading.Event()

    def run(self) -> None:
        last = {index: ("", time.monotonic()) for index in range(self._num_processes or 1)}
        beat = 0
        while not self._is_over.wait(_BEAT_SECONDS):
            beat += 1
            try:
                self.say(str(beat))
                said = self.heard()
            except jax.errors.JaxRuntimeError:
                if not self._is_over.is_set():
                    _stop("Process 0 is gone")
                return
            for index, (before, when) in last.items():
                value, now = said.get(index, ""), time.monotonic()
                if value == _FAILED:
                    _stop(f"Process {index} has failed, and says why")
                elif value not in (before, _LEFT):
                    last[index] = (value, now)
                elif value != _LEFT and now - when > _LOST_SECONDS:
                    _stop(f"Process {index} is gone: nothing was heard of it for {_LOST_SECONDS} seconds")

    def say(self, what: str) -> None:
        self._client.key_value_set(f"{_ALIVE}/{self._index}", what, True)

    def heard(self) -> dict[int, str]:
        """Returns what each process said last."""
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(_ALIVE)}

    def end(self, what: str) -> None:
        """Says that this process leaves, and watches no more."""
        self._is_over.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.say(what)

    def wait_for_others(self) -> None:
        """Process 0, through which all speak with each other, leaves last: JAX ends those that lose it."""
        end = time.monotonic() + _LAST_SECONDS
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while self._index == 0 and time.monotonic() < end:
                if all(self.heard().get(index) in (_LEFT, _FAILED) for index in range(1, self._num_processes or 1)):
                    time.sleep(_BEAT_SECONDS / 4)  # They are on their way.
                    return
                time.sleep(_BEAT_SECONDS / 10)


def _stop(why: str) -> None:
    print(f"gemma-tune: {why}. This process stops too. {_AGAIN}", file=sys.stderr, flush=True)
    shutdown_distributed(1)


@contextlib.contextmanager
def raise_on_lost_process() -> Iterator[None]:
    """Turns what a computation raises when another process is gone into an error that says so."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_distributed():
            raise
        first_line = str(error).strip().splitlines()[0][:200]
        raise TrainingError(f"Another process is gone: {first_line}. This process stops too. {_AGAIN}") from error


def shutdown_distributed(code: int) -> None:
    """Ends this process's part. After an error it ends the process: others may wait in a computation for it, and an
    orderly end would wait for them.

    Args:
        code: Exit code; 0 returns.
    """
    if _watch is not None:
        _watch.end(_LEFT if code in (0, 130, 143) else _FAILED)
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            _watch.wait_for_others()
            os._exit(code)
