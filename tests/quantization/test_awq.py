"""AWQ: the scale that the paper's search finds on the inputs themselves, and never more error than without."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rounding import as_matrix, correlated_inputs, round_by_definition

from gemma_tune.errors import ModelError
from gemma_tune.quantization.awq import awq, awq_scale
from gemma_tune.quantization.codes import dequantize, quantize
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.quantization.statistics import observe, output_error

QUANT_SPECS = [QuantSpec("int8"), QuantSpec("int4", 32), QuantSpec("nf4", 32), QuantSpec("nf4", 32, True)]
SHAPE = (2, 64, 8)


def kernel(rng):
    return rng.normal(size=SHAPE).astype(np.float32)


def with_outliers(rng, count=300):
    """A few channels far larger than the others, as language models have them."""
    x = correlated_inputs(rng, count, SHAPE[1])
    x[:, rng.permutation(SHAPE[1])[:3]] *= 30
    return x


def error_of(values, x, quant_spec):
    quantized, scale = awq(values, observe(x), quant_spec)
    back = dequantize(quantized) / scale[:, None]
    return float(output_error(values, back, observe(x).hessian))


def nearest_error(values, x, quant_spec):
    return float(output_error(values, dequantize(quantize(jnp.asarray(values), quant_spec)), observe(x).hessian))


@pytest.mark.parametrize("quant_spec", QUANT_SPECS[:3], ids=str)
def test_it_is_the_search_on_the_inputs_themselves(rng, quant_spec):
    values, x = kernel(rng), with_outliers(rng).astype(np.float64)
    matrix, mean, errors = as_matrix(values).astype(np.float64), np.abs(x).mean(0), []
    scales = [mean ** (step / 20) for step in range(20)]
    scales = [(scale / np.sqrt(scale.max() * scale.min()))[:, None] for scale in scales]
    for scale in scales:
        errors.append(np.square(x @ (matrix - round_by_definition(matrix * scale, quant_spec) / scale)).sum())
    ours = np.asarray(awq_scale(values, observe(x), quant_spec))
    # Neighbours may be as good as each other in float32.
    chosen = int(np.argmin([np.abs(scale[:, 0] - ours).max() for scale in scales]))
    np.testing.assert_allclose(ours, scales[chosen][:, 0], rtol=1e-4)
    assert errors[chosen] <= min(errors) * 1.01
    assert chosen > 0 and min(errors) < errors[0]


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_never_worse_than_rounding_to_nearest(quant_spec):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        values, x = kernel(rng), with_outliers(rng) if seed % 2 else correlated_inputs(rng, 300, SHAPE[1])
        # Compiled together or apart, floats differ in their last bits.
        assert error_of(values, x, quant_spec) <= nearest_error(values, x, quant_spec) * 1.001


def test_outliers_are_where_it_helps(rng):
    values, x = kernel(rng), with_outliers(rng)
    quant_spec = QuantSpec("int4", 32)
    assert error_of(values, x, quant_spec) < 0.7 * nearest_error(values, x, quant_spec)


@pytest.mark.parametrize("quant_spec", QUANT_SPECS[1:3], ids=str)
def test_cutting_off_helps_further(rng, quant_spec):
    """Groups of normal weights with one far out, against the scale alone."""
    values, x = kernel(rng), with_outliers(rng)
    values[:, ::32] *= 4
    scale = awq_scale(values, observe(x), quant_spec)
    alone = dequantize(quantize(values * scale[:, None], quant_spec)) / scale[:, None]
    assert error_of(values, x, quant_spec) < 0.99 * float(output_error(values, alone, observe(x).hessian))


def test_inputs_of_one_size_need_no_scale(rng):
    x = np.where(rng.random((300, SHAPE[1])) < 0.5, -1, 1).astype(np.float32)
    np.testing.assert_allclose(awq_scale(kernel(rng), observe(x), QuantSpec("int4", 32)), 1, rtol=1e-6)


def test_invariances(rng):
    """The unit of the inputs does not matter, nor how often each was seen."""
    values, x = kernel(rng), with_outliers(rng)
    scale = awq_scale(values, observe(x), QuantSpec("int4", 32))
    np.testing.assert_allclose(awq_scale(values, observe(4 * x), QuantSpec("int4", 32)), scale, rtol=1e-4)
    twice = observe(np.concatenate([x, x]))
    np.testing.assert_allclose(awq_scale(values, twice, QuantSpec("int4", 32)), scale, rtol=1e-4)


@pytest.mark.parametrize("dead", [slice(5, 9), slice(None)])
def test_inputs_that_were_never_seen(rng, dead):
    values, x = kernel(rng), with_outliers(rng)
    x[:, dead] = 0
    scale = np.asarray(awq_scale(values, observe(x), QuantSpec("nf4", 32)))
    assert np.isfinite(scale).all() and (scale > 0).all()
    assert (scale[dead] == scale.min()).all()


def test_what_is_refused(rng):
    with pytest.raises(ModelError, match="needs a Hessian"):
        awq_scale(kernel(rng), observe(np.ones((3, 32), np.float32)), QuantSpec("int8"))
