"""Builds KerasHub models without initial weights, and fills their variables one by one.

KerasHub first makes random weights and then replaces them, and its converters hold a tensor in several copies at once:
3.4 GB for a model of 1.07 GB. Here no random weight is ever made, and each array goes from its file straight into
memory that JAX then uses without a copy (on CPU), so that loading peaks at the model's size plus one tensor.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.quantized.layers import QuantizedKernel
from gemma_tune.models.sharding.placement import local_rows, put_sharded
from gemma_tune.runtime.backend import keras

_ALIGNMENT = 64  # What XLA on CPU asks of memory that it takes over as it is.
_CHUNK_BYTES = 4 << 20  # Stays in the cache while it is made and copied.


@contextlib.contextmanager
def lazy_initialization() -> Iterator[None]:
    """Within it, new Keras variables get a shape and a dtype but no value. Fill each before use."""
    from keras.src.backend.common import global_state

    pending = list(global_state.get_global_attribute("uninitialized_variables") or [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Keras would give the variables random values when the next scope ends.
        global_state.set_global_attribute("uninitialized_variables", pending)


def check_filled(model: keras.Model) -> None:
    """Raises ModelError when a variable got no value."""
    empty = [variable.path for variable in model.variables if variable._value is None]
    if empty:
        raise ModelError(
            f"The checkpoint has no values for {len(empty)} of the model's variables: {', '.join(empty[:5])}."
        )


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized array that JAX on CPU can use without copying it."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def fill(variable: keras.Variable, read_rows: Callable[[int, int], np.ndarray]) -> None:
    """Gives a variable its value, some rows at a time, so that no second copy of a large array exists.

    Args:
        variable: Of any shape; its first axis is cut into pieces.
        read_rows: Called with (start, stop) of the first axis; returns these rows in any float dtype.
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
    step -= step % 64 if step > 64 else 0  # Readers like even numbers of rows.
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
    """Gives a variable a value that is at hand as a whole."""
    if tuple(variable.shape) != values.shape:
        raise ModelError(
            f"{variable.path} has shape {tuple(variable.shape)}, but the checkpoint's tensor has {values.shape}."
        )
    fill(variable, lambda start, stop: values[start:stop] if values.ndim else values)
