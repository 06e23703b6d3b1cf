"""Computes log-likelihoods of continuations: how probable a model finds a text after another.

The texts are packed into rows, one program computes all rows of a length, and the logits are never held.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gemma_tune.evaluation.likelihood.continuation_batches import ContinuationBatch, Pair, continuation_batches
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.functional import (
    Params,
    check_text_only,
    final_soft_cap,
    hidden_states,
    lm_head_weights,
    parameters,
    params_scope,
)
from gemma_tune.models.restored_layers import restored_layers
from gemma_tune.models.sharding.layers import batch_sharded_inputs, enable_mesh_sharding
from gemma_tune.models.sharding.placement import mesh_sharding_of
from gemma_tune.runtime.backend import keras
from gemma_tune.runtime.processes import fetch_to_host
from gemma_tune.training.losses.cross_entropy import TargetScores, linear_target_scores
from gemma_tune.training.losses.sharded import sharded_target_scores

MAX_LENGTH = 8192  # Default limit of a context with its continuation, in tokens.


class LogLikelihood(NamedTuple):
    """Score of a continuation.

    Attributes:
        log_prob: Log-probability of all its tokens together, in nats.
        is_greedy: Whether each of its tokens is the likeliest after those before it.
    """

    log_prob: float
    is_greedy: bool


class LogLikelihoodScorer:
    """Computes log-likelihoods with one model, and keeps the compiled programs.

    Args:
        model: CausalLM, on one device or on a mesh. It is left as it is.
        max_length: Most tokens that the model reads to predict a continuation; longer contexts lose their beginning, as
            in lm-eval.

    Raises:
        ModelError: The model needs more than text.
    """

    def __init__(self, model: keras.Model, max_length: int = MAX_LENGTH):
        check_text_only(model)
        self.max_length = max_length
        self._model, self._sharding = model, mesh_sharding_of(model.backbone)
        self._scores = jax.jit(self._scores_fn)

    def score(
        self, pairs: Sequence[Pair], advance: Callable[[int], object] = lambda count: None
    ) -> list[LogLikelihood]:
        """Returns the score of each continuation.

        Args:
            pairs: Token ids of contexts, `<bos>` included, and of their continuations.
            advance: Called with the number of pairs that were scored since the last call.

        Raises:
            DataError: A context or a continuation is empty, or a continuation is longer than the limit.
            ModelError: The model can't run on packed text.
        """
        log_probs, is_greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        num_parts = self._sharding.shape.num_row_shards if self._sharding else 1

        def add_up(scores: TargetScores, of_pairs: np.ndarray) -> None:
            known = of_pairs >= 0
            # In float64: a long text has thousands of tokens.
            np.add.at(log_probs, of_pairs[known], fetch_to_host(scores.log_probs)[known].astype(np.float64))
            np.logical_and.at(is_greedy, of_pairs[known], fetch_to_host(scores.is_likeliest)[known])
            advance(len(np.unique(of_pairs[known])))

        groups = parameters(self._model)
        params = {**groups.trainable, **groups.frozen}
        with restored_layers(self._model.backbone):
            enable_packing(self._model.backbone)
            if self._sharding:
                enable_mesh_sharding(self._model.backbone, self._sharding)
            running = None
            for batch, of_pairs in continuation_batches(pairs, self.max_length, num_parts):
                scores = self._scores(params, self._on_devices(batch))
                if running:  # One batch is computed while the next is prepared, and no queue grows.
                    add_up(*running)
                running = scores, of_pairs
            if running:
                add_up(*running)
        return [LogLikelihood(float(value), bool(each)) for value, each in zip(log_probs, is_greedy, strict=True)]

    def score_rolling(
        self, texts: Sequence[Sequence[int]], prefix_id: int, advance: Callable[[int], object] = lambda count: None
    ) -> list[float]:
        """Returns the log-probability of each whole text, in nats.

        Each token is predicted once. A text longer than `max_length` is cut into windows; the last one has as much
        context as fits.

        Args:
            texts: Token ids of the texts, without `<bos>`.
            prefix_id: Token before a text: `<bos>`.
            advance: Called with the number of windows that were scored since the last call.
        """
        pairs, numbers = [], []
        for number, text in enumerate(texts):
            ids = [prefix_id, *text]
            for start in range(0, len(text), self.max_length):
                pairs.append((ids[max(0, start - self.max_length) : start + 1], text[start : start + self.max_length]))
                numbers.append(number)
        totals = np.zeros(len(texts))
        np.add.at(totals, np.array(numbers, int), [each.log_prob for each in self.score(pairs, advance)])
        return totals.tolist()

    def _scores_fn(self, params: Params, batch: ContinuationBatch) -> TargetScores:
        """Returns the scores of a batch's targets, [P, T]."""
        backbone, sharding = self._model.backbone, self._sharding
        soft_cap = final_soft_cap(backbone)
        with params_scope(self._model, params), batch_sharded_inputs() if sharding else contextlib.nullcontext():
            hidden = hidden_states(backbone, batch.token_ids, batch.segment_ids, batch.positions)
            head = lm_head_weights(backbone)
            if sharding:
                return sharded_target_scores(sharding, hidden, head, batch.places, batch.target_ids, soft_cap=soft_cap)
            of_targets = hidden.reshape(-1, hidden.shape[-1])[batch.places[0]]
            scores = linear_target_scores(of_targets, head, batch.target_ids[0], soft_cap=soft_cap)
        return jax.tree.map(lambda values: values[None], scores)

    def _on_devices(self, batch: ContinuationBatch) -> ContinuationBatch:
        if not self._sharding:
            return batch
        put, rows, targets = self._sharding.put_batch, tuple(batch[:3]), tuple(batch[3:])
        return ContinuationBatch(
            *put(len(batch.token_ids), lambda start, stop: tuple(field[start:stop] for field in rows)),
            *put(len(batch.places), lambda start, stop: tuple(field[start:stop] for field in targets)),
        )


def log_likelihoods(
    model: keras.Model,
    pairs: Sequence[Pair],
    *,
    max_length: int = MAX_LENGTH,
    advance: Callable[[int], object] = lambda count: None,
) -> list[LogLikelihood]:
    """Returns how probable a model finds each continuation after its context.

    Arguments and errors are those of `LogLikelihoodScorer` and its `score`.
    """
    return LogLikelihoodScorer(model, max_length).score(pairs, advance)
