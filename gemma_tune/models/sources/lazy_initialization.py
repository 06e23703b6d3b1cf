"""Builds KerasHub models without initial weights (lazy initialization), and fills their variables one by one.

KerasHub first makes random weights and then replaces them, and its converters hold several copies of a tensor at once:
3.4 GB for a model of 1.07 GB. Here no random weights are made, and each array goes from its file straight into memory
that JAX on a CPU uses without a copy, so that loading peaks at the model's size plus one tensor.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.quantized.layers import QuantizedKernel
from gemma_tune.models.sharding.placement import local_rows, put_sharded
from gemma_tune.runtime.backend import keras

_ALIGNMENT = 64  # Bytes. XLA on a CPU copies arrays with a smaller alignment.
_CHUNK_BYTES = 4 << 20  # Fits into the CPU's cache while it is made and copied.


@contextlib.contextmanager
def lazy_initialization() -> Iterator[None]:
    """Gives variables that are made in the block a shape and a dtype, but no value. Fill each before its first use."""
    from keras.src.backend.common import global_state

    pending = list(global_state.get_global_attribute("uninitialized_variables") or [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Otherwise Keras gives the variables random values when the next scope ends.
        global_state.set_global_attribute("uninitialized_variables", pending)


def check_filled(model: keras.Model) -> None:
    """Raises ModelError if a variable of a model has no value yet."""
    empty = [variable.path for variable in model.variables if variable._value is None]
    if empty:
        raise ModelError(
            f"The checkpoint has no values for {len(empty)} of the model's variables: {', '.join(empty[:5])}."
        )


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized array that JAX on a CPU can use without copying it."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def fill(variable: keras.Variable, read_rows: Callable[[int, int], np.ndarray]) -> None:
    """Gives a variable its value, some rows at a time, so that there is no second copy of a large array.

    Args:
        variable: Keras variable, or the stand-in of a quantized one, of any shape. Its rows are along its first axis.
        read_rows: Function that takes (start, stop) and returns these rows in any float dtype.

    Raises:
        ModelError: The rows have another shape than the variable's.
    """
    if isinstance(variable, QuantizedKernel):
        variable.fill(read_rows)
        return
    dtype = np.dtype(variable.dtype)  # Also knows bfloat16, which ml_dtypes registers.
    shape, sharding = tuple(variable.shape), variable._layout
    values = aligned_empty(shape, dtype)
    first_row, num_rows = local_rows(shape, sharding)
    row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * 4)
    step = max(1, _CHUNK_BYTES // row_bytes)
    step -= step % 64 if step > 64 else 0  # Readers are faster with round numbers of rows.
    for start in range(first_row, num_rows, step):
        stop = min(start + step, num_rows)
        rows = read_rows(start, stop)
        if rows.shape != (stop - start, *shape[1:]):
            raise ModelError(f"{variable.path} has shape {shape}, but the checkpoint's rows have {rows.shape[1:]}.")
        values[start:stop] = rows
    if not shape:
        values[...] = read_rows(0, 1).reshape(())
    variable.assign(put_sharded(values, sharding))


def fill_whole(variable: keras.Variable, values: np.ndarray) -> None:
    """Gives a variable its value from a whole array.

    Raises:
        ModelError: The array has another shape than the variable.
    """
    if tuple(variable.shape) != values.shape:
        raise ModelError(
            f"{variable.path} has shape {tuple(variable.shape)}, but the checkpoint's tensor has {values.shape}."
        )
    fill(variable, lambda start, stop: values[start:stop] if values.ndim else values)
