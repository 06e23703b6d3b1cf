"""bfloat16 on a CPU gives the same numbers in the forms that are fast."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gemma_tune.models.cpu import bfloat16
from gemma_tune.models.cpu.bfloat16 import cpu_matmul, cpu_slice_rows, multiplies_bfloat16
from gemma_tune.models.remat import POLICIES
from gemma_tune.training.losses.cross_entropy import fused_linear_cross_entropy

needs_bfloat16 = pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU doesn't multiply bfloat16")
LAST_BIT = 2.0**-8  # Of bfloat16: what rounding to it may change, relatively.


def random(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


def loss_of(multiply, x, kernel, weights):
    return jnp.sum(multiply(x, kernel).astype(jnp.float32) * weights)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 3), (2, 5, 7), (200, 64, 96)], ids=str)
def test_product_and_gradients_are_those_of_float32_rounded(rng, shape):
    num_rows, num_inputs, num_outputs = shape
    x, kernel = random(rng, 2, num_rows, num_inputs), random(rng, num_inputs, num_outputs)
    weights = random(rng, 2, num_rows, num_outputs).astype(jnp.float32)
    ours = jax.jit(jax.value_and_grad(functools.partial(loss_of, cpu_matmul), (0, 1)))(x, kernel, weights)
    exact = jax.value_and_grad(functools.partial(loss_of, jnp.matmul), (0, 1))
    wanted = exact(x.astype(jnp.float32), kernel.astype(jnp.float32), weights)
    size = np.abs(x).astype(np.float32).reshape(-1, num_inputs) @ np.abs(kernel).astype(np.float32)
    assert abs(float(ours[0] - wanted[0])) <= LAST_BIT * float((size * np.abs(weights).reshape(size.shape)).sum())
    for gradient, exact_gradient in zip(ours[1], wanted[1], strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            gradient.astype(jnp.float32), exact_gradient, atol=LAST_BIT * np.abs(exact_gradient).max()
        )


@needs_bfloat16
def test_nothing_is_multiplied_in_float32(rng):
    """Neither the forward pass nor the gradient in x converts its operands; with JAX's own matmul both do."""
    x, kernel = random(rng, 2, 64, 128), random(rng, 128, 256)
    weights = jnp.ones((2, 64, 256))

    def operands(multiply):
        both = jax.jit(jax.value_and_grad(functools.partial(loss_of, multiply)))
        text = both.lower(x, kernel, weights).compile().as_text()
        types = dict(re.findall(r"%([\w.]+) = (\w+)\[", text)) | dict(re.findall(r"%([\w.]+): (\w+)\[", text))
        return [types[name] for pair in re.findall(r" dot\(%([\w.]+), %([\w.]+)\)", text) for name in pair]

    assert operands(cpu_matmul) == ["bf16"] * 4 and operands(jnp.matmul) == ["f32"] * 4


def test_float32_is_left_alone(rng):
    x, kernel = (random(rng, *shape).astype(jnp.float32) for shape in ((3, 8), (8, 5)))
    np.testing.assert_array_equal(cpu_matmul(x, kernel), x @ kernel)


@needs_bfloat16
def test_blocks_keeps_the_products(rng):
    """Of two products in a row, `full` computes the first again in the backward pass, and `dots` doesn't."""
    x, first, second = random(rng, 16, 128), random(rng, 128, 128), random(rng, 128, 128)

    def count(policy):
        both = jax.checkpoint(lambda x: cpu_matmul(jnp.tanh(cpu_matmul(x, first)), second), policy=POLICIES[policy])
        program = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(both(x).astype(jnp.float32))))(x)
        return str(program).count("dot_general[")

    assert (count("dots"), count("full")) == (6, 7)  # Two products with three each, and one anew.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("start", [0, 3, 9])
def test_slices(rng, dtype, start):
    table = jnp.asarray(rng.standard_normal((13, 4)), dtype)
    np.testing.assert_array_equal(
        jax.jit(lambda table, start: cpu_slice_rows(table, start, 4))(table, start), table[start : start + 4]
    )


def sum_of_blocks(slice_of, table):
    return lax.fori_loop(
        0, 64, lambda i, total: total + slice_of(table, i * 64, 64).astype(jnp.float32).sum(0), jnp.zeros(256)
    )


def test_a_loop_over_slices_copies_no_table():
    table = jax.ShapeDtypeStruct((4096, 256), jnp.bfloat16)

    def temporary(slice_of):
        compiled = jax.jit(functools.partial(sum_of_blocks, slice_of)).lower(table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(cpu_slice_rows) < 0.1 * 2 * 4096 * 256
    assert temporary(lax.dynamic_slice_in_dim) >= 4 * 4096 * 256  # All of it in float32.


@pytest.mark.parametrize("head_is_trained", [False, True])
def test_the_loss_holds_no_copy_of_a_bfloat16_head(rng, head_is_trained):
    hidden, head = jax.ShapeDtypeStruct((32, 64), jnp.bfloat16), jax.ShapeDtypeStruct((65536, 64), jnp.bfloat16)
    targets, weights = jax.ShapeDtypeStruct((32,), jnp.int32), jax.ShapeDtypeStruct((32,), jnp.float32)

    def loss(hidden, head, targets, weights):
        return fused_linear_cross_entropy(hidden, head, targets, weights, head_is_trained=head_is_trained).loss_sum

    what = (0, 1) if head_is_trained else 0
    compiled = jax.jit(jax.grad(loss, what)).lower(hidden, head, targets, weights).compile()
    table = 2 * 65536 * 64
    allowed = 0.5 * table + (2 * table if head_is_trained else 0)  # Its gradient is added up in float32.
    assert compiled.memory_analysis().temp_size_in_bytes < allowed


def test_what_linux_says_of_the_cpu(monkeypatch, tmp_path):
    for flags, yes in (("fpu avx512_bf16 avx2", True), ("amx_bf16", True), ("avx512f avx512_bf16x", False)):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\nbugs :\n")
        monkeypatch.setattr(bfloat16, "Path", lambda _: tmp_path / "cpuinfo")
        assert multiplies_bfloat16.__wrapped__() is yes
    monkeypatch.setattr(bfloat16, "Path", lambda _: tmp_path / "nowhere")
    assert multiplies_bfloat16.__wrapped__() is False
