"""Turns examples into token ids with a mark on each token that is to be learnt.

Chunks of examples are tokenized together: SentencePiece spreads a list of texts over threads of its own, without
Python's lock, and what follows is array arithmetic.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import numpy as np

from gemma_tune.data.chat_template import ChatTemplate, Piece
from gemma_tune.data.chunks import CHUNK, in_chunks, one_ahead
from gemma_tune.data.example import Example, Tokenizer
from gemma_tune.data.storage.array_files import offsets_of
from gemma_tune.data.storage.token_store import TokenStore
from gemma_tune.errors import DataError

_PARALLEL_FROM = 5000  # Below, a second SentencePiece processor takes longer to make than it saves.

Encode = Callable[[list[str]], list[list[int]]]


class TokenizedChunk(NamedTuple):
    """Some examples tokenized, and what was shortened or dropped.

    token_ids [T] int32 and is_target [T] bool of the n examples kept, one behind the other; num_tokens and num_targets
    [n] of each, and kept [n], which of those given they are. lengths: token counts of all examples given, before
    anything was shortened or dropped.
    """

    token_ids: np.ndarray
    is_target: np.ndarray
    num_tokens: np.ndarray
    num_targets: np.ndarray
    kept: np.ndarray
    lengths: np.ndarray
    num_truncated: int
    num_overlong_dropped: int
    num_without_target: int


class Tokenized(NamedTuple):
    """Tokenized examples, and the other values as in TokenizedChunk."""

    examples: TokenStore
    kept: np.ndarray
    lengths: np.ndarray
    num_truncated: int
    num_overlong_dropped: int
    num_without_target: int


def tokenize_examples(
    examples: Sequence[Example], template: ChatTemplate, tokenizer: Tokenizer, max_length: int, overlong: str
) -> Tokenized:
    """Tokenizes examples in memory. Arguments and errors as in `tokenize_chunks`."""
    parts = list(tokenize_chunks(examples, template, tokenizer, max_length, overlong))
    if not parts:
        return Tokenized(TokenStore.of([]), np.empty(0, np.int64), np.empty(0, np.int64), 0, 0, 0)
    ids, targets, num_tokens, num_targets, kept, lengths = (
        np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[:6]
    )
    return Tokenized(
        TokenStore(ids, targets, offsets_of(num_tokens), num_targets),
        kept,
        lengths,
        sum(part.num_truncated for part in parts),
        sum(part.num_overlong_dropped for part in parts),
        sum(part.num_without_target for part in parts),
    )


def tokenize_chunks(
    examples: Sequence[Example], template: ChatTemplate, tokenizer: Tokenizer, max_length: int, overlong: str
) -> Iterator[TokenizedChunk]:
    """Tokenizes examples and fits them into rows of max_length positions, yielding them in chunks.

    A row of max_length positions holds max_length + 1 tokens, since the last token is only predicted, never read. While
    a chunk is looked at, the next one is being tokenized.

    Args:
        examples: What to tokenize.
        template: The model family's.
        tokenizer: The model's.
        max_length: Positions in a row.
        overlong: `truncate`, `drop` or `error`.

    Raises:
        DataError: An example is longer and `overlong` is `error`; names its origin and length.
    """
    encode = encoder(tokenizer, len(examples))
    start = 0

    def submit(pool: ThreadPoolExecutor) -> Iterator[tuple[list[Example], list[list[Piece]], Future]]:
        for chunk in in_chunks(examples, CHUNK):
            pieces = [template.pieces(example.turns) for example in chunk]
            texts = [piece.text for piece in chain.from_iterable(pieces) if piece.text != template.eos]
            yield chunk, pieces, pool.submit(encode, texts)

    with ThreadPoolExecutor(1) as pool:
        for chunk, pieces, future in one_ahead(submit(pool)):
            tokens = _trimmed(_joined(pieces, future.result(), template, tokenizer))
            if overlong == "error":
                _refuse_overlong(chunk, tokens.lengths, max_length)
            fitted = _fitted(tokens, max_length, overlong == "drop")
            yield fitted._replace(kept=fitted.kept + start)
            start += len(chunk)


def encoder(tokenizer: Tokenizer, num_examples: int) -> Encode:
    """Returns texts -> ids of each: one after the other for few examples, else on all of the machine's cores."""
    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_examples < _PARALLEL_FROM or num_threads == 1:
        return lambda texts: [tokenizer.encode(text) for text in texts]
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=tokenizer.proto)
    return lambda texts: processor.encode(texts, num_threads=num_threads)


