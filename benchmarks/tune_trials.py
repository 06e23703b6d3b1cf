"""Trials of a search in one process, against as many runs of `train`: time and compilations.

    python -m benchmarks.tune_trials [--trials=20] [--steps=20] [--json]

All train the tiny model with the same settings, trial by trial: learning rate, schedule, warm-up, decay, clipping and
alpha. None of them answers questions. Runs of `train` are called one after the other in one process, and as commands,
each in a process of its own. Programs that XLA compiled are on the disk from a run before, for all.
"""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.verdicts import Verdict, verdict_table

_TRIALS = flags.DEFINE_integer("trials", 20, "Number of trials, and of runs.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "Number of steps of each.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_PART = flags.DEFINE_string("part", "", "Part to run in this process: `trials` or `train`. For this program's own use.")
_SHARE = 0.4  # Of the time of 20 runs.


def settings(trial: int, num_steps: int) -> dict[str, Any]:
    """Returns the settings of a trial by path."""
    rng = random.Random(trial)
    return {
        "model.source": "tiny",
        "data.source": "sample:smartphone_support",
        "data.max_length": 64,
        "training.num_train_steps": num_steps,
        "training.eval_every_steps": max(1, num_steps // 2),
        "training.num_sample_answers": 0,
        "training.num_scored_answers": 0,
        "optimizer.learning_rate": 10 ** rng.uniform(-4, -2),
        "optimizer.schedule": rng.choice(["constant", "linear", "cosine"]),
        "optimizer.warmup_steps": rng.randrange(0, 10),
        "optimizer.weight_decay": rng.choice([0.0, 0.01, 0.1]),
        "optimizer.clip_norm": rng.choice([0.0, 1.0]),
        "lora.alpha": rng.uniform(2, 16),
    }


def main(arguments: list[str]) -> None:
    """Measures the three ways one after the other, in processes of their own."""
    del arguments
    if _PART.value:
        return _run_part()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "GEMMA_TUNE_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
        for part in ("trials", "train"):
            _measure(part, 1, environment)
        trials, train = (_measure(part, _TRIALS.value, environment) for part in ("trials", "train"))
        commands = _seconds_of_commands(folder, environment)
    result = {**describe(), "trials": trials, "train": train, "commands": {"seconds": commands}}
    differences = [abs(a - b) for a, b in zip(trials["losses"], train["losses"], strict=True)]
    verdicts: list[Verdict] = [
        (
            "time of trials / runs of train",
            ratio := trials["seconds"] / train["seconds"],
            f"≤ {_SHARE}",
            ratio <= _SHARE,
        ),
        ("time of trials / commands", ratio := trials["seconds"] / commands, f"≤ {_SHARE}", ratio <= _SHARE),
        ("compilations of the training step", n := trials["num_compilations"], "1", n == 1),
        ("largest difference of held-out losses", worst := max(differences), "≤ 1e-6", worst <= 1e-6),
    ]
    result["passed"] = all(is_reached for *_, is_reached in verdicts)
    table = Table("", "seconds", "seconds each", title=f"{_TRIALS.value} trials of {_STEPS.value} steps, tiny model")
    for what, seconds in (
        ("trials in one process", trials["seconds"]),
        ("calls of train in one process", train["seconds"]),
        ("gemma-tune train, a process each", commands),
    ):
        table.add_row(what, f"{seconds:.1f}", f"{seconds / _TRIALS.value:.2f}")
    console = Console()
    console.print(describe(), table, verdict_table(verdicts), "PASS" if result["passed"] else "FAIL")
    if _JSON.value:
        print(json.dumps(result))
    sys.exit(0 if result["passed"] else 1)


def _measure(part: str, num_trials: int, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a part in a process of its own, and returns what it measured."""
    command = [sys.executable, "-m", "benchmarks.tune_trials", f"--part={part}", f"--trials={num_trials}"]
    done = subprocess.run([*command, f"--steps={_STEPS.value}"], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def _run_part() -> None:
    """Runs the trials, or the runs, in this process. Importing isn't counted."""
    from gemma_tune import Config, pipeline
    from gemma_tune.tuning.runner.trial_runner import TrialRunner

    configs = [Config().replace(settings(trial, _STEPS.value)) for trial in range(_TRIALS.value)]
    losses, num_compilations, start = [], 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        if _PART.value == "trials":
            runner = TrialRunner(configs[0])
            for config in configs:
                result = runner.run(config)
                losses.append(result.metrics["loss"])
                num_compilations += result.num_compilations
        else:
            for index, config in enumerate(configs):
                run = pipeline.run_training(config.replace({"workdir": f"{folder}/{index}"}))
                losses.append(run.after["loss"])
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "losses": losses, "num_compilations": num_compilations}))


def _seconds_of_commands(folder: Path, environment: dict[str, str]) -> float:
    start = time.perf_counter()
    for trial in range(_TRIALS.value):
        flags_of_trial = [f"--config.{path}={value}" for path, value in settings(trial, _STEPS.value).items()]
        command = [sys.executable, "-m", "gemma_tune", "train", f"--workdir={folder}/{trial}", *flags_of_trial]
        subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


if __name__ == "__main__":
    app.run(main)
