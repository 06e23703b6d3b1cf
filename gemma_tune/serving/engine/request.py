"""What is asked of a serving engine, and what comes back: the values between `serving/engine/engine.py` and its callers."""

from typing import NamedTuple

from gemma_tune.serving.sampling import GREEDY, Sampling

BASE = ""  # The adapter's name that stands for the model as it was loaded.


class Request(NamedTuple):
    """One answer that is asked for.

    Attributes:
        prompt_ids: Token ids up to where the answer begins, `<bos>` included.
        max_new_tokens: Longest answer, in tokens.
        sampling: How tokens are picked.
        seed: Of the sampling. The same request with the same seed gets the same answer, whatever else is asked.
        stop_ids: The answer ends before the first of these tokens.
        stop_strings: And before the first of these texts, also where one begins in one token and ends in another.
        adapter: Which of the engine's LoRA adapters answers; `BASE`: none.
        num_logprobs: How many of the likeliest tokens come with each token; 0: none, and no log-probability either.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    adapter: str = BASE
    num_logprobs: int = 0


class TokenLogprob(NamedTuple):
    """A token, its text, and its log-probability under the model, before temperature and filters."""

    token_id: int
    text: str
    logprob: float


class AnswerDelta(NamedTuple):
    """The next piece of an answer. All `text` together is the answer.

    Attributes:
        text: May be empty, while a character or a possible stop string is not complete.
        token_ids: Made since the last piece.
        logprobs: Of each of `token_ids`; empty unless asked for.
        top_logprobs: The likeliest tokens at each of `token_ids`; empty unless asked for.
        finish_reason: "" while the answer goes on; then `stop` (a stop token or string), `length` (max_new_tokens),
            `cancelled`, or `error`.
        error: What went wrong, with `error`.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    finish_reason: str = ""
    error: str = ""
