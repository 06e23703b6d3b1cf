"""What surviving costs and what it survives: kills at random moments, the price of a checkpoint, the way back.

    python -m benchmarks.faults [--parts=kills,saving,resume] [--num_seeds=20] [--model=demo] [--json]

kills: runs of the tiny model, each killed (SIGKILL) up to three times at random moments and started again; their end
is compared, bit for bit, with that of a run that was left alone. saving: windows of steps with and without a checkpoint
take turns; the difference is what a checkpoint costs. Must: at most 2 % of a hundred steps. resume: from starting the
command on a killed run to its next finished step.
"""

import json
import os
import signal
import statistics
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

_PARTS = flags.DEFINE_list("parts", ["kills", "saving", "resume"], "What to measure.")
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 20, "Runs that are killed.", lower_bound=1)
_MODEL = flags.DEFINE_string("model", "demo", "The model whose checkpoints and restarts are timed.")
_METHOD = flags.DEFINE_enum("method", "lora", ["lora", "full"], "What it trains.")
_ROW_LENGTH = flags.DEFINE_integer("row_length", 128, "Tokens of a step.", lower_bound=16)
_WINDOW = flags.DEFINE_integer("window", 5, "Steps of a window.", lower_bound=2)
_PAIRS = flags.DEFINE_integer("pairs", 6, "Windows with a checkpoint, and as many without.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_EVERY, _MOST = 100, 0.02


def kills() -> dict[str, Any]:
    """Returns how many kills were tried and how many runs ended otherwise than one left alone."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from helpers import fault_runs

    num_kills, differing = 0, []
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        if fault_runs.run(whole).code:
            raise RuntimeError("The run that nothing happens to failed.")
        wanted = fault_runs.outcome(whole)
        for seed in range(_NUM_SEEDS.value):
            workdir = Path(name) / str(seed)
            done = fault_runs.kill_again_and_again(workdir, seed)
            num_kills += sum(code == -signal.SIGKILL for _, code in done)
            if names := fault_runs.differences(fault_runs.outcome(workdir), wanted):
                differing.append({"seed": seed, "differs": names})
            print(f"seed {seed}: {num_kills} kills so far, {len(differing)} runs differ", file=sys.stderr, flush=True)
    return {"num_runs": _NUM_SEEDS.value, "num_kills": num_kills, "differing": differing}


def saving() -> dict[str, Any]:
    """Returns the seconds of a step, and what a checkpoint adds."""
    import jax

    from gemma_tune.config import Config
    from gemma_tune.pipeline.setup import read_splits, set_up
    from gemma_tune.training.run.checkpoint_content import Progress
    from gemma_tune.training.run.checkpoints import Checkpoints

    num_steps = 2 + 2 * _PAIRS.value * _WINDOW.value
    settings = {
        "model.source": _MODEL.value,
        "training.method": _METHOD.value,
        "training.num_train_steps": num_steps,
        "training.batch_size": 1,
        "data.max_length": _ROW_LENGTH.value,
    }
    config = Config().replace(settings)
    setup = set_up(config, read_splits(config))
    state, steps, without, added = setup.state, [], 0.0, []
    with tempfile.TemporaryDirectory() as name, Checkpoints(Path(name) / "checkpoints", 2) as checkpoints:
        start = time.perf_counter()
        for index in range(num_steps):
            state, metrics = setup.train_step(state, setup.frozen, setup.batches[index])
            jax.block_until_ready(metrics.loss)
            place, window = (index - 1) % _WINDOW.value, (index - 1) // _WINDOW.value
            if index < 1:
                start = time.perf_counter()
                continue
            if window % 2 and not place:
                checkpoints.save(state, Progress())  # In the first step of every second window.
            if place == _WINDOW.value - 1:
                taken, start = time.perf_counter() - start, time.perf_counter()
                if window % 2:
                    added.append(taken - without)
                else:
                    without = taken
                    steps.append(taken / _WINDOW.value)
        checkpoints.wait()
        newest = Path(name) / "checkpoints" / str(checkpoints.steps[-1])
        num_bytes = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    seconds, cost = statistics.median(steps), statistics.median(added)
    return {"step_seconds": seconds, "save_seconds": cost, "bytes": num_bytes, "share": cost / (_EVERY * seconds)}


def resume() -> dict[str, float]:
    """Returns the seconds from the start of a command on a killed run to its next finished step."""
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name) / "w"
        command = [
            sys.executable, "-m", "gemma_tune", "train", f"--model={_MODEL.value}", "--data=sample:smartphone_support",
            f"--workdir={workdir}", f"--method={_METHOD.value}", "--batch_size=1", f"--max_length={_ROW_LENGTH.value}",
            "--config.training.checkpoint_every_steps=2", "--config.training.num_train_steps=1000",
            "--config.training.num_sample_answers=0", "--config.training.num_scored_answers=0",
        ]  # fmt: skip
        begun = _run_until(command, workdir, 4)
        again = _run_until(command, workdir, 6)
    return {"first_start_seconds": begun, "resume_seconds": again}


def _run_until(command: list[str], workdir: Path, step: int) -> float:
    """Runs a command until a step is written down and kills it. Returns the seconds to the end of the step before."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ))
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None:
        text = metrics.read_text() if metrics.exists() else ""
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        trained = [row for row in rows if "loss" in row]
        if trained and trained[-1]["step"] >= step:
            taken = time.perf_counter() - start
            process.kill()
            process.wait()
            first = 1 if step == 4 else step - 1  # Steps of this process before the last.
            return taken - sum(row["step_seconds"] for row in trained if row["step"] > first)
        time.sleep(0.01)
    raise RuntimeError(f"The run ended by itself: {process.stderr.read().decode()[-2000:] if process.stderr else ''}")


def main(arguments: list[str]) -> None:
    """Measures all parts, one after the other."""
    del arguments
    result: dict[str, Any] = {
        **describe(),
        "model": _MODEL.value,
        "method": _METHOD.value,
        "row_length": _ROW_LENGTH.value,
    }
    for name, part in (("kills", kills), ("saving", saving), ("resume", resume)):
        if name in _PARTS.value:
            result[name] = part()
    table = Table(title=f"Faults, {result['machine']}", title_justify="left")
    table.add_column("")
    table.add_column("measured", justify="right")
    if found := result.get("kills"):
        table.add_row("kills, in so many runs", f"{found['num_kills']}, {found['num_runs']}")
        table.add_row("runs with another end; must: 0", str(len(found["differing"])))
    if found := result.get("saving"):
        table.add_row(f"a step of {_ROW_LENGTH.value} tokens, s", f"{found['step_seconds']:.3f}")
        table.add_row(f"a checkpoint of {found['bytes'] / 1e6:.1f} MB, s", f"{found['save_seconds']:.3f}")
        table.add_row(f"share of {_EVERY} steps; must: {_MOST:.0%}", f"{found['share']:.2%}")
    if found := result.get("resume"):
        table.add_row("start to first step, s", f"{found['first_start_seconds']:.1f}")
        table.add_row("start to next step of a killed run, s", f"{found['resume_seconds']:.1f}")
    Console(stderr=_JSON.value, width=110).print(table)
    if _JSON.value:
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
