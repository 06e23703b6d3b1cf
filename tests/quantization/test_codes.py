"""Tests of quantizing and dequantizing: the definitions, bounds that hold for every value, and published tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gemma_tune.quantization.codes import (
    NF4_LEVELS,
    dequantize,
    fake_quantize,
    quantize,
    quantized_num_bytes,
    quantized_shapes,
    slice_rows,
    take_rows,
)
from gemma_tune.quantization.spec import BLOCK_SIZES, QuantSpec, block_size_problem
from gemma_tune.runtime.backend import keras

QUANT_SPECS = [
    QuantSpec("int8"),
    *(QuantSpec(scheme, 64, double) for scheme in ("int4", "nf4") for double in (False, True)),
]
SHAPES = [(1, 128, 24), (4, 64, 8), (10, 192, 1)]


def weights(rng, shape):
    """Channels of very different sizes, as in a trained model, one of them zero and one of a single sign."""
    values = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1, shape[2])))
    values[0, :64] = np.abs(values[0, :64])
    values[-1, -64:] = 0
    return values.astype(np.float32)


def test_nf4_levels_are_quantiles():
    """The construction of QLoRA's appendix E: 8 quantiles above and 7 below zero, and zero, divided by the largest."""
    outermost = 1 - (1 / (2 * 15) + 1 / (2 * 16)) / 2
    above = scipy.stats.norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0], below])) / above.max()
    np.testing.assert_allclose(NF4_LEVELS, levels, atol=1e-6)


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_half_a_step(rng, quant_spec, shape):
    values = weights(rng, shape)
    error = np.abs(dequantize(quantize(values, quant_spec)) - values)
    groups = (
        shape[0],
        1 if quant_spec.scheme == "int8" else -1,
        shape[1] if quant_spec.scheme == "int8" else 64,
        shape[2],
    )
    grouped, error = values.reshape(groups), error.reshape(groups)
    largest = np.abs(grouped).max(2, keepdims=True)
    if quant_spec.scheme == "int8":
        bound = largest / 127 / 2
    elif quant_spec.scheme == "nf4":
        bound = largest * np.diff(NF4_LEVELS).max() / 2
    else:
        # The zero is rounded to a code, which can push the outermost value out by half a step more.
        bound = (np.maximum(grouped.max(2, keepdims=True), 0) - np.minimum(grouped.min(2, keepdims=True), 0)) / 15
    if quant_spec.double:
        # A scale is off by half of a 255th of the range of all scales, at most, and a value by 15 times that.
        bound = bound + 15 / 255 * largest.max()
    assert (error <= bound * 1.00001).all()
    if not quant_spec.double:
        assert not error[np.broadcast_to(largest == 0, error.shape)].any()


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_numpy_and_jax_agree(rng, quant_spec):
    """Code by code, so that a model that JAX trained with rounded weights is converted by NumPy to the same."""
    values = weights(rng, (4, 128, 64))
    ours, theirs = quantize(values, quant_spec), jax.jit(lambda x: quantize(x, quant_spec))(values)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)
    back = jax.jit(dequantize)(ours)
    np.testing.assert_allclose(back, dequantize(ours), rtol=1e-6, atol=1e-7)


