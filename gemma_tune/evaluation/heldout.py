"""Computes held-out loss, perplexity and token accuracy."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from gemma_tune.data import Batch

# Held-out figures as tables show them: name, label and format.
HELDOUT_LABELS = (
    ("loss", "loss", ".4f"),
    ("perplexity", "perplexity", ".2f"),
    ("token_accuracy", "token accuracy", ".1%"),
)


def evaluate_batches(
    step: Callable[[Batch], Any],
    batches: Iterable[Batch],
    before_each: Callable[[], None] = lambda: None,
    labels: Sequence[str] = (),
) -> dict[str, float]:
    """Returns the metrics of batches, in which each target token counts once.

    Args:
        step: Function of a batch that returns its `loss_sum`, `weight_sum` and `correct_sum`.
        batches: Batches, of which at least one has a target token.
        before_each: Called before each batch; may raise an exception to stop.
        labels: Label of each batch, whose loss is returned too as `loss/LABEL`; empty: none.

    Returns:
        loss (mean over the target tokens, in nats), perplexity (exp(loss)), token_accuracy (share of target tokens that
        the model predicts as the likeliest), num_tokens (number of target tokens).
    """
    sums: list[Any] = []
    for batch in batches:
        before_each()
        jax.block_until_ready(sums[-1:])  # One batch is computed while the next is prepared, and no queue grows.
        sums.append(step(batch))
    num_tokens = sum(float(part.weight_sum) for part in sums)
    loss = _loss_of(sums)
    of_labels = {
        label: [part for part, other in zip(sums, labels, strict=True) if other == label]
        for label in dict.fromkeys(labels)
    }
    return {
        "loss": loss,
        "perplexity": perplexity_of(loss),
        "token_accuracy": sum(float(part.correct_sum) for part in sums) / num_tokens,
        "num_tokens": num_tokens,
        **{f"loss/{label}": _loss_of(parts) for label, parts in of_labels.items()},
    }


def _loss_of(parts: Sequence[Any]) -> float:
    return sum(float(part.loss_sum) for part in parts) / sum(float(part.weight_sum) for part in parts)


def perplexity_of(loss: float) -> float:
    """Returns exp(loss); of a loss above 700, exp(700)."""
    return math.exp(min(loss, 700.0))  # exp(710) overflows.
