"""Passes over the rows of an LM head, tile by tile, that compute losses and gradients without holding the logits.

A running log-sum-exp goes from tile to tile, as in Cut Cross-Entropy (arXiv:2411.09009).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from gemma_tune.models.lm_head import over_vocabulary_tiles

VOCABULARY_TILE = 4096  # Rows of the head in a tile.


class Vocabulary(Protocol):
    """The rows of an LM head that a pass reads, and the rows of the targets among them."""

    @property
    def num_rows(self) -> int:
        """Number of rows to read."""

    def rows(self, first: Any, count: int, dtype: Any) -> jax.Array:
        """Returns [n, D] rows of a tile. `first` may be a traced value."""

    def find(self, first: Any, count: int) -> tuple[jax.Array, jax.Array]:
        """Returns whether each target's row is in a tile, [T], and its index there, [T]."""


class Running(NamedTuple):
    """What is known after some tiles. All are float32.

    Attributes:
        top: [T] largest logit so far.
        total: [T] Σ exp(logit − top).
        target: [T] logit of the target, once its tile was read.
        target_slope: [T] dz/dx at the target; 1 without a soft cap.
        weighted_rows: [T, D] Σ exp(logit − top) · slope · row; None if no gradient is computed.
    """

    top: jax.Array
    total: jax.Array
    target: jax.Array
    target_slope: jax.Array
    weighted_rows: jax.Array | None


def forward_pass(
    soft_cap: float | None, tile: int, hidden: jax.Array, vocabulary: Vocabulary, with_gradient: bool
) -> Running:
    """Reads the rows of a head tile by tile, and sums up what the loss needs.

    Args:
        soft_cap: Soft cap of the logits, or None.
        tile: Number of rows in a tile.
        hidden: [T, D] hidden states.
        vocabulary: Rows and targets.
        with_gradient: Whether `weighted_rows` are computed.
    """
    num_tokens, width = hidden.shape
    start = Running(
        top=jnp.full((num_tokens,), -jnp.inf, jnp.float32),
        total=jnp.zeros((num_tokens,), jnp.float32),
        target=jnp.zeros((num_tokens,), jnp.float32),
        target_slope=jnp.ones((num_tokens,), jnp.float32),
        weighted_rows=jnp.zeros((num_tokens, width), jnp.float32) if with_gradient else None,
    )

    def visit(running: Running, first, count) -> Running:
        rows = vocabulary.rows(first, count, hidden.dtype)
        logits, slope = tile_logits(soft_cap, rows, hidden)
        top = jnp.maximum(running.top, logits.max(axis=1))
        shrink = jnp.exp(running.top - top)
        unnormalized = jnp.exp(logits - top[:, None])
        inside, index = vocabulary.find(first, count)
        at_target = (jnp.arange(num_tokens), index)
        weighted_rows = running.weighted_rows
        if weighted_rows is not None:
            sloped = unnormalized if slope is None else unnormalized * slope
            weighted_rows = weighted_rows * shrink[:, None] + _dot(sloped.astype(rows.dtype), rows)
        return Running(
            top=top,
            total=running.total * shrink + unnormalized.sum(axis=1),
            target=jnp.where(inside, logits[at_target], running.target),
            target_slope=running.target_slope
            if slope is None
            else jnp.where(inside, slope[at_target], running.target_slope),
            weighted_rows=weighted_rows,
        )

    return over_vocabulary_tiles(vocabulary.num_rows, tile, start, visit)


def tile_logits(soft_cap: float | None, rows: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Computes the logits of a tile.

    Tokens come first, so that both products with the rows, this one and the one that weighs them, run at full speed on
    CPU. The other way round, the second has to transpose both of its operands, and takes up to twice as long.

    Args:
        soft_cap: Soft cap of the logits, or None.
        rows: [n, D] rows of the head.
        hidden: [T, D] hidden states.

    Returns:
        [T, n] logits in float32, and their slope dz/dx; None without a soft cap.
    """
    by_width = (((1,), (1,)), ((), ()))  # A product with rows.T would be computed in float32 on CPU, in bfloat16 too.
    logits = lax.dot_general(hidden, rows, by_width, preferred_element_type=jnp.float32)
    if soft_cap is None:
        return logits, None
    ratio = jnp.tanh(logits / soft_cap)
    return soft_cap * ratio, 1.0 - jnp.square(ratio)


def target_losses(running: Running) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of each target, [T] float32 in nats, and whether the target is the likeliest token, [T] bool."""
    return running.top + jnp.log(running.total) - running.target, running.target >= running.top


def weighted_sums(running: Running, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the weighted losses, and the sum of the weights where the target is the likeliest token."""
    losses, is_likeliest = target_losses(running)
    return jnp.sum(losses * weights), jnp.sum(is_likeliest.astype(jnp.float32) * weights)


def gradient_in_hidden(running: Running, target_rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the gradient of the summed loss in the hidden states, [T, D] float32.

    Args:
        running: Sums after the last tile, with `weighted_rows`.
        target_rows: [T, D] rows of the targets.
        weights: [T] loss weights.
    """
    assert running.weighted_rows is not None
    expected_row = running.weighted_rows / running.total[:, None]
    return (expected_row - target_rows.astype(jnp.float32) * running.target_slope[:, None]) * weights[:, None]


def backward_pass(
    soft_cap: float | None,
    tile: int,
    hidden: jax.Array,
    vocabulary: Vocabulary,
    scale: jax.Array,
    log_total: jax.Array,
    head_values: jax.Array,
    add_up: Callable[[jax.Array], jax.Array] = lambda rows: rows,
) -> tuple[jax.Array, jax.Array]:
    """Reads the rows again, and computes the gradients in the hidden states and in the head.

    Args:
        soft_cap, tile, hidden, vocabulary: As in `forward_pass`.
        scale: [T] factor of each token's loss.
        log_total: [T] log Σ exp of all logits.
        head_values: Array of the shape and dtype of the head's gradient.
        add_up: Takes the gradient of the rows that a tile reads, and returns the gradient of its `count` rows.

    Returns:
        The gradients in the hidden states, [T, D] float32, and in the head.
    """

    def visit(carry, first, count):
        hidden_gradient, head_gradient = carry
        rows = vocabulary.rows(first, count, hidden.dtype)
        logits, slope = tile_logits(soft_cap, rows, hidden)
        inside, index = vocabulary.find(first, count)
        is_target = inside[:, None] & (index[:, None] == jnp.arange(rows.shape[0]))
        by_logit = (jnp.exp(logits - log_total[:, None]) - is_target) * scale[:, None]
        by_logit = (by_logit if slope is None else by_logit * slope).astype(rows.dtype)
        rows_gradient = add_up(_dot(by_logit.T, hidden)).astype(head_gradient.dtype)
        return (
            hidden_gradient + _dot(by_logit, rows),
            lax.dynamic_update_slice_in_dim(head_gradient, rows_gradient, first, axis=0),
        )

    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(head_values))
    return over_vocabulary_tiles(vocabulary.num_rows, tile, start, visit)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
