"""Turns examples into token ids with a mark on each token that is to be learnt."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from gemma_tune.data.chat_template import ChatTemplate
from gemma_tune.data.example import Example, TokenizedExample, Tokenizer
from gemma_tune.errors import DataError


class Tokenized(NamedTuple):
    """Tokenized examples, the examples they came from, and what was shortened or dropped.

    lengths: token counts of all examples before anything was shortened or dropped.
    """

    examples: list[TokenizedExample]
    sources: list[Example]
    lengths: list[int]
    num_truncated: int
    num_overlong_dropped: int
    num_without_target: int


def tokenize_example(example: Example, template: ChatTemplate, tokenizer: Tokenizer) -> TokenizedExample:
    """Tokenizes one example.

    Each piece is tokenized by itself. That gives the tokens of the whole text, because pieces meet at a control token
    or at a line feed, which Gemma's vocabularies never join with other signs. Tokens behind the last one to be learnt
    are
    left out: nothing that is learnt depends on them.
    """
    ids, is_target = [tokenizer.bos_id], [False]
    for piece in template.pieces(example.turns):
        if piece.text == template.eos:
            piece_ids = [tokenizer.eos_id]  # Encoding the text "<eos>" would spell it out.
        else:
            piece_ids = tokenizer.encode(piece.text)
        ids += piece_ids
        is_target += [piece.is_target] * len(piece_ids)
    length = len(is_target) - is_target[::-1].index(True) if any(is_target) else len(ids)
    return TokenizedExample(np.asarray(ids[:length], np.int32), np.asarray(is_target[:length], bool))


def tokenize_examples(
    examples: Iterable[Example], template: ChatTemplate, tokenizer: Tokenizer, max_length: int, overlong: str
) -> Tokenized:
    """Tokenizes examples and fits them into rows of max_length positions.

    A row of max_length positions holds max_length + 1 tokens, since the last token is only predicted, never read.

    Args:
        examples: What to tokenize.
        template: The model family's.
        tokenizer: The model's.
        max_length: Positions in a row.
        overlong: `truncate`, `drop` or `error`.

    Raises:
        DataError: An example is longer and `overlong` is `error`; names its origin and length.
    """
    kept, sources, lengths = [], [], []
    num_truncated = num_dropped = num_without_target = 0
    for example in examples:
        tokens = tokenize_example(example, template, tokenizer)
        lengths.append(len(tokens.token_ids))
        if len(tokens.token_ids) > max_length + 1:
            if overlong == "error":
                raise DataError(
                    f"{example.origin}: {len(tokens.token_ids)} tokens, more than data.max_length={max_length} allows. "
                    "Raise "
                    "data.max_length, or set data.overlong to truncate or drop."
                )
            if overlong == "drop":
                num_dropped += 1
                continue
            num_truncated += 1
            tokens = TokenizedExample(tokens.token_ids[: max_length + 1], tokens.is_target[: max_length + 1])
        if not tokens.is_target.any():  # The question alone fills the row, so that no answer is left to learn.
            num_without_target += 1
            num_truncated -= lengths[-1] > max_length + 1
            continue
        kept.append(tokens)
        sources.append(example)
    return Tokenized(kept, sources, lengths, num_truncated, num_dropped, num_without_target)
