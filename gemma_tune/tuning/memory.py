"""Predicts the memory of a trial by plan, without weights."""

import functools

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, ModelError

_TARGET_SHARE = 1.0  # Share of positions with a loss; all of them is the most that a trial can take.


def planned_bytes(config: Config) -> float:
    """Returns the bytes that a training step takes on each device by plan; 0 if the model's sizes are unknown."""
    same = Config()  # Settings that are inputs of the compiled program don't change its memory.
    return _bytes_of_shapes(
        config.replace(
            {
                "workdir": same.workdir,
                "optimizer.learning_rate": same.optimizer.learning_rate,
                "optimizer.schedule": same.optimizer.schedule,
                "optimizer.warmup_steps": same.optimizer.warmup_steps,
                "optimizer.weight_decay": same.optimizer.weight_decay,
            }
        )
    )


@functools.lru_cache(maxsize=256)
def _bytes_of_shapes(config: Config) -> float:
    from gemma_tune.planning.abstract_train_state import abstract_train_state
    from gemma_tune.planning.plan import mesh_shape
    from gemma_tune.planning.step_memory import planned_memory

    try:
        shape = mesh_shape(config.training.mesh, 0, config.training.batch_size)
        return planned_memory(abstract_train_state(config, shape, _TARGET_SHARE)).total
    except (ConfigError, ModelError):  # A plan can't read an adapter, nor a model that isn't published.
        return 0.0
