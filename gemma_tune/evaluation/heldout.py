"""Held-out loss, perplexity and token accuracy."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from gemma_tune.data import Batch


def evaluate_batches(
    step: Callable[[Batch], Any], batches: Iterable[Batch], before_each: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Scores batches, each token counting once.

    Args:
        step: Batch -> sums with `loss_sum`, `weight_sum` and `correct_sum`.
        batches: At least one with something to score.
        before_each: Called before each; may raise to leave.

    Returns:
        loss (mean nats per learnt token), perplexity (exp(loss)), token_accuracy (share of learnt tokens that are the
        model's likeliest), num_tokens.
    """
    sums: list[Any] = []
    for batch in batches:
        before_each()
        jax.block_until_ready(sums[-1:])  # One is computed while the next is made; no queue grows.
        sums.append(step(batch))
    num_tokens = sum(float(part.weight_sum) for part in sums)
    loss = sum(float(part.loss_sum) for part in sums) / num_tokens
    return {
        "loss": loss,
        "perplexity": perplexity_of(loss),
        "token_accuracy": sum(float(part.correct_sum) for part in sums) / num_tokens,
        "num_tokens": num_tokens,
    }


def perplexity_of(loss: float) -> float:
    """Returns exp(loss)."""
    return math.exp(min(loss, 700.0))  # exp(710) overflows.
