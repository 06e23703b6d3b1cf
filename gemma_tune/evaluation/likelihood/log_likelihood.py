"""Computes log-likelihoods of continuations: how probable a model finds a text after another.

The texts are packed into rows in which they share what they begin with, and the logits are never held.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gemma_tune.evaluation.likelihood.continuation_batches import Pair, continuation_batches
from gemma_tune.evaluation.likelihood.scoring_program import ScoringProgram
from gemma_tune.models.functional import check_text_only
from gemma_tune.runtime.backend import is_single_cpu, keras
from gemma_tune.runtime.process_memory import keep_freed_memory, release_freed_memory
from gemma_tune.runtime.processes import fetch_to_host
from gemma_tune.training.losses.cross_entropy import TargetScores

MAX_LENGTH = 8192  # Default limit of a context with its continuation, in tokens.
_PART_TOKENS, _PART_TOKENS_ON_CPU = 8192, 2048  # Positions that a device computes at once.


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
        self._program = ScoringProgram(model)

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

        def add_up(scores: TargetScores, of_pairs: np.ndarray) -> None:
            known = of_pairs >= 0
            # In float64: a long text has thousands of tokens.
            np.add.at(log_probs, of_pairs[known], fetch_to_host(scores.log_probs)[known].astype(np.float64))
            np.logical_and.at(is_greedy, of_pairs[known], fetch_to_host(scores.is_likeliest)[known])
            advance(len(np.unique(of_pairs[known])))

        program, part_tokens = self._program, _PART_TOKENS_ON_CPU if is_single_cpu() else _PART_TOKENS
        settings = self.max_length, program.num_parts, part_tokens, program.shares_prefixes
        running = None
        with program.prepared_model() as params:
            for batch, of_pairs in continuation_batches(pairs, *settings):
                scores = program(params, batch)
                if running:  # One batch is computed while the next is prepared, and no queue grows.
                    add_up(*running)
                elif is_single_cpu():  # What compiling took is given back; what a batch takes, the next one takes too.
                    release_freed_memory()
                    keep_freed_memory()
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
