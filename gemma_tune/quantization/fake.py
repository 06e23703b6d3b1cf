"""An LM head of quantization-aware training: floats that the loss rounds as it reads them."""

import dataclasses
import functools

import jax
from jax import lax

from gemma_tune.quantization.codes import fake_quantize
from gemma_tune.quantization.spec import QuantSpec


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("quant_spec",))
@dataclasses.dataclass(frozen=True)
class FakeQuantized:
    """A trained embedding that is rounded where it is used, so that no second float copy is held.

    Attributes:
        values: [V, D] float rows.
        quant_spec: Quantization spec, without double quantization, in which rows share scales.
    """

    values: jax.Array
    quant_spec: QuantSpec

    def rows(self, start: jax.Array | int, count: int) -> jax.Array:
        """Returns consecutive rows [count, D], rounded, in float32."""
        return self._rounded(lax.dynamic_slice_in_dim(self.values, start, count))

    def take(self, indices: jax.Array) -> jax.Array:
        """Returns the rows [n, D] of indices [n], rounded, in float32."""
        return self._rounded(self.values[indices])

    def _rounded(self, rows: jax.Array) -> jax.Array:
        return fake_quantize(rows.astype("float32")[..., None], self.quant_spec)[..., 0]
