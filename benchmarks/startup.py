"""Seconds from pressing return: help, import, a tiny run, and the first training step of the real model.

    python -m benchmarks.startup [--repeats=3] [--json]

Cold: with an empty compilation cache. Warm: with the one that the cold run filled.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe

_REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each; the median counts.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_TRAIN = ["-m", "gemma_tune", "train"]
_FIRST_STEP = [
    "--batch_size=1",
    "--config.training.num_train_steps=2",
    "--config.training.num_sample_answers=0",
    "--config.training.num_scored_answers=0",
]


def _environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "GEMMA_TUNE_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}


def seconds(command: list[str], cache: Path) -> float:
    """Returns how long a command takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=_environment(cache))
    return time.perf_counter() - start


def first_step(model: str, cache: Path, folder: Path) -> float:
    """Returns the seconds until the first step of a run was written down; two questions are scored before it."""
    workdir = Path(tempfile.mkdtemp(dir=folder))
    data = workdir / "questions.jsonl"
    rows = [{"prompt": f"How do I use feature {i}?", "completion": f"Open Settings > Feature {i}."} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, *_TRAIN, *_FIRST_STEP, f"--model={model}", f"--data={data}", f"--workdir={workdir}/w"]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=_environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = workdir / "w" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 1, "loss"' in metrics.read_text()):
        time.sleep(0.02)
    taken = time.perf_counter() - start
    process.wait()
    return taken


def main(arguments: list[str]) -> None:
    """Measures all, one after the other."""
    del arguments
    result: dict = {**describe(), "seconds": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"
        seconds(["-c", "from gemma_tune.models.sources.download import demo_path; demo_path()"], cache)
        repeats = range(_REPEATS.value)
        figures = {
            "gemma-tune --help": [seconds(["-m", "gemma_tune", "--help"], cache) for _ in repeats],
            "import gemma_tune": [seconds(["-c", "import gemma_tune"], cache) for _ in repeats],
            "real model, first step, cold": [first_step("demo", cache, folder)],
            "real model, first step, warm": [first_step("demo", cache, folder) for _ in repeats],
        }
        tiny = [*_TRAIN, "--model=tiny", "--data=sample:smartphone_support", "--config.training.num_train_steps=20"]
        figures["tiny run, whole, cold"] = [seconds([*tiny, f"--workdir={folder}/tiny_cold"], cache)]
        figures["tiny run, whole, warm"] = [seconds([*tiny, f"--workdir={folder}/tiny_{i}"], cache) for i in repeats]
    result["seconds"] = {what: statistics.median(values) for what, values in figures.items()}
    table = Table(title=f"Start-up, {result['machine']}", title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for what, value in result["seconds"].items():
        table.add_row(what, f"{value:.2f}")
    Console(stderr=_JSON.value).print(table)
    if _JSON.value:
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
