"""The next-token loss, without ever holding the logits.

With a vocabulary of 262,144 the logits of 2,048 tokens are 2.1 GB in float32, and their gradient again as much. Here
the vocabulary is visited in blocks with a running log-sum-exp, as in Cut Cross-Entropy (arXiv:2411.09009), so that
memory is O(T·D + block·T).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from gemma_tune.models.lm_head import LMHead, gather_lm_head_rows, num_rows, over_vocabulary_tiles, slice_lm_head_rows

VOCABULARY_BLOCK = 4096


class LossSums(NamedTuple):
    """Sums over tokens, all [] float32. Divide only after adding up everything that counts as one batch.

    loss_sum: of weight · cross-entropy, in nats. weight_sum: of weights. correct_sum: of weight where the target is the
        likeliest token.
    """

    loss_sum: jax.Array
    weight_sum: jax.Array
    correct_sum: jax.Array


def fused_linear_cross_entropy(
    hidden: jax.Array,
    head: LMHead,
    target_ids: jax.Array,
    weights: jax.Array,
    *,
    soft_cap: float | None = None,
    head_is_trained: bool = False,
    block: int = VOCABULARY_BLOCK,
) -> LossSums:
    """Sums the cross-entropy of next-token predictions from hidden states.

    With h the hidden state, w_v the rows of the head and y the target, a token's loss is log Σ_v exp z_v − z_y for
    logits z_v = h·w_v, or z_v = c·tanh(h·w_v / c) with a soft cap c (Gemma 2, arXiv:2408.00118). Its gradient in h is
    Σ_v p_v·z'_v·w_v − z'_y·w_y.

    Args:
        hidden: [T, D] final hidden states of the positions to be scored, in any float dtype.
        head: [V, D] tied embedding; V need not be a multiple of `block`. A quantized one, [V, D, 1], is made float a
            block at a time, and can't be trained. A fake quantized one is rounded a block at a time; its gradient is
            that of the rounded rows.
        target_ids: [T] int32.
        weights: [T] float32; 0 drops a position.
        soft_cap: c, or None.
        head_is_trained: Whether the head needs a gradient. If not, the gradient in `hidden` is made in the forward
            pass, and the head is read once instead of three times.
        block: Rows of the head at a time.

    Returns:
        LossSums; gradients flow through loss_sum alone.
    """
    loss = _trained_head_loss if head_is_trained else _frozen_head_loss
    loss_sum, correct_sum = loss(soft_cap, block, hidden, head, target_ids, weights.astype(jnp.float32))
    return LossSums(loss_sum, jnp.sum(weights, dtype=jnp.float32), lax.stop_gradient(correct_sum))


class Vocabulary(Protocol):
    """The rows of a head that are visited, and where the targets are among them. num_rows: To be visited."""

    @property
    def num_rows(self) -> int: ...

    def rows(self, first: Any, count: int, dtype: Any) -> jax.Array:
        """Returns [n, D] rows; first may be known at run time only."""

    def find(self, first: Any, count: int) -> tuple[jax.Array, jax.Array]:
        """Returns for each target whether it is among these rows, and which of them it is, [T] each."""


class _WholeHead(NamedTuple):
    """All rows, in their order."""

    head: LMHead
    target_ids: jax.Array

    @property
    def num_rows(self) -> int:
        return num_rows(self.head)

    def rows(self, first: Any, count: int, dtype: Any) -> jax.Array:
        return slice_lm_head_rows(self.head, first, count, dtype)

    def find(self, first: Any, count: int) -> tuple[jax.Array, jax.Array]:
        inside = (self.target_ids >= first) & (self.target_ids < first + count)
        return inside, jnp.clip(self.target_ids - first, 0, count - 1)


class Running(NamedTuple):
    """What is known after some blocks. All [T] float32; weighted_rows is [T, D], or None where no gradient is made."""

    top: jax.Array  # Largest logit so far.
    total: jax.Array  # Σ exp(logit − top).
    target: jax.Array  # The target's logit, once its block was visited.
    target_slope: jax.Array  # dz/dx at the target; 1 without a soft cap.
    weighted_rows: jax.Array | None  # Σ exp(logit − top) · slope · row.


def visit_blocks(
    soft_cap: float | None, block: int, hidden: jax.Array, vocabulary: Vocabulary, with_gradient: bool
) -> Running:
    """Visits the rows of a head, `block` at a time. hidden: [T, D]."""
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
        logits, slope = block_logits(soft_cap, rows, hidden)
        top = jnp.maximum(running.top, logits.max(axis=1))
        shrink = jnp.exp(running.top - top)
        unnormalized = jnp.exp(logits - top[:, None])
        inside, index = vocabulary.find(first, count)
        place = (jnp.arange(num_tokens), index)
        weighted_rows = running.weighted_rows
        if weighted_rows is not None:
            sloped = unnormalized if slope is None else unnormalized * slope
            weighted_rows = weighted_rows * shrink[:, None] + _dot(sloped.astype(rows.dtype), rows)
        return Running(
            top=top,
            total=running.total * shrink + unnormalized.sum(axis=1),
            target=jnp.where(inside, logits[place], running.target),
            target_slope=running.target_slope
            if slope is None
            else jnp.where(inside, slope[place], running.target_slope),
            weighted_rows=weighted_rows,
        )

    return over_vocabulary_tiles(vocabulary.num_rows, block, start, visit)


def block_logits(soft_cap: float | None, rows: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Returns ([T, block] logits in float32, dz/dx or None without a soft cap) for rows [block, D] and hidden [T, D].

    Tokens first: so both products with the rows, this one and the one that weighs them, run at full speed on CPU. The
    other way round the second has to transpose both of its operands, and takes up to twice as long.
    """
    by_width = (((1,), (1,)), ((), ()))  # A product with rows.T would be of float32 on CPU, in bfloat16 too.
    logits = lax.dot_general(hidden, rows, by_width, preferred_element_type=jnp.float32)
    if soft_cap is None:
        return logits, None
    ratio = jnp.tanh(logits / soft_cap)
    return soft_cap * ratio, 1.0 - jnp.square(ratio)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def sums_of(running: Running, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of weighted losses, and that of weights where the target is the likeliest."""
    losses = running.top + jnp.log(running.total) - running.target
    correct = (running.target >= running.top).astype(jnp.float32)
    return jnp.sum(losses * weights), jnp.sum(correct * weights)


# A head that stays as it is: the forward pass makes the gradient in `hidden` along the way.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _frozen_head_loss(soft_cap, block, hidden, head, target_ids, weights):
    return sums_of(visit_blocks(soft_cap, block, hidden, _WholeHead(head, target_ids), with_gradient=False), weights)


def _frozen_head_forward(soft_cap, block, hidden, head, target_ids, weights):
    running = visit_blocks(soft_cap, block, hidden, _WholeHead(head, target_ids), with_gradient=True)
    gradient = gradient_in_hidden(running, gather_lm_head_rows(head, target_ids), weights)
    return sums_of(running, weights), (gradient, jnp.empty(0, hidden.dtype))


def gradient_in_hidden(running: Running, target_rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns [T, D] float32, of the weighted sum of losses. target_rows: [T, D]."""
    assert running.weighted_rows is not None
    expected_row = running.weighted_rows / running.total[:, None]
    return (expected_row - target_rows.astype(jnp.float32) * running.target_slope[:, None]) * weights[:, None]


def _frozen_head_backward(soft_cap, block, saved, cotangents):
    del soft_cap, block
    gradient, like_hidden = saved
    # Rounded only after it was multiplied with the loss scale: that is what the scale is for.
    return ((gradient * cotangents[0]).astype(like_hidden.dtype), None, None, None)


_frozen_head_loss.defvjp(_frozen_head_forward, _frozen_head_backward)


# A head that is trained: the backward pass visits the blocks again, and makes both gradients.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _trained_head_loss(soft_cap, block, hidden, head, target_ids, weights):
    return sums_of(visit_blocks(soft_cap, block, hidden, _WholeHead(head, target_ids), with_gradient=False), weights)


def _trained_head_forward(soft_cap, block, hidden, head, target_ids, weights):
    running = visit_blocks(soft_cap, block, hidden, _WholeHead(head, target_ids), with_gradient=False)
    return sums_of(running, weights), (hidden, head, target_ids, weights, running.top + jnp.log(running.total))


def _trained_head_backward(soft_cap, block, saved, cotangents):
    hidden, head, target_ids, weights, log_total = saved
    (values,), tree = jax.tree.flatten(head)  # An array, or one that counts as rounded.
    vocabulary, scale = _WholeHead(head, target_ids), weights * cotangents[0]
    hidden_gradient, head_gradient = both_gradients(soft_cap, block, hidden, vocabulary, scale, log_total, values)
    return hidden_gradient.astype(hidden.dtype), jax.tree.unflatten(tree, [head_gradient]), None, None


def both_gradients(
    soft_cap: float | None,
    block: int,
    hidden: jax.Array,
    vocabulary: Vocabulary,
    scale: jax.Array,
    log_total: jax.Array,
    head_values: jax.Array,
    add_up: Callable[[jax.Array], jax.Array] = lambda rows: rows,
) -> tuple[jax.Array, jax.Array]:
    """Visits the blocks again.

    Args:
        soft_cap, block, hidden, vocabulary: As in `visit_blocks`.
        scale: [T]; what each token's loss counts.
        log_total: [T]; log Σ exp of all logits.
        head_values: Of the shape and dtype that the head's gradient is to have.
        add_up: Gets the gradient of the rows that a block reads, and returns that of its `count` rows.

    Returns:
        The gradients in hidden, [T, D] float32, and in the head.
    """

    def visit(carry, first, count):
        hidden_gradient, head_gradient = carry
        rows = vocabulary.rows(first, count, hidden.dtype)
        logits, slope = block_logits(soft_cap, rows, hidden)
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
    return over_vocabulary_tiles(vocabulary.num_rows, block, start, visit)


_trained_head_loss.defvjp(_trained_head_forward, _trained_head_backward)
