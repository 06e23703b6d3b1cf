"""Measures how far a model's next-token predictions diverge from another's, without ever holding the logits.

With a vocabulary of 262,144 the logits of 1,000 positions take 1 GB in float32 for each of the two models. So the
vocabulary is visited tile by tile, for both models at once, and only a few running sums are kept of each position. The
figures are those of llama.cpp's `llama-perplexity --kl-divergence`: the divergence of the whole distribution, and how
often the likeliest token is the same.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.evaluation.comparison_figures import Divergence, Quality
from gemma_tune.evaluation.heldout import perplexity_of
from gemma_tune.models.lm_head import num_rows, over_vocabulary_tiles, slice_lm_head_rows
from gemma_tune.quantization.codes import Quantized
from gemma_tune.quantization.fake import FakeQuantized
from gemma_tune.training.losses.vocabulary_tiles import VOCABULARY_TILE, tile_logits

_MAX_POSITIONS = 1024  # Positions at a time. Each pass over the LM heads dequantizes their rows again.
_POSITION_BUCKET = 64


class SoftCappedLMHead(NamedTuple):
    """An LM head with its final logit soft cap, whose logits of hidden state h are c·tanh(h·w / c) for each row w.

    Attributes:
        weights: [V, D] floats or weights in quantization-aware training, or [V, D, 1] quantized weights.
        soft_cap: c; None for logits h·w.
    """

    weights: jax.Array | Quantized | FakeQuantized
    soft_cap: float | None


class PositionFigures(NamedTuple):
    """Figures of each target position, [T], in nats (float32) or bool.

    Attributes:
        kl: KL(reference || candidate) of the next token's distribution.
        reference_loss, loss: −log of the target's probability by the reference and by the candidate.
        agrees: Whether both models have the same likeliest token.
        reference_is_correct, is_correct: Whether the model's likeliest token is the target.
    """

    kl: np.ndarray
    reference_loss: np.ndarray
    loss: np.ndarray
    agrees: np.ndarray
    reference_is_correct: np.ndarray
    is_correct: np.ndarray


def compare_positions(
    reference: SoftCappedLMHead,
    reference_hidden: np.ndarray,
    candidate: SoftCappedLMHead,
    candidate_hidden: np.ndarray,
    target_ids: np.ndarray,
    *,
    tile: int = VOCABULARY_TILE,
    advance: Callable[[int], None] | None = None,
) -> PositionFigures:
    """Compares the predictions of two models at the same positions.

    With p and q the two distributions, KL(p || q) = Σ_v p_v (log p_v − log q_v). Logits and sums are float32. If one
    vocabulary is padded to more rows, as in some checkpoints, only the rows that both have count.

    Args:
        reference, candidate: LM heads of the models.
        reference_hidden, candidate_hidden: [T, D] final hidden states; D may differ between the models.
        target_ids: [T] int32.
        tile: Rows of the vocabulary at a time; a multiple of 256 if scales are doubly quantized.
        advance: Called with the number of positions compared since the last call.
    """
    num_positions = len(target_ids)
    size = min(_MAX_POSITIONS, -(-num_positions // _POSITION_BUCKET) * _POSITION_BUCKET)
    parts = []
    for start in range(0, num_positions, size):
        count = min(size, num_positions - start)
        rows = (_padded(array[start : start + count], size) for array in (reference_hidden, candidate_hidden))
        figures = _compare(
            reference.soft_cap,
            candidate.soft_cap,
            tile,
            reference.weights,
            candidate.weights,
            *rows,
            _padded(target_ids[start : start + count], size),
        )
        parts.append([np.asarray(values)[:count] for values in figures])
        if advance:
            advance(count)
    return PositionFigures(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def reference_quality(figures: PositionFigures) -> Quality:
    """Returns the quality of the reference's predictions."""
    return _quality(figures.reference_loss, figures.reference_is_correct)


def candidate_quality(figures: PositionFigures) -> Quality:
    """Returns the quality of the candidate's predictions."""
    return _quality(figures.loss, figures.is_correct)


