"""bfloat16 on a CPU, in the forms that XLA there computes fast.

Some CPUs (AVX512_BF16, AMX) multiply bfloat16 and sum in float32, at twice the speed of float32. XLA makes use of that
for products of bfloat16 whose result is to be float32. One that is to be bfloat16 it computes in float32, converting
both operands first. So does it with everything else: of what a loop slices it converts all before the loop, 0.7 GB for
the embedding of Gemma 3 270M. Integers of 16 bits are not converted.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gemma_tune.runtime.backend import is_single_cpu

PRODUCT = "product"  # The name of what `cpu_matmul` returns in bfloat16, for `jax.checkpoint`.
_MULTIPLY_BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # Of x86, as Linux names them.


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions that multiply bfloat16, and says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not _MULTIPLY_BFLOAT16.isdisjoint(flags.split())


def cpu_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x @ kernel in their dtype: x [..., D] and kernel [D, F]."""
    is_bfloat16 = x.dtype == kernel.dtype == jnp.bfloat16
    if is_bfloat16 and is_single_cpu() and multiplies_bfloat16():
        return _bfloat16_product(x, kernel)
    return x @ kernel


@jax.custom_vjp
def _bfloat16_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradients are written out, for JAX would make them products of float32 with bfloat16. The kernel's, a sum
    over rows, XLA computes in float32 all the same.
    """
    return _sum_in_float32(x, kernel)


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return checkpoint_name(_sum_in_float32(x, kernel), PRODUCT), (x, kernel)


def _product_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows, of_rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return _sum_in_float32(gradient, kernel.T), _sum_in_float32(rows.T, of_rows)


_bfloat16_product.defvjp(_product_forward, _product_backward)


def _sum_in_float32(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def cpu_slice_rows(table: jax.Array, start: Any, count: int) -> jax.Array:
    """Returns table[start : start + count]; start may be known at run time only. Not to be differentiated."""
    if table.dtype != jnp.bfloat16 or not is_single_cpu():
        return lax.dynamic_slice_in_dim(table, start, count)
    # Within a loop the table as integers would be a copy, made before the loop, but for the barrier.
    table, start = lax.optimization_barrier((table, start))
    codes = lax.dynamic_slice_in_dim(lax.bitcast_convert_type(table, jnp.uint16), start, count)
    return lax.bitcast_convert_type(codes, table.dtype)
