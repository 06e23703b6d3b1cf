"""How much memory a run will take, from its compiled step, and what to change when that is too much."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from gemma_tune.config import Config
from gemma_tune.pipeline import Setup
from gemma_tune.training.step.compile_once import StepMemory


class Proposal(NamedTuple):
    """Settings to change, and the memory that the run then takes."""

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


def device_bytes() -> float:
    """Returns the memory that a run may take on the first device: its limit, or on CPU what is free now."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    import psutil

    return float(psutil.virtual_memory().available)


def leaner(config: Config) -> Iterator[dict[str, Any]]:
    """Yields changes of a config that make it need less memory, those that cost least first."""
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
