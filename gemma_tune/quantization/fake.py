"""A float head that the loss rounds as it reads it: a trained embedding, quantization-aware."""

import dataclasses
import functools

import jax
from jax import lax

from gemma_tune.quantization.codes import fake_quantize
from gemma_tune.quantization.spec import QuantSpec


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("quant_spec",))
@dataclasses.dataclass(frozen=True)
class FakeQuantized:
    """Rows that count as rounded to a grid, and are rounded where they are used, so that no second float copy is held.

    values: [V, D]. quant_spec: Not with double quantization, which gives rows scales in common.
    """

    values: jax.Array
    quant_spec: QuantSpec

    def rows(self, start: jax.Array | int, count: int) -> jax.Array:
        """Returns [count, D] float32, rounded."""
        return self._rounded(lax.dynamic_slice_in_dim(self.values, start, count))

    def take(self, indices: jax.Array) -> jax.Array:
        """Returns [n, D] float32, rounded, for indices [n]."""
        return self._rounded(self.values[indices])

    def _rounded(self, rows: jax.Array) -> jax.Array:
        return fake_quantize(rows.astype("float32")[..., None], self.quant_spec)[..., 0]
