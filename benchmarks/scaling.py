"""Memory and time of a training step against batch, length, rank and layers: what is claimed of their growth is fitted.

    python -m benchmarks.scaling [--axes=batch,length,rank,layers] [--plot=FILE.png] [--quick] [--json]

One axis at a time, all else as in the base point: one row of 512 positions, LoRA rank 16 on all linear layers, three
layers in the sizes of Gemma 3 270M's with random weights, float32, a vocabulary of 32,768 whose head sees every
position. Bytes are the compiled program's temporaries, and the state's (factors and optimizer); seconds are medians. A
point that needs more memory than is free is compiled and not run. A claim is missed where b·x^p, fitted to all points,
or the slope between the last two, has a larger exponent than claimed.
"""

import json
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.fit import NAMES, Growth, growth
from benchmarks.machine import describe, free_bytes
from benchmarks.random_model import random_model
from benchmarks.shapes import SHAPES
from gemma_tune.data import Batch, TokenizedExample, make_batch
from gemma_tune.models.functional import parameters
from gemma_tune.models.transforms import LoraSettings, transform_for_training
from gemma_tune.training.optimizer import make_optimizer, make_schedule
from gemma_tune.training.state import init_state
from gemma_tune.training.step.per_block import per_block_program
from gemma_tune.training.step.train_step import make_train_step

_AXES = flags.DEFINE_list("axes", ["batch", "length", "rank", "layers"], "What to vary.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Steps of each point; the median counts.", lower_bound=1)
_REMAT = flags.DEFINE_string("remat", "dots", "training.remat.")
_PROGRAM = flags.DEFINE_string("program", "auto", "training.program.")
_PLOT = flags.DEFINE_string("plot", None, "A file to draw the points and the fits into.")
_QUICK = flags.DEFINE_bool("quick", False, "Small sizes, to see that it works; its times mean nothing.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")


class Point(NamedTuple):
    """One training step: rows, positions in each, LoRA's rank, decoder blocks."""

    batch: int = 1
    length: int = 512
    rank: int = 16
    layers: int = 3


_SHAPE = SHAPES["gemma3_270m"]._replace(vocabulary=32_768)
_VALUES = {
    "batch": (1, 2, 4, 8),
    "length": (512, 1024, 2048, 4096, 8192),
    "rank": (4, 8, 16, 32, 64),
    "layers": (2, 4, 8, 16, 26),
}
_QUICK_BASE = Point(length=64, rank=4, layers=1)
_QUICK_VALUES = {"batch": (1, 2, 4), "length": (64, 128, 256), "rank": (4, 8, 16), "layers": (1, 2, 4)}
# The largest exponents that are claimed. Attention compares all positions of a row; it holds some of the scores.
_QUANTITIES = {"temporary_bytes": "temporaries", "state_bytes": "state", "seconds": "time"}
_CLAIMS = {
    "batch": {"temporary_bytes": 1, "state_bytes": 0, "seconds": 1},
    "length": {"temporary_bytes": 2, "state_bytes": 0, "seconds": 2},
    "rank": {"temporary_bytes": 1, "state_bytes": 1, "seconds": 1},
    "layers": {"temporary_bytes": 1, "state_bytes": 1, "seconds": 1},
}


def full_batch(point: Point, vocabulary: int) -> Batch:
    """Returns rows of one random example each, which fills them; every position has a loss."""
    rng = np.random.default_rng(0)
    ids = rng.integers(10, vocabulary, (point.batch, point.length + 1)).astype(np.int32)
    rows = [[TokenizedExample(row, np.ones(len(row), bool))] for row in ids]
    return make_batch(rows, point.batch, point.length)


def measure(point: Point) -> dict[str, Any]:
    """Compiles and times a step, made as in a run of gemma_tune."""
    shape = (SHAPES["tiny"] if _QUICK.value else _SHAPE)._replace(layers=point.layers)
    model = random_model(shape, "float32")
    lora = LoraSettings(point.rank, float(point.rank), ("all-linear",), seed=0)
    kind, _ = transform_for_training(
        model, lora, packing=True, remat=_REMAT.value, row_length=point.length, program=_PROGRAM.value
    )
    schedule = make_schedule("constant", 1e-4, 0, 1)
    optimizer = make_optimizer("adamw", schedule, weight_decay=0.0, b1=0.9, b2=0.999, epsilon=1e-8, clip_norm=1.0)
    batch = full_batch(point, shape.vocabulary)
    frozen = parameters(model).frozen
    state = init_state(model, optimizer, take_over=True)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    per_block = per_block_program(kind, model, _REMAT.value)
    step = make_train_step(model, optimizer, point.batch * point.length, 1, per_block)
    temporary_bytes = step.memory(state, frozen, batch).temporary_bytes
    seconds = None
    if temporary_bytes <= free_bytes():
        times = []
        for _ in range(1 + _REPEATS.value):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, frozen, batch))
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[1:])  # The first warms up.
    return {**point._asdict(), "temporary_bytes": temporary_bytes, "state_bytes": state_bytes, "seconds": seconds}


