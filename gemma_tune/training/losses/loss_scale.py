"""Dynamic loss scaling for float16 (Mixed Precision Training, arXiv:1710.03740, section 3.2).

float16 ends at 65504, and rounds what is smaller than 3e-8 to zero. Many gradients are smaller. So the loss is
multiplied by a scale before the backward pass, and the gradients are divided by it in float32. If some are not finite
all the same, the step is skipped and the scale halved; after many good steps it is doubled.

bfloat16 and float32 reach down to 1e-38 and need none of this.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# A larger one costs the first batches, which are skipped, a smaller one only gradients below 2^-36.
FIRST_SCALE = 2.0**12
LARGEST_SCALE = 2.0**24
GROWTH_STEPS = 2000  # Good steps in a row, after which the scale is doubled.


class LossScale(NamedTuple):
    """The loss scale: a part of the training state, so that a resumed run goes on with it.

    Attributes:
        scale: [] float32 power of two that the mean loss is multiplied by.
        num_good: [] int32 number of good steps since the scale last changed.
        num_skipped: [] int32 number of skipped steps of the whole run.
    """

    scale: jax.Array
    num_good: jax.Array
    num_skipped: jax.Array


def init_loss_scale() -> LossScale:
    """Returns the scale before the first step."""
    return LossScale(jnp.float32(FIRST_SCALE), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def scale_of_sum(loss_scale: LossScale | None, num_targets: int) -> jax.Array | None:
    """Returns the factor of a loss that is summed over tokens; None without scaling.

    The sum is num_targets times the mean, so its factor is smaller by that, rounded to a power of two, so that
    multiplying and dividing change no digit.

    Args:
        loss_scale: Loss scale of the state.
        num_targets: Number of tokens that are summed, about.
    """
    return None if loss_scale is None else loss_scale.scale / power_of_two(num_targets)


def power_of_two(number: int) -> float:
    """Returns the smallest power of two that is not below a positive number."""
    return float(1 << (number - 1).bit_length())


def next_loss_scale(loss_scale: LossScale, is_finite: jax.Array) -> LossScale:
    """Returns the scale after a step.

    Args:
        loss_scale: Scale of the step.
        is_finite: [] bool, whether all of the step's gradients were finite.
    """
    num_good = jnp.where(is_finite, loss_scale.num_good + 1, 0)
    grows = num_good == GROWTH_STEPS
    grown = jnp.where(grows, jnp.minimum(2 * loss_scale.scale, LARGEST_SCALE), loss_scale.scale)
    return LossScale(
        scale=jnp.where(is_finite, grown, loss_scale.scale / 2),
        num_good=jnp.where(grows, 0, num_good),
        num_skipped=loss_scale.num_skipped + jnp.where(is_finite, 0, 1),
    )
