"""What a search survives: two workers on one study, killed at random moments and started again.

    python -m benchmarks.tune_faults [--kills=20] [--trials=10] [--seed=0] [--json]

Both are the plain command, started twice on one workdir, with the tiny model. SIGKILL comes 1 to 40 seconds after a
start, whatever the worker does then. At the end each trial must be there once, with the settings and, to the last bit,
the held-out loss that it has in a search that one worker ran in peace. All trials are random ones (TPE's suggestions
would depend on which trial ends first, without any kill too), and none is pruned, for the same reason.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.verdicts import Verdict, exit_with

_KILLS = flags.DEFINE_integer("kills", 20, "Number of kills.", lower_bound=1)
_TRIALS = flags.DEFINE_integer("trials", 10, "Number of trials, at most 10: those are random.", 1, 10)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of the moments.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_EARLIEST, _LATEST, _MOST_SECONDS = 1.0, 40.0, 3000.0
_LEAST_HITS = 0.25  # Share of the kills that must hit a running trial: others hit a worker that starts.


def _command(workdir: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "gemma_tune", "tune", "--model=tiny", "--max_length=64", "--num_epochs=16"),
        *(f"--workdir={workdir}", f"--budget={_TRIALS.value}_trials", "--pruner=none"),
        *("--config.training.eval_every_steps=50", "--config.training.checkpoint_every_steps=20"),
    ]


def main(arguments: list[str]) -> None:
    """Runs the search in peace, and under fire."""
    del arguments
    with tempfile.TemporaryDirectory() as name:
        peace, fire = Path(name) / "peace", Path(name) / "fire"
        subprocess.run(_command(peace), check=True, capture_output=True)
        num_kills = _run_under_fire(fire)
        wanted, found = _outcome(peace), _outcome(fire)
    losses = {slot: loss for slot, (_, loss) in found["trials"].items()}
    least = _LEAST_HITS * _KILLS.value
    num_differing = sum(found["trials"].get(slot) != trial for slot, trial in wanted["trials"].items())
    verdicts: list[Verdict] = [
        ("kills", num_kills, f"≥ {_KILLS.value}", num_kills >= _KILLS.value),
        ("kills of a running trial", hits := found["num_lost"], f"≥ {least:g}", hits >= least),
        ("trials lost", lost := len(wanted["trials"].keys() - losses.keys()), "0", lost == 0),
        ("trials counted twice", found["num_twice"], "0", found["num_twice"] == 0),
        ("trials that differ", num_differing, "0", num_differing == 0),
        ("another best trial", other := int(_best(found) != _best(wanted)), "0", not other),
    ]
    console = Console(stderr=_JSON.value)
    console.print(describe())
    console.print(f"{found['num_attempts']} attempts at {len(wanted['trials'])} trials", markup=False)
    exit_with(verdicts, _JSON.value)


def _run_under_fire(workdir: Path) -> int:
    """Keeps two workers going, and kills one again and again; returns how many kills there were."""
    rng, num_kills, started = random.Random(_SEED.value), 0, time.monotonic()
    workers: dict[int, tuple[subprocess.Popen, float]] = {}
    logs = [workdir.with_name(f"log_{number}") for number in range(2)]
    while time.monotonic() - started < _MOST_SECONDS:
        for number in range(2):
            worker, ends = workers.get(number, (None, 0.0))
            if worker is None or (worker.poll() is not None and worker.returncode == -signal.SIGKILL):
                with open(logs[number], "ab") as log:
                    worker = subprocess.Popen(_command(workdir), stdout=log, stderr=log)
                ends = time.monotonic() + rng.uniform(_EARLIEST, _LATEST)
                workers[number] = worker, ends
            elif worker.poll():
                raise SystemExit(f"Worker {number} failed: {logs[number].read_text()[-2000:]}")
            elif worker.poll() is None and num_kills < _KILLS.value and time.monotonic() > ends:
                worker.send_signal(signal.SIGKILL)
                worker.wait()
                num_kills += 1
                print(f"{num_kills} kills", file=sys.stderr, flush=True)
        if all(worker.poll() == 0 for worker, _ in workers.values()):
            return num_kills
        time.sleep(0.05)
    raise SystemExit(f"The search did not end in {_MOST_SECONDS:.0f} seconds.")


def _outcome(workdir: Path) -> dict[str, Any]:
    """Returns settings and loss of each finished trial, and how many are there twice, as the journal has them."""
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(workdir / "study.jsonl"))
    (study,) = optuna.study.get_all_study_names(storage := optuna.storages.JournalStorage(backend))
    attempts = optuna.load_study(study_name=study, storage=storage).trials
    done = [trial for trial in attempts if trial.state.name == "COMPLETE"]
    slots = [trial.user_attrs["slot"] for trial in done]
    return {
        "trials": {slot: (trial.params, trial.value) for slot, trial in zip(slots, done, strict=True)},
        "num_twice": len(slots) - len(set(slots)),
        "num_attempts": len(attempts),
        "num_lost": sum(trial.state.name == "FAIL" for trial in attempts),
    }


def _best(outcome: dict[str, Any]) -> int:
    return min(outcome["trials"], key=lambda slot: (outcome["trials"][slot][1], slot))


if __name__ == "__main__":
    app.run(main)
