"""Whether training in 16 bits follows float32: the same steps in each precision, and how far the losses come apart.

    python -m benchmarks.precision [--steps=200] [--precisions=mixed_float16,mixed_bfloat16] [--json]

Each trains the same LoRA factors of the real Gemma 3 270M on the same documents in the same order. Losses are compared
as running means over 20 steps. Must: nowhere more than 1 % beside float32's.
"""

import json
import sys
import time
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import job
from benchmarks.machine import describe

_STEPS = flags.DEFINE_integer("steps", 200, "Training steps of each.", lower_bound=1)
_PRECISIONS = flags.DEFINE_list("precisions", ["mixed_float16", "mixed_bfloat16"], "What to compare with float32.")
_MODEL = flags.DEFINE_string("model", "demo", "The model to train.")
_JOB = flags.DEFINE_enum("job", "documents", ["documents", "chats"], "What it learns.")
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 200, "Examples; seen again when all were seen.", lower_bound=1)
_ROW_LENGTH = flags.DEFINE_integer("row_length", 512, "Tokens of a step, and of the longest example.", lower_bound=16)
_RANK = flags.DEFINE_integer("rank", 4, "Of LoRA on all linear layers.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 5e-4, "Of AdamW, constant.")
_WINDOW = flags.DEFINE_integer("window", 20, "Steps in a mean.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_MOST = 0.01


def train(precision: str) -> dict[str, Any]:
    """Returns the loss of every step, how many were skipped, and the seconds of a step (the median)."""
    from gemma_tune.models.functional import parameters
    from gemma_tune.models.load import load_model
    from gemma_tune.models.sources.tokenizer import tokenizer_of
    from gemma_tune.models.transforms import LoraSettings, transform_for_training
    from gemma_tune.training.batches import TrainingBatches
    from gemma_tune.training.optimizer import make_optimizer, make_schedule
    from gemma_tune.training.state import init_state
    from gemma_tune.training.step.per_block import per_block_program
    from gemma_tune.training.step.train_step import make_train_step

    model = load_model(_MODEL.value, precision=precision)
    examples = job(_JOB.value, _NUM_EXAMPLES.value, tokenizer_of(model), max_length=_ROW_LENGTH.value).examples
    lora = LoraSettings(_RANK.value, float(_RANK.value), ("all-linear",), seed=0)
    row_length = _ROW_LENGTH.value
    program, _ = transform_for_training(model, lora, packing=True, remat="dots", row_length=row_length)
    batches = TrainingBatches(
        examples,
        batch_size=1,
        row_length=row_length,
        packing=True,
        seed=0,
        num_epochs=1,
        num_train_steps=_STEPS.value,
    )
    schedule = make_schedule("constant", _LEARNING_RATE.value, 10, len(batches))
    optimizer = make_optimizer("adamw", schedule, weight_decay=0.01, b1=0.9, b2=0.999, epsilon=1e-8, clip_norm=1.0)
    per_block = per_block_program(program, model, "dots")
    step = make_train_step(model, optimizer, batches.target_sizes, 1, per_block)
    frozen, state = parameters(model).frozen, init_state(model, optimizer, take_over=True)
    losses, seconds = [], []
    for index in range(len(batches)):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batches[index])
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - start)
        if (index + 1) % _WINDOW.value == 0:
            print(f"{precision} step {index + 1}/{len(batches)}: loss {losses[-1]:.4f}", file=sys.stderr, flush=True)
    return {
        "losses": losses,
        "num_skipped_steps": int(state.loss_scale.num_skipped) if state.loss_scale else 0,
        "loss_scale": float(state.loss_scale.scale) if state.loss_scale else None,
        "seconds_per_step": float(np.median(seconds)),
    }


def running_mean(losses: list[float], window: int) -> np.ndarray:
    """Returns the means of all windows of so many steps, of all steps together if they are fewer."""
    window = min(window, len(losses))
    return np.convolve(losses, np.full(window, 1 / window), mode="valid")


def compare(runs: dict[str, dict[str, Any]], window: int) -> None:
    """Adds to each run the means of its windows, one after the other, and its largest deviation from float32's."""
    wanted = running_mean(runs["float32"]["losses"], window)
    for run in runs.values():
        losses = run["losses"]
        run["windows"] = [float(np.mean(losses[first : first + window])) for first in range(0, len(losses), window)]
        run["deviation"] = float(np.max(np.abs(running_mean(losses, window) / wanted - 1)))


def main(arguments: list[str]) -> None:
    """Trains in each precision, one after the other."""
    del arguments
    precisions = ["float32", *(name for name in _PRECISIONS.value if name != "float32")]
    runs = {precision: train(precision) for precision in precisions}
    compare(runs, _WINDOW.value)
    is_reached = all(run["deviation"] <= _MOST for run in runs.values())
    result = {**describe(), "steps": _STEPS.value, "runs": runs, "must": _MOST, "is_reached": is_reached}
    verdict = "reached" if is_reached else "missed"
    console = Console(stderr=_JSON.value, width=110)
    table = Table(title=f"Losses at most {_MOST:.0%} beside float32's: {verdict}", title_justify="left")
    for title in ("", *precisions):
        table.add_column(title, justify="right" if title else "left")
    for index in range(len(runs["float32"]["windows"])):
        first, last = index * _WINDOW.value + 1, min((index + 1) * _WINDOW.value, _STEPS.value)
        table.add_row(f"loss, steps {first}–{last}", *[f"{runs[name]['windows'][index]:.4f}" for name in precisions])
    for title, key, form in (
        ("largest deviation", "deviation", ".2%"),
        ("skipped steps", "num_skipped_steps", "d"),
        ("seconds a step", "seconds_per_step", ".3f"),
    ):
        table.add_row(title, *[format(runs[name][key], form) for name in precisions])
    console.print(table)
    if _JSON.value:
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