class _Tokens(NamedTuple):
    """ids [T] and is_target [T] of n examples, where each begins [n], and its length [n]."""

    ids: np.ndarray
    is_target: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def positions(self) -> np.ndarray:
        """Returns [T]: the place of each token in its example."""
        return np.arange(len(self.ids)) - self.spread(self.starts)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Returns [T]: the value [n] of the example that each token belongs to."""
        return np.repeat(values, np.diff(self.starts, append=len(self.ids)))


def _joined(
    pieces: Sequence[Sequence[Piece]], encoded: Iterable[list[int]], template: ChatTemplate, tokenizer: Tokenizer
) -> _Tokens:
    """Puts `<bos>` and the pieces' tokens together.

    Each piece is tokenized by itself. That gives the tokens of the whole text, because pieces meet at a control token
    or at a line feed, which Gemma's vocabularies never join with other signs.
    """
    next_encoded = iter(encoded)
    parts: list[list[int]] = []
    is_target: list[bool] = []
    for example in pieces:
        parts.append([tokenizer.bos_id])
        is_target.append(False)
        for piece in example:
            # Encoding the text "<eos>" would spell it out.
            parts.append([tokenizer.eos_id] if piece.text == template.eos else next(next_encoded))
            is_target.append(piece.is_target)
    part_lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    first_parts = offsets_of(np.array([1 + len(example) for example in pieces]))[:-1]
    lengths = np.add.reduceat(part_lengths, first_parts)
    ids = np.fromiter(chain.from_iterable(parts), np.int32, int(part_lengths.sum()))
    return _Tokens(ids, np.repeat(np.array(is_target, bool), part_lengths), offsets_of(lengths)[:-1], lengths)


def _trimmed(tokens: _Tokens) -> _Tokens:
    """Leaves out tokens behind the last one to be learnt: nothing that is learnt depends on them."""
    positions = tokens.positions()
    last = np.maximum.reduceat(np.where(tokens.is_target, positions + 1, 0), tokens.starts)
    lengths = np.where(last > 0, last, tokens.lengths)
    inside = positions < tokens.spread(lengths)
    return _Tokens(tokens.ids[inside], tokens.is_target[inside], offsets_of(lengths)[:-1], lengths)


def _refuse_overlong(examples: Sequence[Example], lengths: np.ndarray, max_length: int) -> None:
    for index in np.flatnonzero(lengths > max_length + 1)[:1]:
        raise DataError(
            f"{examples[index].origin}: {lengths[index]} tokens, more than data.max_length={max_length} allows. Raise "
            "data.max_length, or set data.overlong to truncate or drop."
        )


def _fitted(tokens: _Tokens, max_length: int, drop: bool) -> TokenizedChunk:
    is_overlong = tokens.lengths > max_length + 1
    lengths = np.minimum(tokens.lengths, max_length + 1)
    inside = tokens.positions() < tokens.spread(lengths)
    num_targets = np.add.reduceat(tokens.is_target & inside, tokens.starts, dtype=np.int64)
    is_dropped = is_overlong & drop
    # Without a target the question alone fills the row, so that no answer is left to learn.
    keep = (num_targets > 0) & ~is_dropped
    here = inside & tokens.spread(keep)
    return TokenizedChunk(
        token_ids=tokens.ids[here],
        is_target=tokens.is_target[here],
        num_tokens=lengths[keep],
        num_targets=num_targets[keep],
        kept=np.flatnonzero(keep),
        lengths=tokens.lengths,
        num_truncated=int((is_overlong & keep).sum()),
        num_overlong_dropped=int(is_dropped.sum()),
        num_without_target=int((~keep & ~is_dropped).sum()),
    )
