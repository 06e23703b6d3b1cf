"""Statistics of inputs: parts add up to the whole, padding does not count, and the Hessian stands for the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rounding import correlated_inputs

from gemma_tune.errors import ModelError
from gemma_tune.quantization.codes import dequantize, quantize
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.quantization.statistics import add_statistics, check_fit, observe, output_error


def assert_alike(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        other = np.asarray(other)
        # Float32 sums of some hundred products.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def test_by_the_definitions(rng):
    x = correlated_inputs(rng, 90, 24)
    exact = x.astype(np.float64)
    wanted = (sum(np.outer(row, row) for row in exact), np.abs(exact).sum(0), np.abs(exact).max(0), 90)
    assert_alike(jax.jit(observe)(x.reshape(3, 30, 24)), wanted)


def test_weights(rng):
    """Left out is not there, even when it is NaN; 2 counts twice."""
    x = correlated_inputs(rng, 50, 16)
    kept = rng.random(50) < 0.6
    padded = np.where(kept[:, None], x, np.nan)
    assert_alike(observe(padded.reshape(5, 10, 16), kept.reshape(5, 10)), observe(x[kept]))
    twice = observe(np.concatenate([x, x[kept]]))
    assert_alike(observe(x, 1.0 + kept), twice)


def test_parts_add_up(rng):
    x = correlated_inputs(rng, 50, 16)
    assert_alike(jax.jit(add_statistics)(observe(x[:13]), observe(x[13:])), observe(x))


def test_all_in_float32(rng):
    x = jnp.asarray(correlated_inputs(rng, 4000, 8), jnp.bfloat16)
    statistics = observe(x)
    assert {leaf.dtype for leaf in statistics} == {jnp.dtype("float32")}
    assert_alike(statistics, observe(x.astype(jnp.float32)))


def test_output_error_is_that_of_the_outputs(rng):
    x, values = correlated_inputs(rng, 200, 64), rng.normal(size=(3, 64, 5)).astype(np.float32)
    rounded = dequantize(quantize(values, QuantSpec("int4", 32)))
    outputs, wanted = (np.einsum("tc,pcq->tpq", x.astype(np.float64), kernel) for kernel in (rounded, values))
    relative = np.square(outputs - wanted).sum() / np.square(wanted).sum()
    hessian = observe(x).hessian
    assert float(output_error(values, rounded, hessian)) == pytest.approx(relative, rel=1e-4)
    assert float(output_error(values, values, hessian)) == 0
    assert float(output_error(values, rounded, jnp.zeros_like(hessian))) == 0


def test_what_does_not_fit():
    check_fit(np.zeros((2, 64, 3)), np.zeros((64, 64)), QuantSpec("int4", 32))
    with pytest.raises(ModelError, match=r"the kernel has shape \(2, 64, 3\) and the Hessian \(128, 128\)"):
        check_fit(np.zeros((2, 64, 3)), np.zeros((128, 128)), QuantSpec("int4", 32))
    with pytest.raises(ModelError, match="needs a Hessian"):
        check_fit(np.zeros((64, 3)), np.zeros((64, 64)), QuantSpec("int8"))
    with pytest.raises(ModelError, match="block_size=128 does not divide its 64 inputs"):
        check_fit(np.zeros((2, 64, 3)), np.zeros((64, 64)), QuantSpec("nf4", 128))
