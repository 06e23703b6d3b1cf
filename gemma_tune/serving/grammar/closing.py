"""Finds a short way to complete a JSON text whose tokens are running out.

The way is found by steps: a string is closed, then an object or a list where the grammar allows it; what is required is
written as briefly as is allowed. Where a pattern keeps a string open, a few characters are tried. The way isn't the
shortest, and patterns can mislead it; then there is none.
"""

import collections
from typing import Any

import numpy as np

from gemma_tune.serving.grammar.grammar_tokenizer import GrammarTokenizer

_LETTERS = ("q", "x", "z")  # All three are allowed within a text, and hardly anywhere else.
_ORDER = ("}", "]", '"', "0", "1", ",", ":", "Z", "n", "t", "f", "[", "{", "-")
_TRIED = ('"', "q", "@", ".", "-", ":", "/", "0", "1", " ", "T", "Z", "A")
_MAX_TRIED_STATES = 32


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
        next_tokens = matcher.compute_ff_tokens() or _next_tokens(matcher, tokenizer)
        if not next_tokens or len(found) + len(next_tokens) > limit or not matcher.consume_tokens(next_tokens):
            return None
        found += next_tokens
    return None if matcher.is_error() else found


def _next_tokens(matcher: Any, tokenizer: GrammarTokenizer) -> list[int]:
    """Returns the next tokens on the way; none: there are none."""
    allowed = allowed_tokens(matcher)

    def first_of(texts: tuple[str, ...]) -> list[int]:
        tokens = (tokenizer.token_of(text) for text in texts)
        return next(([token] for token in tokens if token is not None and allowed[token]), [])

    if all(first_of((letter,)) for letter in _LETTERS):  # Within a text.
        return first_of(('"',)) or _way_to_end_of_text(matcher, tokenizer) or first_of(_LETTERS)
    if chosen := first_of(_ORDER):
        return chosen
    lengths = np.where(allowed[: len(tokenizer.lengths)], tokenizer.lengths[: len(allowed)], 0)
    longest = int(lengths.argmax())  # Of a key or a fixed value, the longest token is the fastest.
    return [longest] if lengths[longest] else []


def _way_to_end_of_text(matcher: Any, tokenizer: GrammarTokenizer) -> list[int]:
    """Returns the fewest of the tried characters after which a string may end: `@q.q` in an email address.

    States that allow the same tokens count as the same. So nothing is found where a string is merely too short.
    """
    quote = tokenizer.token_of('"')
    tried = [token for text in _TRIED if (token := tokenizer.token_of(text)) is not None]
    queue: collections.deque[tuple[Any, list[int]]] = collections.deque([(matcher, [])])
    known = {matcher.compute_bitmask()}
    while queue and len(known) < _MAX_TRIED_STATES:
        state, way = queue.popleft()
        allowed = allowed_tokens(state)
        for token in (token for token in tried if allowed[token]):
            if token == quote:
                return [*way, token]
            after = state.deep_copy()
            after.consume_token(token)
            if (bits := after.compute_bitmask()) not in known:
                known.add(bits)
                queue.append((after, [*way, token]))
    return []


def allowed_tokens(matcher: Any) -> np.ndarray:
    """Returns [V] bool, V rounded up to bytes: which tokens a matcher allows next."""
    return np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").view(bool)
