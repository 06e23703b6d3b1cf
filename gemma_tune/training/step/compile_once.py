"""Compiles a step at its first call, and warns when it has to be compiled again."""

import concurrent.futures
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gemma_tune.runtime.ordinals import ordinal
from gemma_tune.runtime.process_memory import keep_freed_memory, release_freed_memory


class StepMemory(NamedTuple):
    """Memory that a compiled step takes, in bytes, as XLA counts it.

    Attributes:
        argument_bytes: Bytes of weights, optimizer state and batch.
        temporary_bytes: Bytes that are held while computing.
        total_bytes: Sum of both, and of outputs that reuse no argument's buffer.
    """

    argument_bytes: int
    temporary_bytes: int
    total_bytes: int


class OncePerShape:
    """Makes something for each shape of batch, once.

    From the second shape on it warns: compiling takes longer than many steps, and all batches of a run should have the
    same shape.

    Args:
        name: Name for the warning.
        make: Function that is called with the inputs; the last one is the batch, which alone may change its shape.
        warns: Whether there is a warning.
        keeps_memory: Whether the process should keep, on CPU, the memory that a run of what is made frees, because it
            will run many times.
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
                warnings.warn(
                    f"{self._name} is being recompiled ({ordinal(len(self._made) + 1)} time): a batch of another shape "
                    f"came, {batch}.",
                    RuntimeWarning,
                    stacklevel=4,
                )
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
    """Returns the memory that a compiled program takes."""
    analysis = program.memory_analysis()
    argument, temporary = int(analysis.argument_size_in_bytes), int(analysis.temp_size_in_bytes)
    fresh = int(analysis.output_size_in_bytes) - int(analysis.alias_size_in_bytes)
    return StepMemory(argument, temporary, argument + temporary + max(fresh, 0))


def tree_num_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays, or shapes, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class CompiledOnce:
    """A function that is compiled at its first call, for the shapes of that call.

    Args:
        function: Pure function; its last argument is the batch, which alone may change its shape.
        name: Name for the warning; by default the function's.
        out_shardings: Function of the inputs that returns the shardings of the outputs; None leaves them to XLA.
        donate_argnums: Arguments whose buffers the outputs may reuse, as in `jax.jit`.
    """

    def __init__(
        self,
        function: Callable,
        *,
        name: str = "",
        out_shardings: Callable[..., Any] | None = None,
        donate_argnums: int | tuple[int, ...] = (),
    ):
        def compiled(*inputs: Any) -> Any:
            on_mesh = {"out_shardings": out_shardings(*inputs)} if out_shardings else {}
            return jax.jit(function, donate_argnums=donate_argnums, **on_mesh).lower(*inputs).compile()

        self._programs = OncePerShape(name or function.__name__, compiled)

    def __call__(self, *inputs: Any) -> Any:
        """Runs the function."""
        return self._programs(*inputs)(*inputs)

    def memory(self, *inputs: Any) -> StepMemory:
        """Returns the memory that a call takes, without running it. Takes shapes too."""
        return memory_of(self.program(*inputs))

    def program(self, *inputs: Any) -> Any:
        """Returns the compiled program of a call. Takes shapes too."""
        return self._programs(*inputs)

    @property
    def num_programs(self) -> int:
        """Number of times it was compiled."""
        return len(self._programs)
