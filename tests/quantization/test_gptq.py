"""GPTQ: against the textbook's one input at a time with an explicit inverse, and what must hold for any inputs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rounding import as_matrix, correlated_inputs, nearest_code, step_of, value_of

from gemma_tune.errors import ConfigError, ModelError
from gemma_tune.quantization.codes import dequantize, quantize
from gemma_tune.quantization.gptq import gptq
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.quantization.statistics import observe, output_error

QUANT_SPECS = [
    QuantSpec("int8"),
    QuantSpec("int4", 32),
    QuantSpec("nf4", 32),
    QuantSpec("int4", 32, True),
    QuantSpec("nf4", 32, True),
]
SHAPE = (2, 128, 10)


def kernel(rng, shape=SHAPE):
    """Channels of different sizes, one of them zero."""
    values = rng.normal(size=shape) * np.exp(0.5 * rng.normal(size=(shape[0], 1, shape[2])))
    values[0, :, 0] = 0
    return values.astype(np.float32)


def scales_of(quantized):
    """[G, P·Q], by the definition of double quantization where it is used."""
    scales = quantized.scales
    values = np.asarray(scales.values, np.float64)
    if scales.step is not None:
        step, lowest = (np.repeat(np.asarray(part), 256)[: values.size].reshape(values.shape) for part in scales[1:])
        values = values * step + lowest
    return values[:, :, 0].transpose(1, 0, 2).reshape(values.shape[1], -1)


def textbook(values, hessian, quant_spec, damping, order, fixed):
    """Optimal brain quantization in a given order (arXiv:2210.17323, equations 2 and 3), in float64.

    Scales are those of the kernel as it was (`fixed`, a Quantized), or of a group when its first input comes.
    """
    weights, hessian = as_matrix(values).astype(np.float64), np.asarray(hessian, np.float64)
    inputs, columns = weights.shape
    inverse = np.linalg.inv(hessian + damping * np.diag(hessian).mean() * np.eye(inputs))
    size = inputs if quant_spec.scheme == "int8" else quant_spec.block_size
    rounded, steps = np.empty_like(weights), {}
    for index in order:
        group = index // size
        for column in range(columns):
            if (group, column) not in steps:
                rows = slice(group * size, (group + 1) * size)
                scale, zero = step_of((as_matrix(values) if fixed else weights)[rows, column], quant_spec.scheme)
                if quant_spec.double:
                    scale = scales_of(fixed)[group, column]
                    zero = as_matrix(fixed.zeros[:, :, 0])[group, column] if quant_spec.scheme == "int4" else 0
                steps[group, column] = scale, float(zero)
            step = steps[group, column]
            rounded[index, column] = value_of(
                nearest_code(weights[index, column], *step, quant_spec.scheme), *step, quant_spec.scheme
            )
        error = (weights[index] - rounded[index]) / inverse[index, index]
        weights -= np.outer(inverse[:, index], error)
        inverse -= np.outer(inverse[:, index], inverse[index]) / inverse[index, index]
        inverse[index, index] = 1  # Of no use any more.
    return rounded


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_it_is_the_textbook_s(rng, quant_spec, act_order):
    values, hessian = kernel(rng), observe(correlated_inputs(rng, 300, SHAPE[1])).hessian
    fixed = quantize(values, quant_spec) if act_order or quant_spec.double or quant_spec.scheme == "int8" else None
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(SHAPE[1])
    wanted = textbook(values, hessian, quant_spec, 0.01, order, fixed)
    quantized, damping = gptq(values, hessian, quant_spec, act_order=act_order)
    assert damping == 0.01
    ours = as_matrix(dequantize(quantized))
    # A value halfway between two codes may go the other way in float32, and takes the rest of its column with it.
    alike = [np.allclose(ours[:, column], wanted[:, column], rtol=1e-3, atol=1e-4) for column in range(ours.shape[1])]
    assert np.mean(alike) >= 0.9
    errors = [float(output_error(values, back, hessian)) for back in (dequantize(quantized), from_matrix(wanted))]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def from_matrix(matrix, shape=SHAPE):
    return matrix.reshape(shape[1], shape[0], shape[2]).transpose(1, 0, 2).astype(np.float32)


def test_inputs_in_no_round_number(rng):
    """Eight bits have no groups: a prime number of inputs is swept one by one."""
    values, hessian = kernel(rng, (1, 67, 6)), observe(correlated_inputs(rng, 200, 67)).hessian
    wanted = textbook(values, hessian, QuantSpec("int8"), 0.01, np.arange(67), quantize(values, QuantSpec("int8")))
    ours = as_matrix(dequantize(gptq(values, hessian, QuantSpec("int8"), act_order=False)[0]))
    assert np.mean([np.allclose(ours[:, c], wanted[:, c], rtol=1e-3, atol=1e-4) for c in range(6)]) >= 0.8


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_better_than_rounding_to_nearest(quant_spec):
    """For every seed, with the inputs' own order and with the largest first."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        values, hessian = kernel(rng), observe(correlated_inputs(rng, 300, SHAPE[1])).hessian
        nearest = float(output_error(values, dequantize(quantize(values, quant_spec)), hessian))
        for act_order in (False, True):
            quantized, _ = gptq(values, hessian, quant_spec, act_order=act_order)
            assert float(output_error(values, dequantize(quantized), hessian)) < 0.8 * nearest


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_without_correlation_it_rounds_to_nearest(rng, quant_spec, act_order):
    values = jnp.asarray(kernel(rng))
    ours, _ = gptq(values, 3 * jnp.eye(SHAPE[1]), quant_spec, act_order=act_order)
    nearest = jax.jit(lambda values: quantize(values, quant_spec))(values)
    assert jax.tree.structure(ours) == jax.tree.structure(nearest)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(nearest), strict=True):
        assert one.dtype == other.dtype
        if one.dtype == jnp.float32:  # XLA divides by a constant by multiplying, or not.
            np.testing.assert_allclose(one, other, rtol=3e-7)
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("quant_spec", QUANT_SPECS[:3], ids=str)
def test_invariances(rng, quant_spec):
    """Powers of two change nothing but scales, and channels know nothing of each other."""
    values, hessian = kernel(rng), observe(correlated_inputs(rng, 300, SHAPE[1])).hessian
    codes = gptq(values, hessian, quant_spec)[0].codes
    np.testing.assert_array_equal(gptq(values, 4 * hessian, quant_spec)[0].codes, codes)
    np.testing.assert_array_equal(gptq(2 * values, hessian, quant_spec)[0].codes, codes)
    mixed = rng.permutation(SHAPE[2])
    assert np.mean(gptq(values[:, :, mixed], hessian, quant_spec)[0].codes == codes[..., mixed]) > 0.99


