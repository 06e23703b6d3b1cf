"""Runs a search in several processes of this machine, which share its study."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.errors import TrainingError
from gemma_tune.tuning.results.live_table import LiveTable
from gemma_tune.tuning.search import Search
from gemma_tune.tuning.study import is_spent

IS_WORKER = "GEMMA_TUNE_SEARCH_WORKER"  # Environment variable of a worker process: its number.
_MEMORY_SHARE, _GPU_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION", 0.9
_LOGS = "workers"
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_END = 60.0
_LAST_LINES = 5


def run_workers(search: Search, arguments: Sequence[str]) -> Any:
    """Starts the workers, shows their trials until all have ended, and returns the Optuna study.

    Args:
        search: What is searched, and by how many workers.
        arguments: Arguments of the command, without the program's name; each worker is started with them.

    Raises:
        TrainingError: All workers have ended before the budget was spent; says what the last one printed.
    """
    study = search.open()
    (search.workdir / _LOGS).mkdir(parents=True, exist_ok=True)
    with _started(search, arguments) as workers, LiveTable(search, study) as table:
        while any(worker.poll() is None for worker in workers):
            table.update()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    if not is_spent(search, study):
        number = next((index for index, worker in enumerate(workers) if worker.returncode), 0)
        log = _log_file(search, number)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LAST_LINES:]
        code = workers[number].returncode
        raise TrainingError(
            f"The search isn't over, but its workers are. Worker {number} ended with exit code {code}; {log} ends "
            f"with:\n" + "\n".join(lines)
        )
    return study


@contextlib.contextmanager
def _started(search: Search, arguments: Sequence[str]) -> Iterator[list[subprocess.Popen]]:
    """Yields running workers, and ends them if this process is stopped."""
    workers: list[subprocess.Popen] = []
    try:
        for number in range(search.settings.num_workers):
            with open(_log_file(search, number), "wb") as log:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "gemma_tune", *arguments],
                        stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                        env=os.environ | _device_variables(number, search.settings.num_workers)
                        | {IS_WORKER: str(number)},
                    )
                )  # fmt: skip
        yield workers
    finally:
        _end(workers)


def _end(workers: Sequence[subprocess.Popen]) -> None:
    """Asks workers that run to stop after their step, and waits for them."""
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _SECONDS_TO_END
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _device_variables(number: int, num_workers: int) -> dict[str, str]:
    """Returns environment variables that give a worker its part of the GPUs: whole ones, or a share of the memory."""
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(gpus) >= num_workers:
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[number::num_workers])}
    return {_MEMORY_SHARE: os.environ.get(_MEMORY_SHARE, f"{_GPU_SHARE / num_workers:.3f}")}


def _log_file(search: Search, number: int) -> Path:
    return search.workdir / _LOGS / f"worker_{number}.log"
