"""Checks a request against what an engine can answer at all."""

import math
from collections.abc import Sequence

from gemma_tune.config_checks import MAX_TOP_K
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.serving.engine.request import BASE, Request
from gemma_tune.serving.logit_changes import MAX_BIASED_TOKENS, LogitChanges
from gemma_tune.serving.sampling import MAX_LOGPROBS, Sampling


def check_request(request: Request, adapters: Sequence[str], max_length: int, vocabulary_size: int) -> None:
    """Raises ConfigError for a request that can never be answered, with the reason.

    Args:
        request: Request to check.
        adapters: Names of the engine's adapters.
        max_length: Longest prompt and answer together, in tokens.
        vocabulary_size: Number of tokens, V.
    """
    if not request.prompt_ids:
        raise ConfigError("The prompt is empty. It must have at least one token.")
    if request.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}.")
    if len(request.prompt_ids) + request.max_new_tokens > max_length:
        raise ConfigError(
            f"The request is too long: {len(request.prompt_ids)} prompt tokens and max_new_tokens="
            f"{request.max_new_tokens} exceed max_length={max_length}."
        )
    if request.adapter != BASE and request.adapter not in adapters:
        hint = did_you_mean(request.adapter, adapters)
        raise ConfigError(f"There is no adapter {request.adapter!r}.{hint} Adapters: {', '.join(adapters) or 'none'}.")
    outside = [token for token in request.prompt_ids if not 0 <= token < vocabulary_size]
    if outside:
        raise ConfigError(f"Token id {outside[0]} is outside the vocabulary of {vocabulary_size} tokens.")
    _check_sampling(request.sampling)
    _check_changes(request.changes, vocabulary_size)
    if not 0 <= request.num_logprobs <= MAX_LOGPROBS:
        raise ConfigError(f"num_logprobs must be from 0 to {MAX_LOGPROBS}, got {request.num_logprobs}.")


def _check_changes(changes: LogitChanges, vocabulary_size: int) -> None:
    if len(changes.bias) > MAX_BIASED_TOKENS:
        raise ConfigError(f"A bias may name at most {MAX_BIASED_TOKENS} tokens, got {len(changes.bias)}.")
    outside = [token for token, _ in changes.bias if not 0 <= token < vocabulary_size]
    if outside:
        raise ConfigError(f"The bias of token {outside[0]} is outside the vocabulary of {vocabulary_size} tokens.")
    numbers = (changes.presence_penalty, changes.frequency_penalty, *(value for _, value in changes.bias))
    if not all(math.isfinite(number) for number in numbers):
        raise ConfigError("Penalties and biases must be finite.")


def _check_sampling(sampling: Sampling) -> None:
    infinity = float("inf")
    bounds = {
        "temperature": (0 <= sampling.temperature < infinity, "at least 0"),
        "top_k": (0 <= sampling.top_k <= MAX_TOP_K, f"from 0 to {MAX_TOP_K}"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1"),
        "min_p": (0 <= sampling.min_p <= 1, "from 0 to 1"),
        "repetition_penalty": (0 < sampling.repetition_penalty < infinity, "above 0"),
    }
    for name, (is_valid, expected) in bounds.items():
        if not is_valid:
            raise ConfigError(f"{name} must be {expected}, got {getattr(sampling, name)}.")
