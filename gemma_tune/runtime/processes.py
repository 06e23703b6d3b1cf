"""Lets several processes, each with devices of its own, train one model together, by `jax.distributed`.

All processes run the same program with the same settings, and take part in the same computations in the same order. The
primary process writes the workdir; the others write to a temporary folder. All of them write checkpoints together.
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
from jax._src import distributed  # The client of its key-value store has no public name.

from gemma_tune.errors import ConfigError, TrainingError

_AUTO = "auto"
_HOW = (
    "Write auto, which asks the cluster (TPU pods, SLURM, Open MPI, Kubernetes), or HOST:PORT,NUM_PROCESSES,INDEX with "
    "the address of process 0, like 10.0.0.1:1234,4,0"
)
_RESTART = "Start all processes again with the same command: the run resumes from its last checkpoint."
_BEAT_SECONDS, _LOST_SECONDS, _LAST_SECONDS = 2, 30, 10
_ALIVE, _LEFT, _FAILED = "gemma_tune/alive", "left", "failed"
_heartbeat: "_Heartbeat | None" = None


def initialize_distributed(text: str) -> None:
    """Makes this process one of several. Call it before anything is computed.

    Args:
        text: `auto`, or `HOST:PORT,NUM_PROCESSES,INDEX`.

    Raises:
        ConfigError: The text has another form, or the other processes can't be found.
    """
    arguments: dict[str, Any] = {}
    if text != _AUTO:
        address, *numbers = text.split(",")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers) or ":" not in address:
            raise ConfigError(f"--distributed={text} can't be read. {_HOW}.")
        num_processes, index = map(int, numbers)
        if index >= num_processes:
            raise ConfigError(
                f"--distributed={text}: INDEX counts from 0, so that of {num_processes} processes it is at most "
                f"{num_processes - 1}."
            )
        arguments = {"coordinator_address": address, "num_processes": num_processes, "process_id": index}
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"--distributed={text}: the other processes can't be found: {first_line} {_HOW}.") from error
    global _heartbeat
    _heartbeat = _Heartbeat()
    _heartbeat.start()


def is_distributed() -> bool:
    """Returns whether the run has more than one process."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Returns whether this process is the primary one, which writes the workdir."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes have reached this place; `name` is the same in all of them."""
    if is_distributed():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def all_reduce_max(value: int) -> int:
    """Returns the largest of the processes' values."""
    if not is_distributed():
        return value
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def all_reduce_and(value: bool) -> bool:
    """Returns whether the value is true in all processes."""
    return not all_reduce_max(int(not value))


@contextlib.contextmanager
def raise_in_all_processes() -> Iterator[None]:
    """Makes an error that one process raises in the block an error of all processes, so that they stay together.

    Raises:
        TrainingError: Another process has failed.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    if not all_reduce_and(problem is None):
        raise problem or TrainingError("Another process of this run has failed. Its own messages say why.")


def fetch_to_host(array: jax.Array) -> np.ndarray:
    """Returns a whole array. If other processes hold parts of it, all of them must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class _Heartbeat(threading.Thread):
    """A thread that tells the other processes that this one is alive, and ends it when another one is lost.

    A collective computation waits forever for a lost process; JAX's own service ends the others after a minute or more,
    with a stack trace.
    """

    def __init__(self) -> None:
        super().__init__(name="heartbeat", daemon=True)
        state = distributed.global_state  # jax.process_index() would initialize JAX's devices.
        self._client: Any = state.client
        self._index, self._num_processes = state.process_id, state.num_processes
        self._is_over = threading.Event()

    def run(self) -> None:
        last = {index: ("", time.monotonic()) for index in range(self._num_processes or 1)}
        beat = 0
        while not self._is_over.wait(_BEAT_SECONDS):
            beat += 1
            try:
                self.send(str(beat))
                states = self.states()
            except jax.errors.JaxRuntimeError:
                if not self._is_over.is_set():
                    _stop("Process 0 is gone")
                return
            for index, (before, when) in last.items():
                value, now = states.get(index, ""), time.monotonic()
                if value == _FAILED:
                    _stop(f"Process {index} has failed (its own messages say why)")
                elif value not in (before, _LEFT):
                    last[index] = (value, now)
                elif value != _LEFT and now - when > _LOST_SECONDS:
                    _stop(f"Process {index} is gone: it has sent no heartbeat for {_LOST_SECONDS} seconds")

    def send(self, state: str) -> None:
        self._client.key_value_set(f"{_ALIVE}/{self._index}", state, True)

    def states(self) -> dict[int, str]:
        """Returns the last state that each process has sent, by its index."""
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(_ALIVE)}

    def end(self, state: str) -> None:
        """Sends this process's last state, and stops watching the others."""
        self._is_over.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.send(state)

    def wait_for_others(self) -> None:
        """Waits, in process 0, for the others to end: it hosts the service, and JAX ends those that lose it."""
        end = time.monotonic() + _LAST_SECONDS
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while self._index == 0 and time.monotonic() < end:
                if all(self.states().get(index) in (_LEFT, _FAILED) for index in range(1, self._num_processes or 1)):
                    time.sleep(_BEAT_SECONDS / 4)  # They are about to end.
                    return
                time.sleep(_BEAT_SECONDS / 10)


def _stop(why: str) -> None:
    print(f"gemma-tune: {why}. This process stops too. {_RESTART}", file=sys.stderr, flush=True)
    shutdown_distributed(1)


@contextlib.contextmanager
def raise_on_lost_process() -> Iterator[None]:
    """Turns the errors of a computation that has lost another process into a TrainingError that says so."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_distributed():
            raise
        first_line = str(error).strip().splitlines()[0][:200]
        raise TrainingError(f"Another process is gone: {first_line}. This process stops too. {_RESTART}") from error


def shutdown_distributed(code: int) -> None:
    """Ends this process's part in the run. After an error it ends the process at once.

    Others may be waiting for it in a computation, and an orderly exit would wait for them.

    Args:
        code: Exit code. 0 returns.
    """
    if _heartbeat is not None:
        _heartbeat.end(_LEFT if code in (0, 130, 143) else _FAILED)
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            _heartbeat.wait_for_others()
            os._exit(code)
