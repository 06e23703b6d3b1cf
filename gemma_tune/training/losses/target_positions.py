"""Picks the positions that have a loss out of a batch, so that only these reach the LM head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class TargetPositions(NamedTuple):
    """The positions of a batch that have a loss, T of them, in the order of rows and positions.

    Attributes:
        hidden: [T, D] hidden states.
        target_ids: [T] int32.
        weights: [T] float32; 0 where the batch has fewer than T positions with a loss.
    """

    hidden: jax.Array
    target_ids: jax.Array
    weights: jax.Array


def gather_targets(
    hidden: jax.Array, target_ids: jax.Array | np.ndarray, loss_weights: jax.Array | np.ndarray, num_targets: int
) -> TargetPositions:
    """Gathers the positions whose loss weight is not 0.

    Args:
        hidden: [B, L, D] hidden states.
        target_ids: [B, L] int32.
        loss_weights: [B, L] float32.
        num_targets: T. Of a batch with more positions than that, the last ones are left out. Of one with fewer, the
            rest is filled up with the batch's first position at weight 0.
    """
    weights = jnp.asarray(loss_weights).reshape(-1)
    (indices,) = jnp.nonzero(weights, size=num_targets, fill_value=0)
    is_target = jnp.arange(num_targets) < jnp.count_nonzero(weights)
    return TargetPositions(
        hidden.reshape(-1, hidden.shape[-1])[indices],
        jnp.asarray(target_ids).reshape(-1)[indices],
        jnp.where(is_target, weights[indices], 0.0),
    )
