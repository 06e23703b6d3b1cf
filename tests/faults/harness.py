"""Runs of a tiny model in processes that something happens to.

Each run is the command line in a process of its own, forked from a server that has imported everything, so that it
begins at once. Faults are the test's alone: nothing in the program knows of them.

    python tests/faults/harness.py SEED

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
from pathlib import Path
from typing import Any, NamedTuple

ARGUMENTS = (
    "train", "--model=tiny", "--max_length=128", "--batch_size=8", "--config.training.num_train_steps=12",
    "--config.training.checkpoint_every_steps=2", "--config.training.eval_every_steps=4",
    "--config.training.num_sample_answers=1", "--config.training.num_scored_answers=1",
    "--config.generation.max_new_tokens=2",
)  # fmt: skip
_WRITING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
_CLOCK = ("step_seconds", "tokens_per_second", "input_wait_seconds", "input_wait_share")
_PRELOADED = [
    "gemma_tune.cli.train", "gemma_tune.cli.run_result", "gemma_tune.pipeline", "gemma_tune.serving.generation", "tensorboardX",
    "matplotlib.pyplot",
]  # fmt: skip


class Fault(NamedTuple):
    """What happens, and when: a signal after some seconds, or at the n-th change to a file in the workdir."""

    signal: int = 0
    after_seconds: float = 0.0
    at_change: int = 0
    clock_jumps: bool = False


NOTHING = Fault()


class Ended(NamedTuple):
    """code: the exit code; minus the signal's number if it was killed. err: stderr."""

    code: int
    err: str


def run(workdir: Path, fault: Fault = NOTHING, more: tuple[str, ...] = ()) -> Ended:
    """Runs the command in a forked process, with a fault."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    log = workdir.with_name(workdir.name + ".err")
    process = context.Process(target=_child, args=(str(workdir), fault, more, str(log)))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"The run in {workdir} hangs: {fault}. {log.read_text()[-2000:]}")
    return Ended(process.exitcode, log.read_text())


def _child(workdir: str, fault: Fault, more: tuple[str, ...], log: str) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if fault.clock_jumps:
        _make_clock_jump()
    if fault.signal and fault.at_change:
        _signal_at_change(workdir, fault)
    elif fault.signal:
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


def _make_clock_jump() -> None:
    import time

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
    """Half of them by the clock, half at a change to a file."""
    if generator.random() < 0.5:
        return Fault(kill, after_seconds=generator.uniform(0.5, 8.0))
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