def measure_axis(axis: str, known: dict[Point, dict[str, Any]]) -> list[dict[str, Any]]:
    """Measures all points of an axis that are not known yet."""
    base = _QUICK_BASE if _QUICK.value else Point()
    points = [base._replace(**{axis: value}) for value in (_QUICK_VALUES if _QUICK.value else _VALUES)[axis]]
    for point in points:
        if point not in known:
            known[point] = measure(point)
            jax.clear_caches()
            print(f"{known[point]}", file=sys.stderr)
    return [known[point] for point in points]


def fits(axis: str, points: list[dict[str, Any]]) -> dict[str, Growth]:
    """Returns quantity -> growth over the points where it was measured."""
    found = {}
    for quantity, claimed in _CLAIMS[axis].items():
        pairs = [(point[axis], point[quantity]) for point in points if point[quantity] is not None]
        if len(pairs) > 1:
            found[quantity] = growth(*zip(*pairs, strict=True), claimed)
    return found


def show(axis: str, points: list[dict[str, Any]], growths: dict[str, Growth], console: Console) -> None:
    """Prints an axis's points, and its fits beside what is claimed."""
    table = Table(title=f"Against {axis}", title_justify="left")
    for title in (axis, "temporaries MB", "state MB", "s a step"):
        table.add_column(title, justify="right")
    for point in points:
        seconds = "not run" if point["seconds"] is None else f"{point['seconds']:.3f}"
        sizes = (f"{point[key] / 1e6:.2f}" for key in ("temporary_bytes", "state_bytes"))
        table.add_row(str(point[axis]), *sizes, seconds)
    console.print(table)
    for quantity, fit in growths.items():
        verdict = "as claimed" if fit.is_as_claimed else "[bold]MISSED[/bold]"
        affine = f"; {fit.constant:.3g} + {fit.slope:.3g}·{axis} with R² {fit.r_squared:.4f}"
        console.print(
            f"  {_QUANTITIES[quantity]}: claimed {NAMES[fit.claimed]}; {axis}^{fit.exponent:.2f}, in the end "
            f"{axis}^{fit.last_exponent:.2f}{affine if fit.claimed == 1 else ''}: {verdict}"
        )


def draw(path: str, result: dict[str, Any]) -> None:
    """Draws temporaries and seconds against each axis, with the fitted powers."""
    from matplotlib.figure import Figure

    axes = [axis for axis in _VALUES if axis in result]
    figure = Figure(figsize=(3.2 * len(axes), 5.6), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        for row, (quantity, unit) in enumerate((("temporary_bytes", 1e6), ("seconds", 1.0))):
            points = [point for point in result[axis]["points"] if point[quantity] is not None]
            x = np.array([point[axis] for point in points], float)
            y = np.array([point[quantity] for point in points]) / unit
            grid[row, column].plot(x, y, "o")
            if quantity in result[axis]["fits"]:
                exponent = result[axis]["fits"][quantity]["exponent"]
                scale = np.exp(np.mean(np.log(y)) - exponent * np.mean(np.log(x)))
                between = np.linspace(x[0], x[-1])
                grid[row, column].plot(between, scale * between**exponent, "--", label=f"{axis}^{exponent:.2f}")
                grid[row, column].legend()
            grid[row, column].set_ylim(bottom=0)
            grid[row, column].set(xlabel=axis, ylabel="temporaries, MB" if row == 0 else "seconds a step")
    figure.savefig(path)


def main(arguments: list[str]) -> None:
    """Measures all axes."""
    del arguments
    console = Console(stderr=_JSON.value, width=140, highlight=False)
    result: dict[str, Any] = describe()
    known: dict[Point, dict[str, Any]] = {}
    for axis in _AXES.value:
        points = measure_axis(axis, known)
        growths = fits(axis, points)
        show(axis, points, growths, console)
        result[axis] = {
            "points": points,
            "fits": {name: {**fit._asdict(), "is_as_claimed": fit.is_as_claimed} for name, fit in growths.items()},
        }
    if _PLOT.value:
        draw(_PLOT.value, result)
    if _JSON.value:
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
