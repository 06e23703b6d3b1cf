"""Predicts what a search will cost before it starts: trials, minutes, compilations and memory."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, ModelError
from gemma_tune.planning.hardware import HARDWARE, THIS_CPU, Hardware, find_hardware
from gemma_tune.tuning.memory import planned_bytes
from gemma_tune.tuning.runner.shared_programs import NUMBERS, program_config
from gemma_tune.tuning.runner.trial_runner import TrialRunner
from gemma_tune.tuning.search import Search

_TARGET_SHARE = 0.6  # As in `plan`.
_FORWARD_SHARE = 1 / 3  # FLOPs of a forward pass, of a training step.
_MOST_PROGRAMS = 64


class SearchForecast(NamedTuple):
    """What a search will cost by plan.

    Attributes:
        num_trials: Number of trials; by a time budget, as many whole trials as it has room for.
        num_steps: Number of steps of a whole trial.
        seconds_per_trial: Duration of a whole trial of the base config; 0: unknown.
        seconds: Duration of all trials if none is pruned; 0: unknown.
        pruned_seconds: The same with pruning, if each rung lets its share of the trials go on.
        num_programs: Number of programs that the space's choices need.
        memory_bytes: Least and most bytes that a trial takes; 0: unknown.
        memory_limit: Bytes that a trial may take.
        num_side_by_side: Number of trials that are trained at once.
    """

    num_trials: int
    num_steps: int
    seconds_per_trial: float
    seconds: float
    pruned_seconds: float
    num_programs: int
    memory_bytes: tuple[float, float]
    memory_limit: float
    num_side_by_side: int


def forecast_search(search: Search, runner: TrialRunner) -> SearchForecast:
    """Returns what a search will cost by plan.

    Args:
        search: From `tuning.start.prepare`.
        runner: From the same.
    """
    settings = search.settings
    num_steps = runner.num_steps(search.base)
    per_trial = _planned_seconds(search, num_steps, runner.num_heldout_batches(search.base))
    num_trials = settings.budget.num_trials
    if not num_trials:
        num_trials = max(1, int(settings.budget.seconds * settings.num_at_once / per_trial)) if per_trial else 0
    seconds = per_trial * math.ceil(num_trials / settings.num_workers)
    # Of all steps that are left if pruning ends all that fall behind.
    share = share_above(search.first_rung, num_steps, settings.reduction_factor) if settings.prunes else 1.0
    programs = _programs(search)
    sizes = [planned_bytes(config) for config in programs]
    return SearchForecast(
        num_trials=num_trials,
        num_steps=num_steps,
        seconds_per_trial=per_trial,
        seconds=seconds,
        pruned_seconds=seconds * share,
        num_programs=len(programs),
        memory_bytes=(min(sizes), max(sizes)),
        memory_limit=settings.memory_limit,
        num_side_by_side=settings.num_side_by_side,
    )


def _programs(search: Search) -> list[Config]:
    """Returns the settings that shape the programs of the space: one for each combination of choices."""
    shaping = [setting for setting in search.space.settings if setting.path not in NUMBERS]
    found: dict[Config, None] = {}
    corners = itertools.product(*([(setting.path, value) for value in setting.extremes] for setting in shaping))
    for corner in itertools.islice(corners, _MOST_PROGRAMS):
        found[program_config(search.config_of(dict(corner), 0))] = None
    return list(found)


def _planned_seconds(search: Search, num_steps: int, num_heldout_batches: int) -> float:
    """Returns the duration of a whole trial by plan: its steps, and its evaluations; 0: unknown."""
    from gemma_tune.planning.abstract_train_state import abstract_train_state
    from gemma_tune.planning.duration import planned_step
    from gemma_tune.planning.plan import mesh_shape

    config, hardware = search.config_of({}, 0), _this_hardware()
    if hardware is None:
        return 0.0
    try:
        shape = mesh_shape(config.training.mesh, 0, config.training.batch_size)
        step = planned_step(abstract_train_state(config, shape, _TARGET_SHARE), hardware)
    except (ConfigError, ModelError):
        return 0.0
    every = config.training.eval_every_steps or num_steps
    num_evaluations = 1 + math.ceil(num_steps / every)
    return step.seconds * (num_steps + num_evaluations * num_heldout_batches * _FORWARD_SHARE)


def _this_hardware() -> Hardware | None:
    """Returns the published or measured rates of the first device; None if they are unknown."""
    from gemma_tune.runtime.backend import jax

    if jax.default_backend() == "cpu":
        return find_hardware(THIS_CPU)
    kind = jax.devices()[0].device_kind.lower().replace(" ", "")
    names = {"v5lite": "v5e", "v6lite": "v6e", "a100-sxm4-80gb": "a100-80gb"} | {name: name for name in HARDWARE}
    matches = [known for name, known in names.items() if name in kind]
    return HARDWARE[max(matches, key=len)] if matches else None


def share_above(rung: int, num_steps: int, factor: int) -> float:
    """Returns the share of all steps that is left if each rung lets one trial in `factor` go on.

    Args:
        rung: Step of the first rung; each further one is at `factor` times the step.
        num_steps: Number of steps of a whole trial.
        factor: Number of trials that reach a rung for each one that goes on.
    """
    done, share, going_on = 0, 0.0, 1.0
    while done < num_steps:
        until = min(rung, num_steps)
        share += going_on * (until - done) / num_steps
        done, rung, going_on = until, rung * factor, going_on / factor
    return share


def describe_space(search: Search) -> Sequence[tuple[str, str, str, bool]]:
    """Returns path, values, first value, and whether other values need a program of their own, for each setting."""
    first = search.space.first_values(search.base)
    rows = []
    for setting in search.space.settings:
        if setting.choices:
            values = ", ".join(map(str, setting.choices))
        else:
            values = f"{setting.low:g} to {setting.high:g}" + (", logarithmic" if setting.log else "")
            values += f", in steps of {setting.step:g}" if setting.step else ""
        when = " and ".join(f"{path} is {' or '.join(map(str, wanted))}" for path, wanted in setting.when)
        now = first.get(setting.path)
        rows.append((
            setting.path,
            values + (f" (if {when})" if when else ""),
            "–" if now is None else f"{now:.4g}" if isinstance(now, float) else str(now),
            setting.path not in NUMBERS,
        ))  # fmt: skip
    return rows
