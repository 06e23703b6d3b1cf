"""Predicts the memory of a run from its compiled training step, and finds settings that need less."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from gemma_tune.config import Config
from gemma_tune.pipeline import Setup
from gemma_tune.training.step.compile_once import StepMemory


class Proposal(NamedTuple):
    """Changed settings, and the memory of a run with them.

    Attributes:
        changes: Values by the path of the setting.
        memory: Memory of a training step.
    """

    changes: dict[str, Any]
    memory: StepMemory

    def flags(self) -> str:
        """Returns the changes as they are written on the command line."""
        return " ".join(f"--config.{path}={value}" for path, value in self.changes.items())


def step_memory(setup: Setup) -> StepMemory:
    """Compiles the training step and returns its memory. Nothing is run."""
    batch = setup.on_devices(setup.batches)[0]
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if setup.sharding else None),
        (setup.state, setup.frozen, batch),
    )
    return setup.train_step.memory(*shapes)


def leaner(config: Config) -> Iterator[dict[str, Any]]:
    """Yields changed settings with which a run needs less memory, those that cost the least time first."""
    training = config.training
    accumulate = {"training.grad_accum_steps": training.batch_size}
    remat = {"training.remat": "full"}
    can_accumulate = training.grad_accum_steps < training.batch_size
    if can_accumulate:
        yield accumulate
    if training.remat != "full":
        yield remat
        if can_accumulate:
            yield accumulate | remat
    if training.method == "full":
        yield {"training.method": "lora"} | remat | (accumulate if can_accumulate else {})
