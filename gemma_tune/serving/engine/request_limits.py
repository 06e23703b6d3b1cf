"""Which requests an engine can answer at all."""

from collections.abc import Sequence

from gemma_tune.config_checks import MOST_CANDIDATES
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.serving.engine.request import BASE, Request
from gemma_tune.serving.sampling import MAX_LOGPROBS, Sampling


def check_request(request: Request, adapters: Sequence[str], max_length: int, vocabulary_size: int) -> None:
    """Raises ConfigError for a request that can't be answered whenever it is asked; says why.

    Args:
        request: What is asked.
        adapters: Names of those there are.
        max_length: Longest prompt and answer together, in tokens.
        vocabulary_size: V.
    """
    if not request.prompt_ids or request.max_new_tokens < 1:
        raise ConfigError("A request needs a token of a prompt at least, and one of an answer.")
    if len(request.prompt_ids) + request.max_new_tokens > max_length:
        raise ConfigError(
            f"The prompt has {len(request.prompt_ids)} tokens and the answer may have {request.max_new_tokens}; "
            f"together at most {max_length} (max_length)."
        )
    if request.adapter != BASE and request.adapter not in adapters:
        hint = did_you_mean(request.adapter, adapters)
        raise ConfigError(f"There is no adapter {request.adapter!r}.{hint} Adapters: {', '.join(adapters) or 'none'}.")
    if not all(0 <= token < vocabulary_size for token in request.prompt_ids):
        raise ConfigError(f"The prompt has a token that is none of the vocabulary's {vocabulary_size}.")
    _check_sampling(request.sampling)
    if not 0 <= request.num_logprobs <= MAX_LOGPROBS:
        raise ConfigError(
            f"At most {MAX_LOGPROBS} log-probabilities of each token can be had, got {request.num_logprobs}."
        )


def _check_sampling(sampling: Sampling) -> None:
    infinity = float("inf")
    bounds = {
        "temperature": (0 <= sampling.temperature < infinity, "at least 0"),
        "top_k": (0 <= sampling.top_k <= MOST_CANDIDATES, f"from 0 to {MOST_CANDIDATES}"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1"),
        "min_p": (0 <= sampling.min_p <= 1, "from 0 to 1"),
        "repetition_penalty": (0 < sampling.repetition_penalty < infinity, "above 0"),
    }
    for name, (is_right, must) in bounds.items():
        if not is_right:
            raise ConfigError(f"{name} must be {must}, got {getattr(sampling, name)}.")
