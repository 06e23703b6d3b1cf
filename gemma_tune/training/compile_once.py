"""Compiles a step once, and says when it has to be done again."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gemma_tune.process_memory import give_back_memory


class StepMemory(NamedTuple):
    """What a compiled step takes, in bytes, as XLA counts it.

    argument_bytes: Weights, optimizer state and the batch. temporary_bytes: What is held while computing.
        total_bytes: Both, and outputs that reuse no argument.
    """

    argument_bytes: int
    temporary_bytes: int
    total_bytes: int


class OncePerShape:
    """Makes something anew for inputs of other shapes, and keeps it.

    The second time comes with a RuntimeWarning: compiling takes longer than many steps, and batches are meant to be all
    alike.

    Args:
        name: Of what is made, for the warning.
        make: Called with the inputs; the last is the batch.
    """

    def __init__(self, name: str, make: Callable):
        self._name, self._make = name, make
        self._made: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._made)

    def __call__(self, *inputs: Any) -> Any:
        """Returns what was made for inputs of these shapes."""
        leaves, tree = jax.tree.flatten(inputs)
        shapes = f"{tree} {[(leaf.dtype.name, leaf.shape) for leaf in leaves]}"
        if shapes not in self._made:
            if self._made:
                batch = ", ".join(sorted({f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(inputs[-1])}))
                message = f"{self._name} is compiled for the {len(self._made) + 1}. time, for a batch of {batch}."
                warnings.warn(message, RuntimeWarning, stacklevel=4)
            self._made[shapes] = self._make(*inputs)
            give_back_memory()
        return self._made[shapes]


def memory_of(program: Any) -> StepMemory:
    """Returns what a compiled program takes."""
    analysis = program.memory_analysis()
    argument, temporary = int(analysis.argument_size_in_bytes), int(analysis.temp_size_in_bytes)
    fresh = int(analysis.output_size_in_bytes) - int(analysis.alias_size_in_bytes)
    return StepMemory(argument, temporary, argument + temporary + max(fresh, 0))


class CompiledOnce:
    """A function compiled at its first call, for the shapes of that call.

    Args:
        function: Pure; its last argument is the batch.
        **arguments: Of jax.jit.
    """

    def __init__(self, function: Callable, **arguments: Any):
        self._jitted = jax.jit(function, **arguments)
        self._programs = OncePerShape(function.__name__, lambda *inputs: self._jitted.lower(*inputs).compile())
        self._latest: Callable | None = None

    def __call__(self, *inputs: Any) -> Any:
        """Runs the function."""
        if self._latest is not None:
            try:
                return self._latest(*inputs)
            except TypeError:  # Other shapes than it was compiled for. Checked before anything is run.
                pass
        self._latest = self._programs(*inputs)
        return self._latest(*inputs)

    def memory(self, *inputs: Any) -> StepMemory:
        """Returns what a call takes, without running it. Takes shapes too."""
        return memory_of(self._programs(*inputs))

    @property
    def num_programs(self) -> int:
        """How many times it was compiled."""
        return len(self._programs)
