"""Finds what is wrong with a step, and says which examples it had and what to do."""

import math
from collections.abc import Sequence

from gemma_tune.runtime.ordinals import ordinal
from gemma_tune.training.state import StepMetrics, TrainState

MAX_BAD_IN_A_ROW = 20  # As many bad steps end a run that skips bad steps.
FLOAT16_OVERFLOWS = (
    "float16 ends at 65504, and this model computes larger values. Use --precision=mixed_bfloat16 or float32, with "
    "another --workdir."
)


def find_problem(metrics: StepMetrics, state: TrainState) -> str:
    """Returns what is wrong with a step; '' if it is good, or only overflowed so that loss scaling skipped it.

    Args:
        metrics: Metrics of the step.
        state: State after the step.
    """
    loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
    loss_scale, guard = state.loss_scale, state.guard
    was_scaled_down = loss_scale is not None and float(loss_scale.scale) >= 1  # Its update was left out.
    is_spike = bool(metrics.is_bad) and math.isfinite(loss)
    if math.isfinite(loss) and (math.isfinite(grad_norm) or was_scaled_down) and not is_spike:
        return ""
    if is_spike and guard and math.isfinite(grad_norm):
        return f"the loss is {loss:.4g}, and the usual loss {float(guard.mean_loss):.4g}"
    return f"the loss is {loss} and the gradient's norm {grad_norm}"


def may_skip(state: TrainState) -> bool:
    """Returns whether a run that skips bad steps may go on: few in a row were bad, and their updates were left out."""
    return state.guard is not None and int(state.guard.num_bad_in_a_row) < MAX_BAD_IN_A_ROW


def stop_message(step: int, problem: str, state: TrainState, examples: str, saved: Sequence[int]) -> str:
    """Returns the message of a run that stops at a bad step.

    Args:
        step: Number of the step.
        problem: From `find_problem`.
        state: State after the step.
        examples: From `describe_examples`.
        saved: Steps that have a checkpoint.
    """
    loss_scale, guard = state.loss_scale, state.guard
    where = "from there" if saved else "from the start"
    advice = (
        f"The same command with --config.training.on_bad_step=skip goes on {where} and skips such steps. Or try a "
        "lower --learning_rate, a longer optimizer.warmup_steps, or --precision=float32, with another --workdir."
    )
    if guard and int(guard.num_bad_in_a_row) > 1:
        problem += f"; it is the {ordinal(int(guard.num_bad_in_a_row))} bad step in a row"
    if loss_scale:
        problem += f", at a loss scale of {float(loss_scale.scale):g}"
        advice = FLOAT16_OVERFLOWS
    last = f"The last good checkpoint is that of step {saved[-1]}" if saved else "No checkpoint had been written yet"
    return f"Step {step}: {problem}.{examples} {last}; nothing of this step was saved. {advice}"


def describe_examples(origins: Sequence[str], most: int = 16) -> str:
    """Returns a sentence that names the examples of a step by file and lines; '' if there are none.

    Args:
        origins: Origins such as `support.jsonl:17`.
        most: Largest number of origins that are named.
    """
    if not origins:
        return ""
    lines: dict[str, list[str]] = {}
    for origin in origins[:most]:
        file, _, line = origin.rpartition(":")
        lines.setdefault(file, []).append(line)
    named = "; ".join(f"{file}:{','.join(numbers)}" if file else ", ".join(numbers) for file, numbers in lines.items())
    more = f" and {len(origins) - most} more" if len(origins) > most else ""
    return f" Its examples: {named}{more}."