def test_inputs_may_change_places_within_their_groups(rng):
    """With the largest first, the order in which they come is not theirs."""
    values, hessian = kernel(rng), np.asarray(observe(correlated_inputs(rng, 300, SHAPE[1])).hessian)
    mixed = np.concatenate([start + rng.permutation(32) for start in range(0, SHAPE[1], 32)])
    one, other = (
        dequantize(gptq(values[:, order], hessian[np.ix_(order, order)], QuantSpec("int4", 32))[0])
        for order in (np.arange(SHAPE[1]), mixed)
    )
    assert np.mean(np.isclose(one[:, mixed], other, rtol=1e-5, atol=1e-6)) > 0.99


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_were_never_seen(rng, act_order):
    """They are rounded to the nearest, and the others as if these had no error."""
    values, x = kernel(rng), correlated_inputs(rng, 300, SHAPE[1])
    dead = rng.permutation(SHAPE[1])[:20]
    x[:, dead] = 0
    ours = dequantize(gptq(values, observe(x).hessian, QuantSpec("int8"), act_order=act_order)[0])
    np.testing.assert_allclose(ours[:, dead], dequantize(quantize(values, QuantSpec("int8")))[:, dead], rtol=1e-6)
    nothing, _ = gptq(values, jnp.zeros((SHAPE[1], SHAPE[1])), QuantSpec("int4", 32), act_order=act_order)
    nearest = dequantize(quantize(values, QuantSpec("int4", 32)))
    assert np.mean(np.isclose(dequantize(nothing), nearest, rtol=1e-5, atol=1e-6)) > 0.999


def test_the_hessian_of_other_inputs_does_not_help(rng):
    values, x = kernel(rng), correlated_inputs(rng, 300, SHAPE[1])
    right, wrong = observe(x).hessian, observe(correlated_inputs(rng, 300, SHAPE[1])).hessian
    quant_spec = QuantSpec("int4", 32)
    errors = [float(output_error(values, dequantize(gptq(values, h, quant_spec)[0]), right)) for h in (right, wrong)]
    assert errors[0] < 0.8 * errors[1]


def test_damping_grows_until_there_is_a_factor(rng):
    """A Hessian that rounding has made indefinite, by a twentieth of its mean."""
    hessian = np.asarray(observe(correlated_inputs(rng, 300, SHAPE[1])).hessian, np.float64)
    sizes, directions = np.linalg.eigh(hessian)
    sizes[0] = -0.05 * sizes.mean()
    broken = (directions * sizes @ directions.T).astype(np.float32)
    values = kernel(rng)
    quantized, damping = gptq(values, broken, QuantSpec("int4", 32))
    assert damping == pytest.approx(0.1)
    nearest = dequantize(quantize(values, QuantSpec("int4", 32)))
    assert float(output_error(values, dequantize(quantized), hessian)) < 0.8 * float(
        output_error(values, nearest, hessian)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_without_a_factor_it_rounds_to_nearest(rng, bad):
    hessian = np.array(observe(correlated_inputs(rng, 300, SHAPE[1])).hessian)
    hessian[3, 5] = hessian[5, 3] = bad
    values = kernel(rng)
    quantized, damping = gptq(values, hessian, QuantSpec("nf4", 32))
    assert damping == math.inf
    np.testing.assert_allclose(dequantize(quantized), dequantize(quantize(values, QuantSpec("nf4", 32))), rtol=1e-6)


def test_what_is_refused(rng):
    values, hessian = kernel(rng), jnp.eye(SHAPE[1])
    with pytest.raises(ConfigError, match="must be greater than 0, got 0"):
        gptq(values, hessian, QuantSpec("int8"), damping=0)
    with pytest.raises(ModelError, match="needs a Hessian"):
        gptq(values, jnp.eye(64), QuantSpec("int8"))
    with pytest.raises(ModelError, match="block_size=256 does not divide"):
        gptq(values, hessian, QuantSpec("int4", 256))
