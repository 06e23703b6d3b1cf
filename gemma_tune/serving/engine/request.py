"""The values that go into a serving engine and come out of it: requests, and the answers' text delta by delta."""

from typing import NamedTuple

from gemma_tune.serving.grammar.constraints import TokenConstraint
from gemma_tune.serving.logit_changes import NO_CHANGES, LogitChanges
from gemma_tune.serving.sampling import GREEDY, Sampling

BASE = ""  # As an adapter's name: the model as it was loaded.


class Request(NamedTuple):
    """A request for one answer.

    Attributes:
        prompt_ids: Token ids up to where the answer begins, `<bos>` included.
        max_new_tokens: Longest answer, in tokens.
        sampling: Sampling settings.
        seed: Random seed of the sampling. The same request with the same seed gets the same answer, whatever other
            requests run beside it.
        stop_ids: Tokens before the first of which the answer ends.
        stop_strings: Texts before the first of which the answer ends, also where one spans several tokens.
        adapter: Name of the engine's LoRA adapter that answers, or `BASE`.
        num_logprobs: Number of most likely tokens to return with each token. 0: none, and no log-probability of the
            token itself either.
        changes: Penalties of the answer's own tokens, and a bias of single tokens.
        constraint: Grammar that the answer follows, or None.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    adapter: str = BASE
    num_logprobs: int = 0
    changes: LogitChanges = NO_CHANGES
    constraint: TokenConstraint | None = None


class TokenLogprob(NamedTuple):
    """A token with its log-probability under the model.

    Attributes:
        token_id: Id in the vocabulary.
        text: Text that the token decodes to by itself.
        logprob: Log-probability before temperature and filters.
    """

    token_id: int
    text: str
    logprob: float


class AnswerDelta(NamedTuple):
    """What is new in an answer. The `text` of all its deltas together is the answer.

    Attributes:
        text: New text. Empty while a character or a possible stop string is incomplete.
        token_ids: Tokens generated since the last delta.
        logprobs: Log-probabilities of `token_ids`; empty unless asked for.
        top_logprobs: The most likely tokens at each of `token_ids`; empty unless asked for.
        finish_reason: "" while the answer goes on; then `stop` (a stop token or string), `length` (max_new_tokens),
            `cancelled`, or `error`.
        error: Error message, if finish_reason is `error`.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    finish_reason: str = ""
    error: str = ""
