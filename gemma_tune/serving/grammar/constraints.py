"""Constrains answers to grammars: compiles them once, and follows each answer token by token.

The grammars are llguidance's (github.com/guidance-ai/llguidance): a JSON schema, or a context-free grammar that has
JSON schemas in it. For each token it finds all tokens that may come next, which become a mask of the logits.
"""

import collections
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_tune.errors import ConfigError
from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.serving.grammar.closing import closing_tokens
from gemma_tune.serving.grammar.grammar_tokenizer import GrammarTokenizer

# Between the parts of a JSON text: nothing, a space, or a new line with indentation. Without an end to it, a model may
# write white space for ever.
WHITE_SPACE = r"[ ]?|\n[ ]{0,24}"
_MAX_CACHED = 256
_LONGEST_CLOSING = 256
# From so many spare tokens on, each token is tried before it is taken.
_TRIED_TOKENS = 32
_MAX_FAILURES = 8


class TokenConstraint:
    """A compiled grammar. Any number of answers can follow it.

    Args:
        matcher: LLMatcher of llguidance at the beginning of an answer.
        tokenizer: Its tokenizer.
    """

    def __init__(self, matcher: Any, tokenizer: GrammarTokenizer):
        self._matcher, self._tokenizer = matcher, tokenizer
        self._closing = closing_tokens(matcher, tokenizer, _LONGEST_CLOSING)

    def begin(self, max_new_tokens: int) -> "GrammarState":
        """Returns the state at the beginning of an answer of at most so many tokens."""
        return GrammarState(self._matcher.deep_copy(), self._tokenizer, max_new_tokens, self._closing)


class GrammarState:
    """How far an answer has come in its grammar.

    Where tokens run out, it completes the text in the briefest way that it finds: then a text that is cut short is
    valid all the same.

    Args:
        matcher: LLMatcher of llguidance; the state changes it.
        tokenizer: Its tokenizer.
        num_left: Tokens that the answer may still have.
        closing: Tokens that would complete the text, or None if none are known.

    Attributes:
        matcher: LLMatcher at the end of the answer so far.
        was_cut_short: Whether tokens were running out, so that the text was completed in the briefest way.
    """

    def __init__(self, matcher: Any, tokenizer: GrammarTokenizer, num_left: int, closing: list[int] | None):
        self.matcher, self._tokenizer, self._num_left = matcher, tokenizer, num_left
        self.was_cut_short = False
        self._num_failures = 0
        self._plan(closing)

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow, or nothing should."""
        return self.matcher.is_stopped() or (self.was_cut_short and not self._closing)

    @property
    def error(self) -> str:
        """What went wrong: the grammar is too complex for llguidance's limits. Empty if nothing did."""
        return self.matcher.get_error() if self.matcher.is_error() else ""

    def advance(self, token: int) -> int | None:
        """Takes the next token, and returns it; or another one in its place, which completes the text in time.

        None: the text is complete without another token, and wouldn't be with this one.
        """
        self._num_left -= 1
        if not self.was_cut_short:
            if self._num_left > self._try_at or token in self._tokenizer.stop_ids:
                self.matcher.consume_token(token)
                return token
            if self._is_taken(token):
                return token
            self.was_cut_short = True
        if not self._closing:
            return None
        token = self._closing.pop(0)
        self.matcher.consume_token(token)
        return token

    def _is_taken(self, token: int) -> bool:
        """Takes a token if the text can still be completed after it, or if no way to complete it is known."""
        tried = self.matcher.deep_copy()
        tried.consume_token(token)
        closing = closing_tokens(tried, self._tokenizer, min(self._num_left, _LONGEST_CLOSING))
        if closing is None and self._closing_is_current:
            return False
        self.matcher = tried
        self._plan(closing)
        return True

    def _plan(self, closing: list[int] | None) -> None:
        """Decides when to look for the next way to complete the text, given the present one."""
        self._closing = list(closing or ())
        spare = self._num_left - len(self._closing)
        is_possible, is_near = closing is not None and spare >= 0, spare <= _TRIED_TOKENS
        self._closing_is_current = is_possible and is_near
        if is_possible:
            self._try_at = self._num_left - (1 if is_near else spare // 2)
        else:  # There may be a way after the next token.
            self._num_failures += 1
            self._try_at = self._num_left - 1 if self._num_failures <= _MAX_FAILURES else -1


class Grammars:
    """Compiles grammars for one model, and keeps those that were compiled last. Any thread may use it.

    Args:
        tokenizer: Tokenizer of the model.
        stop_ids: Tokens that end an answer.
    """

    def __init__(self, tokenizer: TextTokenizer, stop_ids: Sequence[int]):
        self._text_tokenizer, self._stop_ids = tokenizer, tuple(stop_ids)
        self._tokenizer: GrammarTokenizer | None = None
        self._cached: collections.OrderedDict[str, TokenConstraint] = collections.OrderedDict()
        self._lock = threading.Lock()

    def of_json_schema(self, schema: Mapping[str, Any]) -> TokenConstraint:
        """Returns the constraint to JSON texts that a schema allows.

        Raises:
            ConfigError: The schema is wrong, or has a keyword that llguidance doesn't support; llguidance isn't
                installed.
        """
        return self.of_rules("start: answer\nanswer: " + json_rule(schema))

    def of_rules(self, rules: str) -> TokenConstraint:
        """Returns the constraint to texts of a grammar in llguidance's notation, which resembles Lark's.

        Raises:
            ConfigError: The grammar is wrong or isn't supported; llguidance isn't installed.
        """
        with self._lock:
            if rules in self._cached:
                self._cached.move_to_end(rules)
                return self._cached[rules]
            if self._tokenizer is None:
                self._tokenizer = GrammarTokenizer(self._text_tokenizer, self._stop_ids)
        matcher_class = self._tokenizer.library.LLMatcher
        matcher = matcher_class(self._tokenizer.of_library, matcher_class.grammar_from_lark(rules), log_level=0)
        if matcher.is_error():
            raise ConfigError(_first_line(matcher.get_error()))
        constraint = TokenConstraint(matcher, self._tokenizer)
        with self._lock:
            self._cached[rules] = constraint
            if len(self._cached) > _MAX_CACHED:
                self._cached.popitem(last=False)
        return constraint


def json_rule(schema: Mapping[str, Any], is_lenient: bool = False) -> str:
    """Returns the right side of a grammar's rule for the JSON texts that a schema allows.

    Args:
        schema: JSON schema.
        is_lenient: Whether keywords that llguidance doesn't support are left out. Otherwise they are errors.
    """
    options = {"whitespace_pattern": WHITE_SPACE, "lenient": is_lenient}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def write_allowed(states: Sequence[tuple[int, GrammarState]], allowed: np.ndarray) -> None:
    """Writes which tokens may come next.

    Args:
        states: (row, state) of the answers with a grammar.
        allowed: [B, ceil(V / 32)] int32 that is written to, a bit for each token.
    """
    for row, state in states:
        bits = np.frombuffer(state.matcher.compute_bitmask(), np.int32)
        num_words = min(len(bits), allowed.shape[1])
        allowed[row, :num_words] = bits[:num_words]


def _first_line(message: str) -> str:
    """Returns llguidance's message without the place in the grammar, which the user hasn't written."""
    return re.sub(r"^at \d+\(\d+\): ", "", message.strip().split("\n")[0])[:500]
