"""Fake quantization gives what conversion gives, bit for bit, whole or by rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tune.quantization.codes import dequantize, fake_quantize, quantize
from gemma_tune.quantization.fake import FakeQuantized
from gemma_tune.quantization.spec import QuantSpec

QUANT_SPECS = [QuantSpec("int8"), QuantSpec("int4", 32), QuantSpec("int4", 64), QuantSpec("nf4", 32)]


def weights(rng, shape):
    """Groups of very different sizes, some of zeros, some of a single sign, and values halfway between codes."""
    values = (rng.normal(size=shape) * np.exp(2 * rng.normal(size=(shape[0], 1, shape[2])))).astype(np.float32)
    values[0, :64] = np.abs(values[0, :64])
    values[-1, -64:] = 0
    values[:, 32:64, 0] = np.append(np.linspace(-8, 7, 31), 0)
    return values


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
@pytest.mark.parametrize("shape", [(1, 640, 256), (4, 128, 96), (512, 640, 1)])
def test_it_is_the_conversion_bit_for_bit(rng, quant_spec, shape):
    """XLA, in one compiled program, against NumPy, which converts: no value may go to another code."""
    values = weights(rng, shape)
    wanted = dequantize(quantize(values, quant_spec))
    np.testing.assert_array_equal(jax.jit(lambda x: fake_quantize(x, quant_spec))(values), wanted)
    assert not np.array_equal(wanted, values)


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_bfloat16_is_rounded_in_float32(rng, quant_spec):
    values = jnp.asarray(weights(rng, (2, 128, 32)), jnp.bfloat16)
    wanted = dequantize(quantize(np.asarray(values, np.float32), quant_spec), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(fake_quantize(values, quant_spec)), np.asarray(wanted))


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_rows_are_those_of_the_whole(rng, quant_spec):
    values = weights(rng, (90, 128, 1))
    whole = dequantize(quantize(values, quant_spec))[..., 0]
    head = FakeQuantized(jnp.asarray(values[..., 0]), quant_spec)
    np.testing.assert_array_equal(jax.jit(lambda head, start: head.rows(start, 32))(head, 48), whole[48:80])
    indices = rng.integers(0, 90, 20)
    np.testing.assert_array_equal(head.take(jnp.asarray(indices)), whole[indices])


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_its_gradient_is_a_head_too(rng, quant_spec):
    """Gradients of the floats, straight through, with the same spec."""
    head = FakeQuantized(jnp.asarray(weights(rng, (40, 64, 1))[..., 0]), quant_spec)
    slope = jnp.asarray(rng.normal(size=(8, 64)), jnp.float32)
    gradient = jax.grad(lambda head: jnp.sum(head.rows(16, 8) * slope))(head)
    assert gradient.quant_spec == quant_spec
    np.testing.assert_array_equal(gradient.values[16:24], slope)
    assert not np.asarray(gradient.values[:16]).any() and not np.asarray(gradient.values[24:]).any()
