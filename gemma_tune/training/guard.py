"""Finds bad steps: their loss is not finite, or far above the losses before (a spike).

The usual loss is a moving average, which is part of the training state, so that a resumed run decides as one that was
never stopped. A bad step's update is left out inside the compiled step (as PaLM left out the batches of its loss
spikes, arXiv:2204.02311, section 5.1); the loop decides whether the run then stops or goes on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

DECAY = 0.95  # Of the moving average.
MIN_GOOD_STEPS = 20  # Before these, no loss counts as a spike: at first, losses fall fast.


class LossGuard(NamedTuple):
    """What the training state keeps about losses so far. All arrays are [].

    Attributes:
        mean_loss: float32 moving average of the losses of good steps.
        num_good: int32 number of good steps of the whole run.
        num_bad: int32 number of bad steps of the whole run.
        num_bad_in_a_row: int32 number of bad steps since the last good one.
    """

    mean_loss: jax.Array
    num_good: jax.Array
    num_bad: jax.Array
    num_bad_in_a_row: jax.Array


def init_guard() -> LossGuard:
    """Returns the guard before the first step."""
    counts = (jnp.zeros((), jnp.int32) for _ in range(3))  # Three arrays, since each is donated.
    return LossGuard(jnp.zeros((), jnp.float32), *counts)


def is_bad(guard: LossGuard, loss: jax.Array, spike_factor: float) -> jax.Array:
    """Returns [] bool: whether a loss is not finite, or a spike.

    Args:
        guard: Guard before the step.
        loss: [] float32 loss of the step.
        spike_factor: Factor above the usual loss from which on a loss is a spike; 0: no loss is.
    """
    is_spike = (guard.num_good >= MIN_GOOD_STEPS) & (loss > spike_factor * guard.mean_loss)
    return ~jnp.isfinite(loss) | (is_spike & (spike_factor > 0))


def next_guard(guard: LossGuard, loss: jax.Array, bad: jax.Array) -> LossGuard:
    """Returns the guard after a step.

    Args:
        guard: Guard before the step.
        loss: [] float32 loss of the step.
        bad: [] bool, from `is_bad`.
    """
    decay = jnp.minimum(DECAY, guard.num_good / (guard.num_good + 1.0))  # At first the plain mean.
    mean = decay * guard.mean_loss + (1 - decay) * jnp.where(bad, 0.0, loss)
    return LossGuard(
        mean_loss=jnp.where(bad, guard.mean_loss, mean),
        num_good=guard.num_good + ~bad,
        num_bad=guard.num_bad + bad,
        num_bad_in_a_row=jnp.where(bad, guard.num_bad_in_a_row + 1, 0),
    )
