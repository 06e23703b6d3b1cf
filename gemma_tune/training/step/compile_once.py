"""Compiles a step once, and says when it has to be done again."""

import concurrent.futures
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gemma_tune.runtime.process_memory import keep_freed_memory, release_freed_memory


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
        make: Called with the inputs; the last is the batch, which alone may have other shapes.
        warns: Whether there is a warning.
        keeps_memory: What is made runs many times, so that the process is to keep, on CPU, the memory that a run frees.
    """

    def __init__(self, name: str, make: Callable, *, warns: bool = True, keeps_memory: bool = False):
        self._name, self._make, self._warns, self._keeps_memory = name, make, warns, keeps_memory
        self._made: dict[tuple, Any] = {}

    def __len__(self) -> int:
        return len(self._made)

    def __call__(self, *inputs: Any) -> Any:
        """Returns what was made for inputs of these shapes."""
        shapes = tuple((str(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(inputs[-1]))
        if shapes not in self._made:
            if self._made and self._warns:
                batch = ", ".join(sorted({f"{dtype}{list(shape)}" for dtype, shape in shapes}))
                message = f"{self._name} is compiled for the {len(self._made) + 1}. time, for a batch of {batch}."
                warnings.warn(message, RuntimeWarning, stacklevel=4)
            self._made[shapes] = self._make(*inputs)
            release_freed_memory()
            if self._keeps_memory and jax.default_backend() == "cpu":
                keep_freed_memory()
        return self._made[shapes]


def compile_all(traced: Any) -> Any:
    """Compiles a tree of what `jax.jit(…).trace` returned, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = jax.tree.map(lambda one: pool.submit(one.lower().compile), traced)
        return jax.tree.map(lambda one: one.result(), waiting)


def memory_of(program: Any) -> StepMemory:
    """Returns what a compiled program takes."""
    analysis = program.memory_analysis()
    argument, temporary = int(analysis.argument_size_in_bytes), int(analysis.temp_size_in_bytes)
    fresh = int(analysis.output_size_in_bytes) - int(analysis.alias_size_in_bytes)
    return StepMemory(argument, temporary, argument + temporary + max(fresh, 0))


def num_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays, or shapes, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class CompiledOnce:
    """A function compiled at its first call, for the shapes of that call.

    Args:
        function: Pure; its last argument is the batch, which alone may have other shapes from call to call.
        name: For the warning; by default the function's.
        places: inputs -> where on a mesh the outputs are to be; None: wherever.
        **arguments: Of jax.jit.
    """

    def __init__(
        self, function: Callable, *, name: str = "", places: Callable[..., Any] | None = None, **arguments: Any
    ):
        def compiled(*inputs: Any) -> Any:
            on_mesh = {"out_shardings": places(*inputs)} if places else {}
            return jax.jit(function, **arguments, **on_mesh).lower(*inputs).compile()

        self._programs = OncePerShape(name or function.__name__, compiled)

    def __call__(self, *inputs: Any) -> Any:
        """Runs the function."""
        return self._programs(*inputs)(*inputs)

    def memory(self, *inputs: Any) -> StepMemory:
        """Returns what a call takes, without running it. Takes shapes too."""
        return memory_of(self.program(*inputs))

    def program(self, *inputs: Any) -> Any:
        """Returns the compiled program of a call. Takes shapes too."""
        return self._programs(*inputs)

    @property
    def num_programs(self) -> int:
        """How many times it was compiled."""
        return len(self._programs)
