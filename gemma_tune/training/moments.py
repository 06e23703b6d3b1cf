"""The moving averages of AdamW and Lion.

They are Optax's, except that 1 - b1 and 1 - b2 are given. Optax subtracts: if b1 is a constant, in double precision,
and if it is an input of the compiled step, in float32, which gives another number.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def scale_by_adam(b1: Any, b2: Any, one_minus_b1: Any, one_minus_b2: Any, epsilon: Any) -> optax.GradientTransformation:
    """Returns the update rule of Adam (arXiv:1412.6980), without the learning rate, as `optax.scale_by_adam`.

    Args:
        b1, b2: Decay of the first and of the second moment.
        one_minus_b1, one_minus_b2: Share of the new gradient in them.
        epsilon: Term in the denominator.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple:
        del params
        count = optax.safe_increment(state.count)
        first = _average(updates, state.mu, b1, one_minus_b1)
        second = _average(jax.tree.map(jnp.square, updates), state.nu, b2, one_minus_b2)
        scaled = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + epsilon),
            optax.tree.bias_correction(first, b1, count),
            optax.tree.bias_correction(second, b2, count),
        )
        return scaled, optax.ScaleByAdamState(count=count, mu=first, nu=second)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def scale_by_lion(b1: Any, b2: Any, one_minus_b1: Any, one_minus_b2: Any) -> optax.GradientTransformation:
    """Returns the update rule of Lion (arXiv:2302.06675), without the learning rate, as `optax.scale_by_lion`.

    Args:
        b1, b2: Share of the moment in the update, and in the next moment.
        one_minus_b1, one_minus_b2: Share of the new gradient in them.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple:
        del params
        signs = jax.tree.map(jnp.sign, _average(updates, state.mu, b1, one_minus_b1))
        moment = _average(updates, state.mu, b2, one_minus_b2)
        return signs, optax.ScaleByLionState(count=optax.safe_increment(state.count), mu=moment)

    return optax.GradientTransformation(optax.scale_by_lion().init, update)


def _average(new: Any, old: Any, decay: Any, one_minus_decay: Any) -> Any:
    return jax.tree.map(lambda one, other: one_minus_decay * one + decay * other, new, old)
