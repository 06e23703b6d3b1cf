"""Tests of the arithmetic of factors against its definition: the merged kernel, and what jax.grad makes of it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tune.models.lora.factors import (
    LoraSpec,
    factor_shapes,
    kernel_norms,
    kernel_update,
    low_rank_product,
    merged_norms,
)
from gemma_tune.models.lora.layouts import as_matrices, from_matrices, to_keras, to_peft

EQUATIONS = ("btd,ndh->btnh", "bsd,kdh->bskh", "btnh,nhd->btd", "btd,df->btf")
SIZES = dict(zip("btsnkdhf", (2, 5, 5, 3, 1, 8, 4, 6), strict=True))
LAYOUTS = ("keras", "peft")
cases = pytest.mark.parametrize(("equation", "layout"), [(e, layout) for e in EQUATIONS for layout in LAYOUTS])


def shape(letters):
    return tuple(SIZES[letter] for letter in letters)


def arrays(rng, equation, layout, rank=2):
    """Returns x, W, A, B and something to weigh outputs with."""
    inputs, axes, outputs = equation.replace("->", ",").split(",")
    shapes = factor_shapes(equation, shape(axes), layout, rank)
    wanted = (shape(inputs), shape(axes), shapes.a, shapes.b, shape(outputs))
    return [jnp.asarray(rng.normal(size=one), jnp.float32) for one in wanted]


@cases
def test_the_product_and_its_gradients_are_those_of_the_merged_kernel(rng, equation, layout):
    x, kernel, a, b, weights = arrays(rng, equation, layout)

    def low(x, a, b):
        return ((jnp.einsum(equation, x, kernel) + low_rank_product(equation, 0.7, x, a, b)) * weights).sum()

    def merged(x, a, b):
        return (jnp.einsum(equation, x, kernel + kernel_update(equation, 0.7, a, b)) * weights).sum()

    ours, wanted = (jax.value_and_grad(one, (0, 1, 2))(x, a, b) for one in (low, merged))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)  # Sums of 40 products of order 1, in float32.


@cases
def test_norms_are_those_of_the_merged_kernel(rng, equation, layout):
    _, kernel, a, b, _ = arrays(rng, equation, layout)
    merged = kernel + kernel_update(equation, 0.7, a, b)
    inputs, axes, _ = equation.replace("->", ",").split(",")
    wanted = np.linalg.norm(
        np.moveaxis(
            merged, [axes.index(c) for c in axes if c in inputs], range(sum(c in inputs for c in axes))
        ).reshape(math.prod(SIZES[c] for c in axes if c in inputs), -1),
        axis=0,
    )
    np.testing.assert_allclose(merged_norms(equation, 0.7, kernel, a, b).ravel(), wanted, rtol=1e-5)
    np.testing.assert_allclose(kernel_norms(equation, merged).ravel(), wanted, rtol=1e-6)


@cases
def test_no_sum_of_kernel_and_update_is_made(rng, equation, layout):
    """Negative control: no array of the kernel's size comes out of any step, but W² on its way into a sum."""
    x, kernel, a, b, _ = arrays(rng, equation, layout)
    jaxpr = jax.make_jaxpr(
        lambda *all: (low_rank_product(equation, 0.7, *all[1:]), merged_norms(equation, 0.7, all[0], *all[2:]))
    )(kernel, x, a, b)
    made = [str(eqn.primitive) for eqn in jaxpr.jaxpr.eqns for out in eqn.outvars if out.aval.shape == kernel.shape]
    assert made in (["square"], ["integer_pow"], ["mul"]), made


def test_layouts_are_the_same_but_for_kernels_of_heads():
    for equation in EQUATIONS[2:]:
        _, axes, _ = equation.replace("->", ",").split(",")
        assert len({factor_shapes(equation, shape(axes), layout, 2) for layout in LAYOUTS}) == 1
    assert factor_shapes("btd,ndh->btnh", (3, 8, 4), "keras", 2)[:2] == ((3, 8, 2), (2, 4))
    assert factor_shapes("btd,ndh->btnh", (3, 8, 4), "peft", 2)[:2] == ((8, 2), (2, 3, 4))


@pytest.mark.parametrize("use_rslora", [False, True])
@cases
def test_conversions_keep_the_update(rng, equation, layout, use_rslora):
    _, _, a, b, _ = (np.asarray(one) for one in arrays(rng, equation, layout))
    lora_spec = LoraSpec(layout, 2, 6.0, use_rslora)
    other = to_peft if layout == "keras" else to_keras
    converted, *factors = other(equation, lora_spec, a, b)
    assert converted.layout != layout and converted.use_rslora == use_rslora
    assert converted.scale == pytest.approx(lora_spec.scale, rel=1e-12)
    assert factors[0].shape[-1] == converted.rank == factors[1].shape[0]
    heads = SIZES[equation[4]] if equation[4] in "nk" else 1
    assert converted.rank == 2 * heads
    ours = kernel_update(equation, converted.scale, *factors)
    np.testing.assert_allclose(ours, kernel_update(equation, lora_spec.scale, a, b), rtol=1e-5, atol=1e-5)


def test_keras_to_peft_and_back_is_bit_for_bit(rng):
    """Of rank N·R with a B that is block-diagonal, R comes back."""
    _, _, a, b, _ = (np.asarray(one) for one in arrays(rng, EQUATIONS[0], "keras"))
    there = to_peft(EQUATIONS[0], LoraSpec("keras", 2, 6.0), a, b)
    back, *factors = to_keras(EQUATIONS[0], *there)
    assert (back, there[0].rank, there[0].alpha) == (LoraSpec("keras", 2, 6.0), 6, 18.0)
    np.testing.assert_array_equal(factors[0], a)
    np.testing.assert_array_equal(factors[1], b)
    changed = there[2].copy()
    changed[0, 1, 0] = 1e-6  # No longer a diagonal: the rank must grow.
    assert to_keras(EQUATIONS[0], there[0], there[1], changed)[0].rank == 18


@pytest.mark.parametrize("equation", EQUATIONS)
def test_matrices_are_those_of_a_linear(rng, equation):
    """torch's Linear computes x·Wᵀ with W [out, in], and PEFT adds s·B·A to it."""
    x, _, a, b, _ = arrays(rng, equation, "peft")
    low, high = as_matrices(np.asarray(a), np.asarray(b))
    flat = np.asarray(x).reshape(10, -1)
    np.testing.assert_allclose(
        flat @ (high @ low).T,
        np.asarray(low_rank_product(equation, 1.0, x, a, b)).reshape(10, -1),
        rtol=1e-4,
        atol=1e-5,
    )
    back = from_matrices(low, high, a.shape, b.shape)
    np.testing.assert_array_equal(back[0], a)
    np.testing.assert_array_equal(back[1], b)
    assert from_matrices(low[:, 1:], high, a.shape, b.shape) is None


def test_scales():
    assert LoraSpec("peft", 16, 8.0).scale == 0.5
    assert LoraSpec("peft", 16, 8.0, use_rslora=True).scale == 2.0