def divergence(figures: PositionFigures, example_ids: np.ndarray) -> Divergence:
    """Summarizes the divergence over all positions.

    Args:
        figures: Figures from `compare_positions`.
        example_ids: [T] number of the example that each position belongs to, from 0. Since the tokens of an answer are
            correlated, the standard error is that of a ratio of sums over examples.
    """
    kl = figures.kl.astype(np.float64)
    increase = figures.loss.astype(np.float64) - figures.reference_loss
    return Divergence(
        mean_kl=float(kl.mean()),
        median_kl=float(np.median(kl)),
        p99_kl=float(np.percentile(kl, 99)),
        agreement=float(figures.agrees.mean()),
        loss_increase=float(increase.mean()),
        loss_increase_error=_standard_error(increase, example_ids),
    )


def _quality(losses: np.ndarray, is_correct: np.ndarray) -> Quality:
    loss = float(losses.astype(np.float64).mean())
    return Quality(loss, perplexity_of(loss), float(is_correct.mean()))


def _standard_error(values: np.ndarray, example_ids: np.ndarray) -> float | None:
    sums = np.bincount(example_ids, values - values.mean())
    num_examples = len(np.unique(example_ids))
    if num_examples < 2:
        return None
    return float(np.sqrt(np.square(sums).sum() * num_examples / (num_examples - 1)) / len(values))


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """Returns the array padded with zeros, so that every call has the same shape."""
    return np.pad(array, ((0, size - len(array)),) + ((0, 0),) * (array.ndim - 1))


class _Running(NamedTuple):
    """Running values of both models after some tiles of the vocabulary, [2, T], in float32 or int32.

    The operations are the same for both models, so that a model's divergence from itself is exactly 0.

    Attributes:
        top: Largest logit so far.
        likeliest: Row of that logit.
        total: Σ exp(logit − top).
        target: Logit of the target, once its tile was visited.
    """

    top: jax.Array
    likeliest: jax.Array
    total: jax.Array
    target: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compare(reference_cap, candidate_cap, tile, reference, candidate, reference_hidden, candidate_hidden, target_ids):
    zeros = jnp.zeros((2, *target_ids.shape), jnp.float32)
    start = _Running(jnp.full_like(zeros, -jnp.inf), jnp.zeros(zeros.shape, jnp.int32), zeros, zeros)

    def logits_of(cap, head, hidden, first, count):
        return tile_logits(cap, slice_lm_head_rows(head, first, count, hidden.dtype), hidden)[0]

    def visit(carry, first, count):
        running, weighted = carry
        a = logits_of(reference_cap, reference, reference_hidden, first, count)
        b = logits_of(candidate_cap, candidate, candidate_hidden, first, count)
        new, unnormalized = _visited(running, jnp.stack([a, b]), first, target_ids)
        weighted = weighted * jnp.exp(running.top[0] - new.top[0]) + (unnormalized[0] * (a - b)).sum(axis=1)
        return new, weighted

    vocabulary = min(num_rows(reference), num_rows(candidate))
    end, weighted = over_vocabulary_tiles(vocabulary, tile, (start, zeros[0]), visit)
    log_total = jnp.log(end.total)
    # Σ p (a − b) − log Σ exp a + log Σ exp b. It is never negative, but a 0 with rounding errors may be.
    kl = weighted / end.total[0] - (end.top[0] - end.top[1]) - (log_total[0] - log_total[1])
    losses, is_correct = end.top - end.target + log_total, end.target >= end.top
    return jnp.maximum(kl, 0.0), *losses, end.likeliest[0] == end.likeliest[1], *is_correct


def _visited(running: _Running, logits, first, target_ids) -> tuple[_Running, jax.Array]:
    """Returns the running values after another tile of logits, [2, T, tile], and exp(logit − top) of that tile."""
    count = logits.shape[2]
    tile_top = logits.max(axis=2)
    top = jnp.maximum(running.top, tile_top)
    unnormalized = jnp.exp(logits - top[..., None])
    inside = (target_ids >= first) & (target_ids < first + count)
    places = jnp.clip(target_ids - first, 0, count - 1)
    new = _Running(
        top=top,
        likeliest=jnp.where(tile_top > running.top, first + jnp.argmax(logits, axis=2), running.likeliest),
        total=running.total * jnp.exp(running.top - top) + unnormalized.sum(axis=2),
        target=jnp.where(inside, logits[:, jnp.arange(len(target_ids)), places], running.target),
    )
    return new, unnormalized
