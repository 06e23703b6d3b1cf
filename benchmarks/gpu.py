"""Training on an NVIDIA GPU: tokens a second, share of the measured matrix-product peak, and memory.

    python -m benchmarks.gpu [--shapes=gemma3_1b,gemma3_4b,gemma2_2b] [--json]

Random weights in the shapes of real Gemmas, bfloat16, and examples of random tokens, 300 on average: nothing is
downloaded. Ours packs them into rows of 1,024; the Keras tutorial's way pads each to 512, and transformers + peft to
the longest of a batch, with as many positions in a step. A step that doesn't fit into the GPU's memory is tried with
half as many examples. Each runs in a process of its own, one after the other. Needs jax with CUDA, keras and keras-hub;
transformers and peft if they are to be measured. Without a GPU it says so and exits with code 1; --tiny runs all of it
on the CPU, to see that it works.
"""

import json
import os
import statistics
import subprocess
import sys
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.processes import Contender, ContenderFailed
from benchmarks.shapes import SHAPES
from benchmarks.sources import installed

_SHAPES = flags.DEFINE_list("shapes", ["gemma3_1b", "gemma3_4b", "gemma2_2b"], f"Any of {', '.join(SHAPES)}.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Packed rows in a step of ours.", lower_bound=1)
_ROW_LENGTH = flags.DEFINE_integer("row_length", 1024, "Positions in a packed row.", lower_bound=512)
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 320, "Examples in a pass.", lower_bound=1)
_REMAT = flags.DEFINE_string("remat", "dots", "training.remat of ours.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Passes of each; the median counts.", lower_bound=1)
_TINY = flags.DEFINE_bool("tiny", False, "A tiny shape in float32 on the CPU; its figures mean nothing.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")

_PADDED_LENGTH = 512
# What is measured -> (how it is called, contender, its settings).
_RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "ours": ("ours, rank 4 on query, value", "ours", ("targets=query,value", "rank=4")),
    "ours_all": ("ours, rank 16 on all linear", "ours", ("targets=all-linear", "rank=16")),
    "tutorial": ("Keras tutorial, rank 4", "tutorial", ()),
    "peft": ("peft, rank 4 on query, value", "peft_torch", ("targets=q_proj,v_proj", "rank=4")),
    "peft_all": ("peft, rank 16 on all linear", "peft_torch", ("targets=all-linear", "rank=16")),
}
_CHOSEN = flags.DEFINE_list("runs", list(_RUNS), "What to measure.")
_NO_MEMORY = ("resource_exhausted", "out of memory")


def environment() -> dict[str, str]:
    """Returns what a process is started with: JAX chooses the GPU by itself, and takes memory as it needs it."""
    platform = "cpu" if _TINY.value else os.environ.get("JAX_PLATFORMS", "")
    return {"JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def ask_python(*arguments: str) -> str:
    """Returns the last line that Python prints, run with these arguments."""
    done = subprocess.run(
        [sys.executable, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment()},
    )
    return done.stdout.splitlines()[-1]


def runs_here() -> list[str]:
    """Returns the chosen runs whose contender can run on the device."""
    here = installed({_RUNS[run][1] for run in _CHOSEN.value})
    torch_needs_a_gpu = "peft_torch" in here and not _TINY.value
    if torch_needs_a_gpu and ask_python("-c", "import torch; print(torch.cuda.is_available())") != "True":
        here.remove("peft_torch")
    return [run for run in _CHOSEN.value if _RUNS[run][1] in here]


def measure(run: str, shape: str, rate: float) -> dict[str, Any]:
    """Measures one run with as large a batch as fits; returns its figures, or why there are none."""
    title, who, settings = _RUNS[run]
    source = f"random:{shape}:{'float32' if _TINY.value else 'bfloat16'}"
    batch_size = _BATCH_SIZE.value
    if who == "ours":
        settings += (f"row_length={_ROW_LENGTH.value}", f"remat={_REMAT.value}")
    else:
        batch_size = batch_size * _ROW_LENGTH.value // _PADDED_LENGTH
    while True:
        contender = Contender(
            who, "random", _NUM_EXAMPLES.value, source, *settings, f"batch_size={batch_size}", environment=environment()
        )
        try:
            ready = contender.start()
            passes = [contender.ask("pass") for _ in range(_REPEATS.value)]
            break
        except ContenderFailed as error:
            print(f"{shape}, {title}, {batch_size} rows: {error}", file=sys.stderr)
            if batch_size == 1 or not any(words in str(error).lower() for words in _NO_MEMORY):
                return {"error": str(error)}
            batch_size //= 2
        finally:
            contender.stop()
    seconds = [answer["seconds"] for answer in passes]
    operations = SHAPES[shape].least_operations(ready["num_tokens"], ready["num_targets"])
    return {
        **{key: ready[key] for key in ("loss", "num_steps", "num_tokens", "num_targets", "num_positions")},
        "batch_size": batch_size,
        "seconds": seconds,
        "tokens_per_second": ready["num_tokens"] / statistics.median(seconds),
        "share_of_matmul": operations / statistics.median(seconds) / rate,
        "peak_bytes": passes[-1]["peak_bytes"],
        "weight_bytes": ready["loaded"]["weight_bytes"],
    }


def show(shape: str, figures: dict[str, Any], console: Console) -> None:
    """Prints a shape's figures as a table."""
    table = Table(title=f"{shape}, {_NUM_EXAMPLES.value} examples", title_justify="left")
    for title in ("", "rows", "filled", "tokens/s", "ours is", "of peak", "peak GB", "weights GB", "loss"):
        table.add_column(title, justify="left" if not title else "right")
    ours = figures.get("ours", {}).get("tokens_per_second")
    for run, row in figures.items():
        if "error" in row:
            table.add_row(_RUNS[run][0], "failed")
            continue
        table.add_row(
            _RUNS[run][0],
            str(row["batch_size"]),
            f"{row['num_tokens'] / row['num_positions']:.0%}",
            f"{row['tokens_per_second']:.0f}",
            f"{ours / row['tokens_per_second']:.2f}×" if ours else "",
            f"{row['share_of_matmul']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['weight_bytes'] / 1e9:.2f}",
            f"{row['loss']:.3f}",
        )
    console.print(table)


def main(arguments: list[str]) -> None:
    """Measures all shapes, or says that there is no GPU."""
    del arguments
    console = Console(stderr=_JSON.value, width=120)
    device = json.loads(ask_python("-m", "benchmarks.contenders.matmul"))
    if device["gpu"] is None and not _TINY.value:
        console.print("No GPU: JAX finds none on this machine, so nothing is measured. --tiny runs on the CPU.")
        if _JSON.value:
            print(json.dumps({"gpu": None}))
        sys.exit(1)
    rate, runs = device["matmul_flops_per_second"], runs_here()
    left_out = [run for run in _CHOSEN.value if run not in runs]
    result: dict[str, Any] = {**describe(), **device, "left_out": left_out}
    console.print(
        f"{device['gpu'] or result['machine']}; matrix products: {rate / 1e12:.2f} TFLOP/s; "
        f"left out: {', '.join(left_out) or 'none'}"
    )
    for shape in ["tiny"] if _TINY.value else _SHAPES.value:
        result[shape] = {run: measure(run, shape, rate) for run in runs}
        show(shape, result[shape], console)
    if _JSON.value:
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
