"""The next-token loss, without ever holding the logits.

With a vocabulary of 262,144 the logits of 2,048 tokens are 2.1 GB in float32, and their gradient again as much. Here
the vocabulary is read in tiles with a running log-sum-exp, as in Cut Cross-Entropy (arXiv:2411.09009), so that memory
is O(T·D + tile·T).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gemma_tune.models.lm_head import LMHead, gather_lm_head_rows, num_rows, slice_lm_head_rows
from gemma_tune.training.losses.vocabulary_tiles import (
    VOCABULARY_TILE,
    backward_pass,
    forward_pass,
    gradient_in_hidden,
    target_losses,
    weighted_sums,
)


class LossSums(NamedTuple):
    """Sums over tokens, all [] float32. Divide only after adding up everything that counts as one batch.

    Attributes:
        loss_sum: Sum of weight · cross-entropy, in nats.
        weight_sum: Sum of the weights.
        correct_sum: Sum of the weights where the target is the likeliest token.
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
    tile: int = VOCABULARY_TILE,
) -> LossSums:
    """Sums the cross-entropy of next-token predictions from hidden states.

    With h the hidden state, w_v the rows of the head and y the target, a token's loss is log Σ_v exp z_v − z_y for
    logits z_v = h·w_v, or z_v = c·tanh(h·w_v / c) with a soft cap c (Gemma 2, arXiv:2408.00118). Its gradient in h is
    Σ_v p_v·z'_v·w_v − z'_y·w_y.

    Args:
        hidden: [T, D] final hidden states of the target positions, in any float dtype.
        head: [V, D] tied embedding; V need not be a multiple of `tile`. A quantized one, [V, D, 1], is dequantized tile
            by tile, and can't be trained. A fake quantized one is rounded tile by tile; its gradient is that of the
            rounded rows.
        target_ids: [T] int32.
        weights: [T] float32; 0 drops a position.
        soft_cap: Soft cap c, or None.
        head_is_trained: Whether the head needs a gradient. If not, the gradient in `hidden` is computed in the forward
            pass, and the head is read once instead of three times.
        tile: Rows of the head in a tile.

    Returns:
        LossSums; gradients flow through loss_sum alone.
    """
    loss = _trained_head_loss if head_is_trained else _frozen_head_loss
    loss_sum, correct_sum = loss(soft_cap, tile, hidden, head, target_ids, weights.astype(jnp.float32))
    return LossSums(loss_sum, jnp.sum(weights, dtype=jnp.float32), lax.stop_gradient(correct_sum))


class TargetScores(NamedTuple):
    """Predictions of given tokens.

    Attributes:
        log_probs: [T] float32 log-probability of each target, in nats.
        is_likeliest: [T] bool, whether no token is likelier than the target.
    """

    log_probs: jax.Array
    is_likeliest: jax.Array


def linear_target_scores(
    hidden: jax.Array,
    head: LMHead,
    target_ids: jax.Array,
    *,
    soft_cap: float | None = None,
    tile: int = VOCABULARY_TILE,
) -> TargetScores:
    """Returns the score of each target, not summed up and without a gradient.

    Arguments as in `fused_linear_cross_entropy`.
    """
    running = forward_pass(soft_cap, tile, hidden, _WholeHead(head, target_ids), with_gradient=False)
    losses, is_likeliest = target_losses(running)
    return TargetScores(-losses, is_likeliest)


class _WholeHead(NamedTuple):
    """A `Vocabulary` of all rows of a head."""

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


# A frozen head: the forward pass also computes the gradient in `hidden`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _frozen_head_loss(soft_cap, tile, hidden, head, target_ids, weights):
    running = forward_pass(soft_cap, tile, hidden, _WholeHead(head, target_ids), with_gradient=False)
    return weighted_sums(running, weights)


def _frozen_head_forward(soft_cap, tile, hidden, head, target_ids, weights):
    running = forward_pass(soft_cap, tile, hidden, _WholeHead(head, target_ids), with_gradient=True)
    gradient = gradient_in_hidden(running, gather_lm_head_rows(head, target_ids), weights)
    return weighted_sums(running, weights), (gradient, jnp.empty(0, hidden.dtype))


def _frozen_head_backward(soft_cap, tile, saved, cotangents):
    del soft_cap, tile
    gradient, like_hidden = saved
    # Rounded only after it was multiplied by the loss scale: that is what the scale is for.
    return ((gradient * cotangents[0]).astype(like_hidden.dtype), None, None, None)


_frozen_head_loss.defvjp(_frozen_head_forward, _frozen_head_backward)


# A trained head: the backward pass reads the tiles again, and computes both gradients.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _trained_head_loss(soft_cap, tile, hidden, head, target_ids, weights):
    running = forward_pass(soft_cap, tile, hidden, _WholeHead(head, target_ids), with_gradient=False)
    return weighted_sums(running, weights)


def _trained_head_forward(soft_cap, tile, hidden, head, target_ids, weights):
    running = forward_pass(soft_cap, tile, hidden, _WholeHead(head, target_ids), with_gradient=False)
    log_total = running.top + jnp.log(running.total)
    return weighted_sums(running, weights), (hidden, head, target_ids, weights, log_total)


def _trained_head_backward(soft_cap, tile, saved, cotangents):
    hidden, head, target_ids, weights, log_total = saved
    (values,), tree = jax.tree.flatten(head)  # An array, or a fake quantized one.
    vocabulary, scale = _WholeHead(head, target_ids), weights * cotangents[0]
    hidden_gradient, head_gradient = backward_pass(soft_cap, tile, hidden, vocabulary, scale, log_total, values)
    return hidden_gradient.astype(hidden.dtype), jax.tree.unflatten(tree, [head_gradient]), None, None


_trained_head_loss.defvjp(_trained_head_forward, _trained_head_backward)
