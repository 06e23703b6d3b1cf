"""Scales of quantized arrays: in float32, or quantized themselves to eight bits (double quantization, as in QLoRA)."""

from typing import Any, NamedTuple

import numpy as np

from gemma_tune.quantization.spec import QuantSpec

DOUBLE_QUANT_GROUP = 256  # Scales that share a step and a lowest value, as in QLoRA.
_PART_OF_255 = np.float32(1 / 255)


class Scales(NamedTuple):
    """The scales of an array's groups.

    Attributes:
        values: [P, G, 1, Q] float32 scales, or uint8 codes of them with double quantization.
        step: [n, 1] float32, what a code is multiplied by, for each 256 codes in memory order; else None.
        lowest: [n, 1] float32, what is added to the product, for each 256 codes in memory order; else None.
    """

    values: Any
    step: Any = None
    lowest: Any = None


def make_scales(xp: Any, values: Any, quant_spec: QuantSpec) -> Scales:
    """Returns the Scales of values [P, G, 1, Q]."""
    values = values.astype(xp.float32)
    if not quant_spec.double:
        return Scales(values)
    flat = _scale_groups(xp, values)
    lowest, highest = (f(flat, axis=1, keepdims=True) for f in (xp.min, xp.max))
    step = (highest - lowest) * _PART_OF_255
    codes = xp.round((flat - lowest) * reciprocal(xp, step)).astype(xp.uint8)
    return Scales(codes.reshape(-1)[: values.size].reshape(values.shape), step, lowest)


def scale_values(xp: Any, scales: Scales) -> Any:
    """Returns scales as [P, G, 1, Q] float32, dequantized if necessary.

    Args:
        xp: `numpy` or `jax.numpy`.
        scales: Scales.
    """
    if scales.step is None:
        return scales.values
    flat = _scale_groups(xp, scales.values).astype(xp.float32) * scales.step + scales.lowest
    return flat.reshape(-1)[: scales.values.size].reshape(scales.values.shape)


def reciprocal(xp: Any, scale: Any) -> Any:
    """Returns 1 / scale, since XLA turns a division by a scale into this product and NumPy doesn't.

    A group of zeros has the scale 0; any other scale gives the same codes.
    """
    return 1 / xp.where(scale == 0, 1, scale)


def _scale_groups(xp: Any, array: Any) -> Any:
    """Returns an array as [n, 256] in memory order, padded with copies of its last value."""
    flat = array.reshape(-1)
    missing = -flat.size % DOUBLE_QUANT_GROUP
    if missing:
        flat = xp.concatenate([flat, xp.broadcast_to(flat[-1:], (missing,))])
    return flat.reshape(-1, DOUBLE_QUANT_GROUP)
