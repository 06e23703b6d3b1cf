"""SmoothQuant and integer products: against equation 4 and integers of Python's own kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rounding import correlated_inputs

from gemma_tune.errors import ConfigError, ModelError
from gemma_tune.quantization.codes import Quantized, quantize
from gemma_tune.quantization.smoothquant import dynamic_product, quantize_activations, smooth_scale
from gemma_tune.quantization.spec import QuantSpec

SHAPE = (2, 64, 8)


def with_outliers(rng, count=100):
    x = correlated_inputs(rng, count, SHAPE[1])
    x[:, rng.permutation(SHAPE[1])[:3]] *= 100
    return x


def product(x, values):
    return np.einsum("tc,pcq->tpq", np.asarray(x, np.float64), np.asarray(values, np.float64))


@pytest.mark.parametrize("alpha", [0, 0.5, 0.8, 1])
def test_equation_4(rng, alpha):
    values, largest = rng.normal(size=SHAPE).astype(np.float32), np.exp(rng.normal(size=SHAPE[1])).astype(np.float32)
    wanted = [largest[c] ** alpha / np.abs(values[:, c]).max() ** (1 - alpha) for c in range(SHAPE[1])]
    np.testing.assert_allclose(smooth_scale(values, largest, alpha), wanted, rtol=1e-5)


def test_before_rounding_the_product_is_the_same(rng):
    values, x = rng.normal(size=SHAPE).astype(np.float32), with_outliers(rng)
    scale = np.asarray(smooth_scale(values, np.abs(x).max(0)))
    smooth_x, smooth_values = x / scale, values * scale[:, None]
    wanted = product(x, values)
    np.testing.assert_allclose(product(smooth_x, smooth_values), wanted, atol=1e-6 * np.abs(wanted).max())
    # With alpha 1/2 both sides share the size of a channel equally.
    np.testing.assert_allclose(np.abs(smooth_x).max(0), np.abs(smooth_values).max((0, 2)), rtol=1e-5)


def test_inputs_without_a_size_keep_theirs(rng):
    values, largest = rng.normal(size=SHAPE).astype(np.float32), np.ones(SHAPE[1], np.float32)
    values[:, 3], largest[5] = 0, 0
    scale = smooth_scale(values, largest)
    assert scale[3] == scale[5] == 1 and np.isfinite(scale).all()


def test_activations_are_rounded_token_by_token(rng):
    x = with_outliers(rng).reshape(4, 25, SHAPE[1])
    x[1, 2] = 0
    codes, scale = jax.jit(quantize_activations)(x)
    assert codes.dtype == jnp.int8 and codes.shape == x.shape and scale.shape == (4, 25, 1)
    assert (np.abs(codes * scale - x) <= scale / 2 * 1.0001).all()
    largest = np.abs(np.asarray(codes, int)).max(-1)
    assert (np.delete(largest.ravel(), 27) == 127).all() and largest[1, 2] == 0
    alone = quantize_activations(x[2, 3])
    np.testing.assert_array_equal(alone[0], codes[2, 3])


def test_products_are_those_of_the_integers(rng):
    """As large as they can be, which sums of 8 or 16 bits would not hold."""
    x, values = np.full((1, 2048), 3.0, np.float32), np.full((1, 2048, 2), -5.0, np.float32)
    np.testing.assert_allclose(dynamic_product(x, quantize(values, QuantSpec("int8"))), 2048 * -15.0, rtol=1e-5)
    x, values = with_outliers(rng), rng.normal(size=SHAPE).astype(np.float32)
    kernel = quantize(values, QuantSpec("int8"))
    codes, scale = (np.asarray(part) for part in jax.jit(quantize_activations)(x))
    integers = np.einsum("tc,pcq->tpq", codes.astype(np.int64), kernel.codes.astype(np.int64))
    wanted = integers * scale.astype(np.float64)[..., None] * kernel.scales.values[:, 0, 0]
    ours = jax.jit(dynamic_product)(x.reshape(4, 25, -1), jax.tree.map(jnp.asarray, kernel))
    assert ours.shape == (4, 25, 2, 8) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours.reshape(wanted.shape), wanted, rtol=1e-5)


def test_smoothing_is_what_makes_integers_do(rng):
    values, x = rng.normal(size=SHAPE).astype(np.float32), with_outliers(rng)
    scale = np.asarray(smooth_scale(values, np.abs(x).max(0)))
    wanted, errors = product(x, values), []
    for inputs, weights in ((x, values), (x / scale, values * scale[:, None])):
        errors.append(np.square(dynamic_product(inputs, quantize(weights, QuantSpec("int8"))) - wanted).sum())
    assert errors[1] < 0.3 * errors[0]


def test_what_is_refused(rng):
    values = rng.normal(size=SHAPE).astype(np.float32)
    with pytest.raises(ConfigError, match=r"from 0 to 1, got 1\.5"):
        smooth_scale(values, np.ones(SHAPE[1]), 1.5)
    packed: Quantized = quantize(values, QuantSpec("nf4", 32))
    with pytest.raises(ModelError, match="need an int8 kernel, but its codes are uint8"):
        dynamic_product(np.ones((1, SHAPE[1])), packed)
