"""Runs of a tiny model in processes that something happens to.

Each run is the command line in a process of its own, forked from a server that has imported everything, so that it
begins at once. Faults are the test's alone: nothing in the program knows of them.

    python tests/helpers/fault_runs.py SEED

repeats the random kills of one seed, and prints what was done.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ARGUMENTS = (
    "train", "--model=tiny", "--max_length=128", "--batch_size=8", "--config.training.num_train_steps=12",
    "--config.training.checkpoint_every_steps=2", "--config.training.eval_every_steps=4",
    "--config.training.num_sample_answers=1", "--config.training.num_scored_answers=1",
    "--config.generation.max_new_tokens=2",
)  # fmt: skip
_MOST_SECONDS, _NUM_STEPS = 8.0, 12
_WRITING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
_CLOCK = ("step_seconds", "tokens_per_second", "input_wait_seconds", "input_wait_share")
_PRELOADED = [
    "gemma_tune.cli.train", "gemma_tune.cli.run_result", "gemma_tune.pipeline", "gemma_tune.serving.generation",
    "tensorboardX", "matplotlib.pyplot",
]  # fmt: skip


class Fault(NamedTuple):
    """What happens to a run, and when. Only one of the moments is given.

    Attributes:
        signal: Signal that the process gets; 0: none.
        after_seconds: Time after the start. The steps are slowed down, so that no machine is done before.
        at_change: Number of the change to a file in the workdir.
        at_step: Number of the step after whose row of metrics it happens.
        clock_jumps: Whether the time of day jumps at each look at it.
    """

    signal: int = 0
    after_seconds: float = 0.0
    at_change: int = 0
    at_step: int = 0
    clock_jumps: bool = False


NOTHING = Fault()


class Ended(NamedTuple):
    """How a run ended.

    Attributes:
        code: Exit code; minus the signal's number if it was killed.
        err: What it wrote to stderr.
    """

    code: int
    err: str


def start(
    workdir: Path, fault: Fault = NOTHING, more: tuple[str, ...] = (), log: Path | None = None
) -> multiprocessing.Process:
    """Starts the command in a forked process, with a fault. log: File for what it writes to stderr."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_child, args=(str(workdir), fault, more, str(log or _log(workdir))))
    process.start()
    return process


def run(workdir: Path, fault: Fault = NOTHING, more: tuple[str, ...] = ()) -> Ended:
    """Runs the command in a forked process, with a fault, to its end."""
    process = start(workdir, fault, more)
    process.join(300)
    err = _log(workdir).read_text()
    if process.is_alive():
        process.kill()
        raise AssertionError(f"The run in {workdir} hangs: {fault}. {err[-2000:]}")
    return Ended(process.exitcode, err)


def _log(workdir: Path) -> Path:
    return workdir.with_name(workdir.name + ".err")


def _child(workdir: str, fault: Fault, more: tuple[str, ...], log: str) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if fault.clock_jumps:
        _make_clock_jump()
    if fault.at_change:
        _signal_at_change(workdir, fault)
    elif fault.at_step:
        _after_each_row(lambda step: os.kill(os.getpid(), fault.signal) if step == fault.at_step else None)
    elif fault.signal:
        _after_each_row(lambda step: time.sleep(_MOST_SECONDS / _NUM_STEPS))
        threading.Timer(fault.after_seconds, os.kill, (os.getpid(), fault.signal)).start()
    from gemma_tune.cli.main import run as run_command

    code = run_command([*ARGUMENTS, f"--workdir={workdir}", *more])
    os._exit(code)  # Without waiting for the timer.


def _signal_at_change(workdir: str, fault: Fault) -> None:
    left = fault.at_change

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        is_write = event == "open" and isinstance(arguments[1], str) and any(mode in arguments[1] for mode in "wax+")
        if not (is_write or event in _WRITING) or workdir not in str(arguments[0]):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), fault.signal)

    sys.addaudithook(hook)


def _after_each_row(call: Any) -> None:
    """Calls a function with the step after each training step's row of metrics was written."""
    from gemma_tune.training.run.metrics import MetricsWriter

    write = MetricsWriter.write

    def write_and_call(writer: Any, step: int, **values: float) -> None:
        write(writer, step, **values)
        if "step_seconds" in values:
            call(step)

    MetricsWriter.write = write_and_call


def _make_clock_jump() -> None:
    now, jumps = time.time, random.Random(0)
    time.time = lambda: now() + jumps.uniform(-1e6, 1e6)


def outcome(workdir: Path) -> dict[str, Any]:
    """Returns what a finished run came to, without what depends on the clock or the workdir's name."""
    from safetensors.numpy import load_file

    result = json.loads((workdir / "result.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "adapter": {
            name: value.tobytes() for name, value in load_file(workdir / "adapter/adapter.safetensors").items()
        },
        "result": {name: value for name, value in result.items() if name not in ("workdir", "saved_to")},
        "metrics": [{name: value for name, value in row.items() if name not in _CLOCK} for row in rows],
        "samples": json.loads((workdir / "samples.json").read_text()),
        "checkpoints": sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()),
    }


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Returns the names of what isn't the same."""
    return [name for name in wanted if found[name] != wanted[name]]


def random_fault(generator: random.Random, kill: int = signal.SIGKILL) -> Fault:
    """Returns a fault at a random moment: half of them by the clock, half at a change to a file."""
    if generator.random() < 0.5:
        return Fault(kill, after_seconds=generator.uniform(0.5, _MOST_SECONDS))
    return Fault(kill, at_change=generator.randint(1, 120))


def kill_again_and_again(workdir: Path, seed: int, num_kills: int = 3) -> list[tuple[Fault, int]]:
    """Starts a run, kills it up to num_kills times, and lets it end. Returns the faults with their exit codes."""
    generator = random.Random(seed)
    done = []
    for _ in range(num_kills):
        fault = random_fault(generator)
        ended = run(workdir, fault)
        assert "Traceback" not in ended.err, ended.err[-3000:]
        done.append((fault, ended.code))
        if ended.code == 0:
            return done
    ended = run(workdir)
    assert ended.code == 0, ended.err[-3000:]
    return done


def main() -> None:
    """Repeats the kills of one seed."""
    import tempfile

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    seed = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        assert run(whole).code == 0
        for fault, code in kill_again_and_again(killed, seed):
            print(fault, "->", code)
        print("differs:", differences(outcome(killed), outcome(whole)) or "nothing")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
