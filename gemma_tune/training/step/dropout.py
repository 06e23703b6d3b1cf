"""Puts a step's dropout in the place of the model's own, which is none."""

from typing import Any

from gemma_tune.models.functional import Params
from gemma_tune.models.lora.dropout import DropoutValues
from gemma_tune.training.state import TrainState


def with_dropout(frozen: Params, dropout: DropoutValues | None, state: TrainState, micro_batch: Any) -> Params:
    """Returns the frozen weights, with the rates and keys of a micro-batch if the model has dropout.

    Args:
        frozen: Frozen weights by path.
        dropout: From `make_dropout_values`.
        state: State before the step, with hyperparameters if there is dropout.
        micro_batch: Number of the micro-batch in the step.
    """
    if dropout is None:
        return frozen
    assert state.hyperparameters is not None, "the rate of the dropout is one of the hyperparameters"
    numbers = state.hyperparameters
    return {**frozen, **dropout(numbers.lora_dropout, numbers.seed, state.step, micro_batch)}
