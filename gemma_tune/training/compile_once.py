"""Compiles a step once, and says when it has to be done again."""

import warnings
from collections.abc import Callable
from typing import Any

import jax

from gemma_tune.process_memory import give_back_memory


class CompiledOnce:
    """A function compiled at its first call, for the shapes of that call.

    Other shapes are compiled for too, with a RuntimeWarning: it takes longer than many steps, and batches are meant to
    be all alike.

    Args:
        function: Pure; its last argument is the batch.
        **arguments: Of jax.jit.
    """

    def __init__(self, function: Callable, **arguments: Any):
        self._name = function.__name__
        self._jitted = jax.jit(function, **arguments)
        self._programs: dict[str, Callable] = {}
        self._latest: Callable | None = None

    def __call__(self, *inputs: Any) -> Any:
        """Runs the function."""
        if self._latest is not None:
            try:
                return self._latest(*inputs)
            except TypeError:  # Other shapes than it was compiled for. Checked before anything is run.
                pass
        self._latest = self._program(inputs)
        return self._latest(*inputs)

    def lower(self, *inputs: Any) -> Any:
        """As of jax.jit: what `compile()` turns into a program. Takes shapes too."""
        return self._jitted.lower(*inputs)

    @property
    def num_programs(self) -> int:
        """How many times it was compiled."""
        return len(self._programs)

    def _program(self, inputs: tuple) -> Callable:
        leaves, tree = jax.tree.flatten(inputs)
        shapes = f"{tree} {[(leaf.dtype.name, leaf.shape) for leaf in leaves]}"
        if shapes not in self._programs:
            if self._programs:
                batch = ", ".join(sorted({f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(inputs[-1])}))
                message = f"{self._name} is compiled for the {len(self._programs) + 1}. time, for a batch of {batch}."
                warnings.warn(message, RuntimeWarning, stacklevel=3)
            self._programs[shapes] = self._jitted.lower(*inputs).compile()
            give_back_memory()
        return self._programs[shapes]
