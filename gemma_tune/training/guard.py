"""Finds steps that would do harm: a loss that is no number, or one far above those before.

What is usual is a moving average of the loss, which is part of the training state, so that a resumed run judges as one
that was never stopped. A bad step's update is left out inside the compiled step (as PaLM left out the batches of its
loss spikes, arXiv:2204.02311, section 5.1); whether the run then stops or goes on, the loop decides.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

DECAY = 0.95
NUM_FIRST = 20  # Good steps before a spike is one: losses fall fast at first.


class LossGuard(NamedTuple):
    """A part of the training state. All [].

    mean_loss: float32, of good steps. num_good, num_bad: int32, of the whole run. num_bad_in_a_row: int32.
    """

    mean_loss: jax.Array
    num_good: jax.Array
    num_bad: jax.Array
    num_bad_in_a_row: jax.Array


def init_guard() -> LossGuard:
    """Returns the guard before the first step."""
    counts = (jnp.zeros((), jnp.int32) for _ in range(3))  # Three arrays: each is donated.
    return LossGuard(jnp.zeros((), jnp.float32), *counts)


def is_bad(guard: LossGuard, loss: jax.Array, spike_factor: float) -> jax.Array:
    """Returns [] bool: whether a loss is no finite number, or more than spike_factor times the usual one (0: never)."""
    is_spike = (guard.num_good >= NUM_FIRST) & (loss > spike_factor * guard.mean_loss)
    return ~jnp.isfinite(loss) | (is_spike & (spike_factor > 0))


def next_guard(guard: LossGuard, loss: jax.Array, bad: jax.Array) -> LossGuard:
    """Returns the guard after a step with this loss."""
    decay = jnp.minimum(DECAY, guard.num_good / (guard.num_good + 1.0))  # At first the plain mean.
    mean = decay * guard.mean_loss + (1 - decay) * jnp.where(bad, 0.0, loss)
    return LossGuard(
        mean_loss=jnp.where(bad, guard.mean_loss, mean),
        num_good=guard.num_good + ~bad,
        num_bad=guard.num_bad + bad,
        num_bad_in_a_row=jnp.where(bad, guard.num_bad_in_a_row + 1, 0),
    )
