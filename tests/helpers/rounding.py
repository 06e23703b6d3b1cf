"""Rounding by the definitions in `quantization.grids`, in plain NumPy and float64, and inputs to calibrate on."""

import numpy as np

from gemma_tune.quantization.codes import NF4_LEVELS


def correlated_inputs(rng, count, width):
    """[count, width]: a few directions that all inputs share, noise, and channels of very different sizes."""
    directions = rng.normal(size=(width // 4, width))
    inputs = rng.normal(size=(count, width // 4)) @ directions + rng.normal(size=(count, width))
    return (inputs * np.exp(0.7 * rng.normal(size=width))).astype(np.float32)


def step_of(group, scheme):
    """(scale, zero) of one group's values, [n]."""
    if scheme == "int8":
        return np.abs(group).max() / 127, 0.0
    if scheme == "nf4":
        return np.abs(group).max(), 0.0
    low, high = min(group.min(), 0), max(group.max(), 0)
    scale = (high - low) / 15
    return scale, float(np.clip(np.round(-low / scale), 0, 15)) if scale else 0.0


def nearest_code(value, scale, zero, scheme):
    scale = scale or 1.0
    if scheme == "int8":
        return int(np.clip(np.round(value / scale), -127, 127))
    if scheme == "nf4":
        return int(np.abs(NF4_LEVELS.astype(np.float64) - value / scale).argmin())
    return int(np.clip(np.round(value / scale) + zero, 0, 15))


def value_of(code, scale, zero, scheme):
    return float(NF4_LEVELS[code]) * scale if scheme == "nf4" else (code - zero) * scale


def round_by_definition(matrix, quant_spec):
    """[C, K] -> the nearest values, group by group."""
    size = len(matrix) if quant_spec.scheme == "int8" else quant_spec.block_size
    rounded = np.empty(matrix.shape)
    for start in range(0, len(matrix), size):
        for column in range(matrix.shape[1]):
            group = matrix[start : start + size, column].astype(np.float64)
            step = step_of(group, quant_spec.scheme)
            codes = [nearest_code(value, *step, quant_spec.scheme) for value in group]
            rounded[start : start + size, column] = [value_of(code, *step, quant_spec.scheme) for code in codes]
    return rounded


def as_matrix(values):
    """[P, C, Q] -> [C, P·Q]."""
    return np.asarray(values).transpose(1, 0, 2).reshape(values.shape[1], -1)
