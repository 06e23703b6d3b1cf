"""Computes in bfloat16 on a CPU, in the forms that XLA compiles well there.

Some CPUs (AVX512_BF16, AMX) multiply bfloat16 and sum in float32, at twice the speed of float32. XLA uses that for
products of bfloat16 whose result is float32. For a bfloat16 result it converts both operands to float32 first, and so
for all other operations. An array that a loop slices is converted as a whole before the loop: 0.7 GB for the embedding
of Gemma 3 270M. 16-bit integers are not converted.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gemma_tune.runtime.backend import is_single_cpu

CPU_MATMUL_NAME = "cpu_matmul"  # Name that `jax.checkpoint` policies know the bfloat16 results of `cpu_matmul` by.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}  # x86 instruction sets, as Linux names them.


@functools.cache
def multiplies_bfloat16() -> bool:
    """Returns whether this machine's CPU reports instructions that multiply bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not _BFLOAT16_FLAGS.isdisjoint(flags.split())


def cpu_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x @ kernel; in bfloat16 by the CPU's own instructions where it has them.

    Args:
        x: [..., D] array.
        kernel: [D, F] array.
    """
    is_bfloat16 = x.dtype == kernel.dtype == jnp.bfloat16
    if is_bfloat16 and is_single_cpu() and multiplies_bfloat16():
        return _bfloat16_matmul(x, kernel)
    return x @ kernel


@jax.custom_vjp
def _bfloat16_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies bfloat16 arrays. The gradients are written out, since JAX would make them products of float32 with
    bfloat16. XLA computes the kernel's gradient, a sum over rows, in float32 in any case.
    """
    return _sum_in_float32(x, kernel)


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return checkpoint_name(_sum_in_float32(x, kernel), CPU_MATMUL_NAME), (x, kernel)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows, of_rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return _sum_in_float32(gradient, kernel.T), _sum_in_float32(rows.T, of_rows)


_bfloat16_matmul.defvjp(_matmul_forward, _matmul_backward)


def _sum_in_float32(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def cpu_slice_rows(table: jax.Array, start: Any, count: int) -> jax.Array:
    """Returns table[start : start + count], where start may be a traced value. It can't be differentiated."""
    if table.dtype != jnp.bfloat16 or not is_single_cpu():
        return lax.dynamic_slice_in_dim(table, start, count)
    # Without the barrier, XLA would copy the table as integers before a loop that this is in.
    table, start = lax.optimization_barrier((table, start))
    codes = lax.dynamic_slice_in_dim(lax.bitcast_convert_type(table, jnp.uint16), start, count)
    return lax.bitcast_convert_type(codes, table.dtype)
