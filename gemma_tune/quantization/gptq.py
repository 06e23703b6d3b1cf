"""GPTQ (Frantar et al., arXiv:2210.17323): inputs are rounded one by one, each compensating the errors before it.

After each input, the paper updates all weights that are not rounded yet, with the Cholesky factor of the Hessian's
inverse. The Hessian's own factor gives the same codes: with H = L Lᵀ, the error tr(Eᵀ H E) is |Lᵀ E|². L is lower
triangular, so that row i of Lᵀ E contains no errors of inputs before i. When inputs are rounded from the last to the
first, each row can be made as small as its codes allow:

    target_i = w_i + Σ_{j>i} L_ji e_j / L_ii,   e_j = w_j − q_j

This is what the paper's update leaves for input i (shown in arXiv:2507.18553). It saves an inverse of [C, C] and a
second factorization. Inputs are ordered in reverse, so that the first one to be rounded stands last.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.errors import ConfigError
from gemma_tune.quantization.codes import NF4_BOUNDARIES, NF4_LEVELS, Quantized, pack_codes, quantize
from gemma_tune.quantization.scales import reciprocal, scale_values
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.quantization.statistics import check_fit

_MAX_TILE = 128  # Inputs of a tile, at most, where the scheme has no groups.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def gptq(
    values: Any, hessian: Any, quant_spec: QuantSpec, damping: float = 0.01, act_order: bool = True
) -> tuple[Quantized, float]:
    """Quantizes a kernel so that its outputs change little on the calibration inputs.

    Weights of inputs that were always 0 are rounded to the nearest code.

    Args:
        values: [P, C, Q] float32 kernel, all P of the same inputs.
        hessian: [C, C] float32, `hessian` of `InputStatistics`.
        quant_spec: Quantization spec, whose block size divides C.
        damping: Share of the mean of the Hessian's diagonal that is added to the diagonal. It is multiplied by 10, up
            to 1, until the Hessian can be factorized.
        act_order: Whether inputs are rounded in descending order of their diagonal entry, with the scales of the
            original kernel. Otherwise they are rounded in their own order, and a group's scale comes from its weights
            as updated so far. With int8 and double quantization, scales always come from the original kernel.

    Returns:
        The quantized kernel, and the damping that was used. It is infinite where none was enough because the Hessian is
        not finite; all weights are then rounded to the nearest code.

    Raises:
        ModelError: The shapes don't fit together.
        ConfigError: The damping is not positive.
    """
    if not damping > 0:
        raise ConfigError(f"The damping of GPTQ must be greater than 0, got {damping}.")
    check_fit(values, hessian, quant_spec)
    values, hessian = jnp.asarray(values, jnp.float32), jnp.asarray(hessian, jnp.float32)
    nearest = quantize(values, quant_spec)
    diagonal = jnp.diagonal(hessian)
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(len(diagonal))
    fixed = nearest if act_order or quant_spec.double or quant_spec.scheme == "int8" else None
    while True:
        factor, is_finite = _factorize(hessian, order[::-1], damping)
        if is_finite:
            return _sweep(values, factor, order[::-1], fixed, quant_spec), damping
        if damping >= 1:
            return nearest, math.inf
        damping = min(10 * damping, 1.0)


@jax.jit
def _factorize(hessian: jax.Array, order: jax.Array, damping: Any) -> tuple[jax.Array, jax.Array]:
    """Returns (lower Cholesky factor [C, C] of the damped Hessian with inputs in some order, whether it is finite)."""
    mean = jnp.mean(jnp.diagonal(hessian))
    added = damping * jnp.where(mean > 0, mean, 1)
    damped = hessian[order[:, None], order[None, :]] + added * jnp.eye(len(order), dtype=jnp.float32)
    factor = jax.lax.linalg.cholesky(damped, symmetrize_input=False)
    return factor, jnp.all(jnp.isfinite(jnp.diagonal(factor)))


@functools.partial(jax.jit, static_argnames="quant_spec")
def _sweep(
    values: jax.Array, factor: jax.Array, order: jax.Array, fixed: Quantized | None, quant_spec: QuantSpec
) -> Quantized:
    """Returns a quantized kernel whose inputs were rounded tile by tile, from the last tile to the first.

    Args:
        values: [P, C, Q] kernel.
        factor: [C, C] lower Cholesky factor, with inputs in `order`.
        order: [C] indices of the inputs.
        fixed: Quantized kernel with the scales and zero points to use. None for those of each updated group, which then
            is a tile.
        quant_spec: Quantization spec, whose block size divides C.
    """
    first, inputs, last = values.shape
    tile = _tile_size(inputs) if quant_spec.scheme == "int8" else quant_spec.block_size
    matrix = values.transpose(1, 0, 2).reshape(inputs, -1)[order]
    group_of = order // (inputs if quant_spec.scheme == "int8" else tile)
    fixed_scales = None if fixed is None else _scales_and_zeros(fixed)

    def round_tile(errors: jax.Array, start: jax.Array) -> tuple[jax.Array, tuple]:
        weights = jax.lax.dynamic_slice_in_dim(matrix, start, tile)
        columns = jax.lax.dynamic_slice_in_dim(factor, start, tile, axis=1)
        corner = jax.lax.dynamic_slice_in_dim(columns, start, tile)
        carried = _product(columns.T, errors)
        found = None
        if fixed_scales is None:
            # The minimizer over all inputs that are not rounded yet.
            solve = functools.partial(jax.lax.linalg.triangular_solve, left_side=True, lower=True, transpose_a=True)
            updated = weights + solve(corner, carried)
            found = quantize(updated.reshape(tile, first, last).transpose(1, 0, 2), quant_spec)
            scale, zero = (jnp.broadcast_to(one, weights.shape) for one in _scales_and_zeros(found))
        else:
            groups = jax.lax.dynamic_slice_in_dim(group_of, start, tile)
            scale, zero = (one[groups] for one in fixed_scales)
        codes, own = _round_in_order(weights, carried, corner, scale, zero, quant_spec.scheme)
        return jax.lax.dynamic_update_slice_in_dim(errors, own, start, 0), (codes, found)

    starts = jnp.arange(inputs // tile)[::-1] * tile
    _, (codes, found) = jax.lax.scan(round_tile, jnp.zeros_like(matrix), starts)
    codes = codes[::-1].reshape(inputs, -1)
    codes = jnp.zeros_like(codes).at[order].set(codes).reshape(inputs, first, last).transpose(1, 0, 2)
    if quant_spec.scheme == "int8":
        codes = codes.astype(jnp.int8)
    else:
        codes = pack_codes(jnp, codes.reshape(first, inputs // tile, tile, last))
    if fixed is not None:
        return fixed._replace(codes=codes)
    # Scanned in reverse, the results stand in the order of the groups: [G, P, 1, 1, Q] each.
    scales, zeros = (
        jax.tree.map(lambda array: array[:, :, 0].swapaxes(0, 1), part) for part in (found.scales, found.zeros)
    )
    return Quantized(codes, scales, zeros)


def _round_in_order(weights, carried, corner, scale, zero, scheme: str) -> tuple[jax.Array, jax.Array]:
    """Rounds the inputs of a tile from the last to the first.

    Args:
        weights: [T, K] weights of the tile's T inputs.
        carried: [T, K] sums Σ L_ji e_j over the inputs j outside of the tile.
        corner: [T, T] Cholesky factor of the tile's inputs.
        scale: [T, K] scales.
        zero: [T, K] zero points.
        scheme: Scheme of the codes.

    Returns:
        (codes, errors), each [T, K].
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
    """Returns (code, value) as `codes.quantize` and `codes.dequantize` compute them."""
    scaled = target * reciprocal(jnp, scale)
    if scheme == "int8":
        code = jnp.clip(jnp.round(scaled), -127, 127)
        return code, code * scale
    if scheme == "int4":
        code = jnp.clip(jnp.round(scaled) + zero, 0, 15)
        return code, (code - zero) * scale
    code = jnp.sum(scaled[..., None] > NF4_BOUNDARIES, axis=-1)
    return code, jnp.take(NF4_LEVELS, code) * scale


def _scales_and_zeros(quantized: Quantized) -> tuple[Any, ...]:
    """Returns (scales, zero points), each [G, P·Q] float32."""
    scale = scale_values(jnp, quantized.scales)
    zero = jnp.zeros_like(scale) if quantized.zeros is None else quantized.zeros.astype(jnp.float32)
    rows = [one[:, :, 0].swapaxes(0, 1).reshape(one.shape[1], -1) for one in (scale, zero)]
    return rows[0], rows[1]


def _tile_size(inputs: int) -> int:
    """Returns the largest divisor of the number of inputs that is at most `_MAX_TILE`."""
    return max(size for size in range(1, _MAX_TILE + 1) if inputs % size == 0)
