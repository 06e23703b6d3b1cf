"""GPTQ: rounding inputs one by one, each making up for the errors before it (Frantar et al., arXiv:2210.17323).

The paper updates all weights not yet rounded after each input, with the Cholesky factor of the Hessian's inverse. Here
the same codes come out of the Hessian's own factor: with H = L Lᵀ, the error tr(Eᵀ H E) is |Lᵀ E|², and L is lower
triangular, so that row i of Lᵀ E has no error of inputs before i. Rounding from the last input to the first, each row
can be made as small as its own grid allows:

    target_i = w_i + Σ_{j>i} L_ji e_j / L_ii,   e_j = w_j − q_j

which is what the paper's update leaves for input i (the view of arXiv:2507.18553). It saves an inverse of [C, C] and a
second factorization. The inputs are laid out in reverse, so that the first one to be rounded comes last.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.errors import ConfigError
from gemma_tune.quantization.codes import NF4_BORDERS, NF4_LEVELS, Quantized, pack, quantize, scale_values
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.quantization.statistics import check_fit

_BLOCK = 128  # Inputs at once where a grid has no groups, at most.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def gptq(
    values: Any, hessian: Any, quant_spec: QuantSpec, damping: float = 0.01, act_order: bool = True
) -> tuple[Quantized, float]:
    """Rounds a kernel so that its outputs change little on the inputs that calibration saw.

    Inputs that were never seen are rounded to the nearest code.

    Args:
        values: [P, C, Q] float32, all P of the same inputs.
        hessian: [C, C] float32 of `InputStatistics`.
        quant_spec: With a block size that divides C.
        damping: This part of the mean of the Hessian's diagonal is added to the diagonal. Ten times as much where the
            Hessian can't be factorized otherwise, and so on up to 1.
        act_order: Takes inputs by the size of their diagonal, the largest first, with the scales of the kernel as it
            was. Otherwise in their own order, and a group's scale is found when its turn comes, from its weights as
            updated so far; not so where scales are doubly quantized or a channel has one, which are those of the kernel
            as it was.

    Returns:
        The codes, and the damping that was used: infinite where none was enough, because the Hessian is not finite,
        and all codes are the nearest ones.

    Raises:
        ModelError: Shapes that don't belong together.
        ConfigError: The damping is not positive.
    """
    if not damping > 0:
        raise ConfigError(f"The damping of GPTQ must be more than 0, got {damping}.")
    check_fit(values, hessian, quant_spec)
    values, hessian = jnp.asarray(values, jnp.float32), jnp.asarray(hessian, jnp.float32)
    nearest = quantize(values, quant_spec)
    diagonal = jnp.diagonal(hessian)
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(len(diagonal))
    fixed = nearest if act_order or quant_spec.double or quant_spec.scheme == "int8" else None
    while True:
        factor, is_right = _factorize(hessian, order[::-1], damping)
        if is_right:
            return _sweep(values, factor, order[::-1], fixed, quant_spec), damping
        if damping >= 1:
            return nearest, math.inf
        damping = min(10 * damping, 1.0)


@jax.jit
def _factorize(hessian: jax.Array, layout: jax.Array, damping: Any) -> tuple[jax.Array, jax.Array]:
    """Returns (lower factor [C, C] of the damped Hessian of inputs in this order, whether there is one)."""
    mean = jnp.mean(jnp.diagonal(hessian))
    added = damping * jnp.where(mean > 0, mean, 1)
    damped = hessian[layout[:, None], layout[None, :]] + added * jnp.eye(len(layout), dtype=jnp.float32)
    factor = jax.lax.linalg.cholesky(damped, symmetrize_input=False)
    return factor, jnp.all(jnp.isfinite(jnp.diagonal(factor)))


@functools.partial(jax.jit, static_argnames="quant_spec")
def _sweep(
    values: jax.Array, factor: jax.Array, layout: jax.Array, fixed: Quantized | None, quant_spec: QuantSpec
) -> Quantized:
    """Rounds blocks of inputs, from the last to the first.

    Args:
        values: [P, C, Q].
        factor: [C, C] lower, in the order of `layout`.
        layout: [C], which input stands where.
        fixed: Whose scales and zeros to take. None finds those of each group, which then is a block of `layout`.
        quant_spec: How.
    """
    first, inputs, last = values.shape
    block = _block_of(inputs) if quant_spec.scheme == "int8" else quant_spec.block_size
    matrix = values.transpose(1, 0, 2).reshape(inputs, -1)[layout]
    group_of = layout // (inputs if quant_spec.scheme == "int8" else block)
    steps = None if fixed is None else _steps_of(fixed)

    def round_block(errors: jax.Array, start: jax.Array) -> tuple[jax.Array, tuple]:
        weights = jax.lax.dynamic_slice_in_dim(matrix, start, block)
        columns = jax.lax.dynamic_slice_in_dim(factor, start, block, axis=1)
        corner = jax.lax.dynamic_slice_in_dim(columns, start, block)
        carried = _product(columns.T, errors)
        found = None
        if steps is None:
            # The minimum over all inputs that are not rounded yet.
            solve = functools.partial(jax.lax.linalg.triangular_solve, left_side=True, lower=True, transpose_a=True)
            updated = weights + solve(corner, carried)
            found = quantize(updated.reshape(block, first, last).transpose(1, 0, 2), quant_spec)
            scale, zero = (jnp.broadcast_to(step, weights.shape) for step in _steps_of(found))
        else:
            groups = jax.lax.dynamic_slice_in_dim(group_of, start, block)
            scale, zero = (step[groups] for step in steps)
        codes, own = _round_in_order(weights, carried, corner, scale, zero, quant_spec.scheme)
        return jax.lax.dynamic_update_slice_in_dim(errors, own, start, 0), (codes, found)

    starts = jnp.arange(inputs // block)[::-1] * block
    _, (codes, found) = jax.lax.scan(round_block, jnp.zeros_like(matrix), starts)
    codes = codes[::-1].reshape(inputs, -1)
    codes = jnp.zeros_like(codes).at[layout].set(codes).reshape(inputs, first, last).transpose(1, 0, 2)
    if quant_spec.scheme == "int8":
        codes = codes.astype(jnp.int8)
    else:
        codes = pack(jnp, codes.reshape(first, inputs // block, block, last))
    if fixed is not None:
        return fixed._replace(codes=codes)
    # The first block was the first group: [G, P, 1, 1, Q] each.
    scales, zeros = (
        jax.tree.map(lambda array: array[:, :, 0].swapaxes(0, 1), part) for part in (found.scales, found.zeros)
    )
    return Quantized(codes, scales, zeros)


def _round_in_order(weights, carried, corner, scale, zero, scheme: str) -> tuple[jax.Array, jax.Array]:
    """Returns (codes, errors), each [B, K] like weights, scale and zero; corner: [B, B]; carried: what errors outside
    of the block do to its rows.
    """

    def round_input(index: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, errors = state
        place = len(weights) - 1 - index
        column = corner[:, place]
        target = weights[place] + (carried[place] + _product(column, errors)) / column[place]
        code, value = _nearest(target, scale[place], zero[place], scheme)
        return codes.at[place].set(code.astype(jnp.int16)), errors.at[place].set(weights[place] - value)

    start = jnp.zeros(weights.shape, jnp.int16), jnp.zeros_like(weights)
    return jax.lax.fori_loop(0, len(weights), round_input, start)


def _nearest(target, scale, zero, scheme: str) -> tuple[jax.Array, jax.Array]:
    """Returns (code, value) by the formulas of `grids.quantize` and `grids.dequantize`."""
    scaled = target * (1 / jnp.where(scale == 0, 1, scale))
    if scheme == "int8":
        code = jnp.clip(jnp.round(scaled), -127, 127)
        return code, code * scale
    if scheme == "int4":
        code = jnp.clip(jnp.round(scaled) + zero, 0, 15)
        return code, (code - zero) * scale
    code = jnp.sum(scaled[..., None] > NF4_BORDERS, axis=-1)
    return code, jnp.take(NF4_LEVELS, code) * scale


def _steps_of(quantized: Quantized) -> tuple[Any, ...]:
    """Returns (scales, zeros), each [G, P·Q] float32."""
    scale = scale_values(jnp, quantized.scales)
    zero = jnp.zeros_like(scale) if quantized.zeros is None else quantized.zeros.astype(jnp.float32)
    rows = [step[:, :, 0].swapaxes(0, 1).reshape(step.shape[1], -1) for step in (scale, zero)]
    return rows[0], rows[1]


def _block_of(inputs: int) -> int:
    """The largest divisor within _BLOCK."""
    return max(size for size in range(1, _BLOCK + 1) if inputs % size == 0)
