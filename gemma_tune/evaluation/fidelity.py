"""How far one model's next-token predictions lie from another's, without ever holding the logits.

With a vocabulary of 262,144 the logits of 1,000 positions are 1 GB in float32 for each of the two models. Here both
heads are visited block by block, in lock step, and what is kept of each position is a handful of running sums. The
figures are those of llama.cpp's `llama-perplexity --kl-divergence`: divergence of the whole distribution, and how often
the likeliest token is the same.
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
from gemma_tune.training.losses.cross_entropy import VOCABULARY_BLOCK, block_logits

_MOST_POSITIONS = 1024  # At a time: each pass over the heads makes their rows float anew.
_POSITION_BUCKET = 64


class SoftCappedLMHead(NamedTuple):
    """What makes logits of hidden states h: c·tanh(h·w / c) for each row w, or h·w.

    weights: [V, D], quantized [V, D, 1], or trained quantization-aware. soft_cap: c, or None.
    """

    weights: jax.Array | Quantized | FakeQuantized
    soft_cap: float | None


class PositionFigures(NamedTuple):
    """Of each scored position, [T]: float32 in nats, or bool.

    kl: KL(reference || candidate) of the next token's distribution. reference_loss, loss: −log of the target's
        probability. agrees: Both have the same likeliest token. reference_is_correct, is_correct: It is the target.
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
    block: int = VOCABULARY_BLOCK,
    advance: Callable[[int], None] | None = None,
) -> PositionFigures:
    """Compares two models at the same positions.

    With p and q the two distributions, KL(p || q) = Σ_v p_v (log p_v − log q_v). Logits and sums are float32. Where one
    vocabulary has more rows (some checkpoints fill theirs up), those that both have count.

    Args:
        reference, candidate: The heads.
        reference_hidden, candidate_hidden: [T, D] final hidden states; D may differ between the models.
        target_ids: [T] int32.
        block: Rows of a head at a time; a multiple of 256 for heads with doubly quantized scales.
        advance: Called with how many more positions are done.
    """
    num_positions = len(target_ids)
    size = min(_MOST_POSITIONS, -(-num_positions // _POSITION_BUCKET) * _POSITION_BUCKET)
    parts = []
    for start in range(0, num_positions, size):
        count = min(size, num_positions - start)
        rows = (_filled(array[start : start + count], size) for array in (reference_hidden, candidate_hidden))
        figures = _compare(
            reference.soft_cap,
            candidate.soft_cap,
            block,
            reference.weights,
            candidate.weights,
            *rows,
            _filled(target_ids[start : start + count], size),
        )
        parts.append([np.asarray(values)[:count] for values in figures])
        if advance:
            advance(count)
    return PositionFigures(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def reference_quality(figures: PositionFigures) -> Quality:
    """Returns the reference's own figures."""
    return _quality(figures.reference_loss, figures.reference_is_correct)


def candidate_quality(figures: PositionFigures) -> Quality:
    """Returns the candidate's own figures."""
    return _quality(figures.loss, figures.is_correct)


def divergence(figures: PositionFigures, example_ids: np.ndarray) -> Divergence:
    """Sums up the positions.

    Args:
        figures: From `compare_positions`.
        example_ids: [T] which example each position belongs to, counted from 0. Tokens of an answer go up and down
            together, so that the standard error is that of a ratio of sums over examples.
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


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    """Zeros behind, so that every call has the same shape."""
    return np.pad(array, ((0, size - len(array)),) + ((0, 0),) * (array.ndim - 1))


class _Running(NamedTuple):
    """What is known of both models after some blocks, [2, T]. likeliest: int32; the others are float32.

    Both go through the same operations, so that a model's divergence from itself is 0 and not a rounding.
    """

    top: jax.Array  # Largest logit so far.
    likeliest: jax.Array  # Its row.
    total: jax.Array  # Σ exp(logit − top).
    target: jax.Array  # The target's logit, once its block was visited.


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compare(reference_cap, candidate_cap, block, reference, candidate, reference_hidden, candidate_hidden, target_ids):
    zeros = jnp.zeros((2, *target_ids.shape), jnp.float32)
    start = _Running(jnp.full_like(zeros, -jnp.inf), jnp.zeros(zeros.shape, jnp.int32), zeros, zeros)

    def logits_of(cap, head, hidden, first, count):
        return block_logits(cap, slice_lm_head_rows(head, first, count, hidden.dtype), hidden)[0]

    def visit(carry, first, count):
        running, weighted = carry
        a = logits_of(reference_cap, reference, reference_hidden, first, count)
        b = logits_of(candidate_cap, candidate, candidate_hidden, first, count)
        new, unnormalized = _visited(running, jnp.stack([a, b]), first, target_ids)
        weighted = weighted * jnp.exp(running.top[0] - new.top[0]) + (unnormalized[0] * (a - b)).sum(axis=1)
        return new, weighted

    vocabulary = min(num_rows(reference), num_rows(candidate))
    end, weighted = over_vocabulary_tiles(vocabulary, block, (start, zeros[0]), visit)
    log_total = jnp.log(end.total)
    # Σ p (a − b) − log Σ exp a + log Σ exp b. It is never negative; what rounding makes of 0 may be.
    kl = weighted / end.total[0] - (end.top[0] - end.top[1]) - (log_total[0] - log_total[1])
    losses, is_correct = end.top - end.target + log_total, end.target >= end.top
    return jnp.maximum(kl, 0.0), *losses, end.likeliest[0] == end.likeliest[1], *is_correct


def _visited(running: _Running, logits, first, target_ids) -> tuple[_Running, jax.Array]:
    """Returns what is known after another block of logits, [2, T, block], and exp(logit − top) of it."""
    count = logits.shape[2]
    block_top = logits.max(axis=2)
    top = jnp.maximum(running.top, block_top)
    unnormalized = jnp.exp(logits - top[..., None])
    inside = (target_ids >= first) & (target_ids < first + count)
    places = jnp.clip(target_ids - first, 0, count - 1)
    new = _Running(
        top=top,
        likeliest=jnp.where(block_top > running.top, first + jnp.argmax(logits, axis=2), running.likeliest),
        total=running.total * jnp.exp(running.top - top) + unnormalized.sum(axis=2),
        target=jnp.where(inside, logits[:, jnp.arange(len(target_ids)), places], running.target),
    )
    return new, unnormalized