def test_int8_is_keras_s(rng):
    """So that a Keras user finds the codes of `quantize("int8")`: it adds 1e-7 to the largest magnitude."""
    values = weights(rng, (4, 128, 16))
    codes, scale = keras.quantizers.abs_max_quantize(values, axis=1, to_numpy=True)
    ours = quantize(values, QuantSpec("int8"))
    np.testing.assert_array_equal(ours.codes, np.asarray(codes))
    np.testing.assert_allclose(ours.scales.values[:, 0], 1 / np.asarray(scale), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_smaller_groups_and_four_bits_of_a_normal_distribution(rng, scheme):
    """Smaller groups cost bytes and save error; eight bits have less error than four."""
    values = rng.normal(size=(1, 1024, 64)).astype(np.float32)
    errors, sizes = [], []
    for block_size in BLOCK_SIZES:
        quant_spec = QuantSpec(scheme, block_size)
        quantized = quantize(values, quant_spec)
        errors.append(np.square(dequantize(quantized) - values).mean())
        sizes.append(quantized_num_bytes(quantized) / values.nbytes)
    assert errors == sorted(errors) and sizes == sorted(sizes, reverse=True)
    int8 = dequantize(quantize(values, QuantSpec("int8")))
    assert np.square(int8 - values).mean() < errors[0] / 20


def test_nf4_is_for_normal_weights(rng):
    """There it is as good as int4, which keeps a zero for each group besides; in groups that are spread evenly it is
    worse.
    """
    normal, even = rng.normal(size=(1, 4096, 64)), rng.uniform(-1, 1, size=(1, 4096, 64))
    for values, least, most in ((normal, 0.9, 1.05), (even, 1.3, 3.0)):
        values = values.astype(np.float32)
        nf4, int4 = (np.square(dequantize(quantize(values, QuantSpec(s))) - values).mean() for s in ("nf4", "int4"))
        assert least < nf4 / int4 < most


@pytest.mark.parametrize(
    ("scheme", "bits", "double_bits"),
    # Codes, and for a group of 64: a scale of 32 bits or 8 and a 256th of two more of 32, and int4's zero of 8.
    [("int4", 4 + 40 / 64, 4 + (16 + 64 / 256) / 64), ("nf4", 4 + 32 / 64, 4 + (8 + 64 / 256) / 64)],
)
def test_bytes(rng, scheme, bits, double_bits):
    values = rng.normal(size=(1, 1024, 512)).astype(np.float32)
    for quant_spec, wanted in ((QuantSpec(scheme), bits), (QuantSpec(scheme, double=True), double_bits)):
        assert quantized_num_bytes(quantize(values, quant_spec)) == values.size * wanted / 8


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_straight_through(rng, quant_spec):
    """Forward what converting gives, backward as if nothing had been rounded."""
    values = jnp.asarray(weights(rng, (4, 64, 8)))
    slope = jnp.sin(jnp.arange(values.size, dtype=jnp.float32)).reshape(values.shape)
    rounded = dequantize(quantize(values, quant_spec))
    np.testing.assert_allclose(fake_quantize(values, quant_spec), rounded, rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(fake_quantize(x, quant_spec) * slope))(values)
    np.testing.assert_array_equal(gradient, slope)
    assert not np.allclose(jax.grad(lambda x: jnp.sum(dequantize(quantize(x, quant_spec)) * slope))(values), slope)


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
@pytest.mark.parametrize(("start", "count"), [(0, 512), (256, 256), (512, 88)])
def test_some_rows_are_those_of_all(rng, quant_spec, start, count):
    """A vocabulary of 600 in blocks, the last of them shorter, and rows by their indices."""
    quantized = jax.tree.map(jnp.asarray, quantize(weights(rng, (600, 192, 1)), quant_spec))
    whole = np.asarray(dequantize(quantized))
    some = jax.jit(lambda q, start: dequantize(slice_rows(q, start, count)))(quantized, start)
    np.testing.assert_allclose(some, whole[start : start + count], rtol=1e-6)
    indices = rng.integers(0, 600, 30)
    np.testing.assert_allclose(take_rows(quantized, jnp.asarray(indices)), whole[indices], rtol=1e-6)


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_shapes(rng, quant_spec):
    quantized, shapes = quantize(weights(rng, (4, 128, 16)), quant_spec), quantized_shapes((4, 128, 16), quant_spec)
    described = [jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), tree) for tree in (quantized, shapes)]
    assert described[0] == described[1]


def test_block_sizes_that_do_not_fit():
    assert "does not divide its 640" in block_size_problem(QuantSpec("int4", 256), 640)
    assert not block_size_problem(QuantSpec("int4", 128), 640) and not block_size_problem(QuantSpec("int8", 256), 640)
