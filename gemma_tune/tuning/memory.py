"""Predicts the memory of trials by plan, without weights."""

import functools
from typing import Any

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, ModelError

_TARGET_SHARE = 1.0  # Share of positions with a loss; all of them is the most that a trial can take.
_MOST_SIDE_BY_SIDE = 8


def planned_bytes(config: Config) -> float:
    """Returns the bytes that a training step takes on each device by plan; 0 if the model's sizes are unknown."""
    memory = _planned(config)
    return memory.total if memory else 0.0


def planned_side_by_side(config: Config, memory_limit: float) -> int:
    """Returns how many trials are trained at once by plan: 1 on a CPU, which has no idle arithmetic, else what fits.

    Args:
        config: Settings of a trial.
        memory_limit: Bytes that all of them may take together.
    """
    from gemma_tune.runtime.backend import jax
    from gemma_tune.tuning.runner.side_by_side import num_side_by_side

    memory = _planned(config)
    if jax.default_backend() == "cpu" or not memory:
        return 1
    return min(_MOST_SIDE_BY_SIDE, num_side_by_side(memory_limit, memory.weights, memory.total))


def _planned(config: Config) -> Any:
    from gemma_tune.tuning.runner.shared_programs import program_config

    return _planned_program(program_config(config))


@functools.lru_cache(maxsize=256)
def _planned_program(config: Config) -> Any:
    """Returns the planned memory of a program; None if it is unknown."""
    from gemma_tune.planning.abstract_train_state import abstract_train_state
    from gemma_tune.planning.plan import mesh_shape
    from gemma_tune.planning.step_memory import planned_memory

    try:
        shape = mesh_shape(config.training.mesh, 0, config.training.batch_size)
        return planned_memory(abstract_train_state(config, shape, _TARGET_SHARE))
    except (ConfigError, ModelError):  # A plan can't read an adapter, nor a model that isn't published.
        return None
