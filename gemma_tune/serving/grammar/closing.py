"""Finds a short way to complete a JSON text whose tokens are running out.

The way is found by steps: a string is closed, then an object or a list where the grammar allows it; what is required is
written as briefly as is allowed. It isn't the shortest, and patterns can mislead it; then there is none.
"""

from typing import Any

import numpy as np

from gemma_tune.serving.grammar.grammar_tokenizer import GrammarTokenizer

_LETTERS = ("q", "x", "z")  # All three are allowed within a text, and hardly anywhere else.
_ORDER = ("}", "]", '"', "0", "1", ",", ":", "Z", "n", "t", "f", "[", "{", "-")


def closing_tokens(matcher: Any, tokenizer: GrammarTokenizer, limit: int) -> list[int] | None:
    """Returns tokens, at most `limit`, that complete the text of a matcher; None: no such were found.

    Args:
        matcher: LLMatcher of llguidance. It stays as it is.
        tokenizer: Its tokenizer.
        limit: Largest number of tokens.
    """
    matcher = matcher.deep_copy()
    found: list[int] = []
    while not matcher.is_accepting():
        next_tokens = matcher.compute_ff_tokens() or [_next_token(matcher, tokenizer)]
        if next_tokens[0] < 0 or len(found) + len(next_tokens) > limit or not matcher.consume_tokens(next_tokens):
            return None
        found += next_tokens
    return None if matcher.is_error() else found


def _next_token(matcher: Any, tokenizer: GrammarTokenizer) -> int:
    """Returns the next token on the way; -1: there is none."""
    allowed = allowed_tokens(matcher)

    def first_of(texts: tuple[str, ...]) -> int | None:
        tokens = (tokenizer.token_of(text) for text in texts)
        return next((token for token in tokens if token is not None and allowed[token]), None)

    is_in_text = all(first_of((letter,)) is not None for letter in _LETTERS)
    chosen = first_of(('"', *_LETTERS) if is_in_text else _ORDER)
    if chosen is not None:
        return chosen
    lengths = np.where(allowed[: len(tokenizer.lengths)], tokenizer.lengths[: len(allowed)], 0)
    longest = int(lengths.argmax())  # Of a key or a fixed value, the longest token is the fastest.
    return longest if lengths[longest] else -1


def allowed_tokens(matcher: Any) -> np.ndarray:
    """Returns [V] bool, V rounded up to bytes: which tokens a matcher allows next."""
    return np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").view(bool)
