"""Tokenizes examples and marks the tokens that the model learns.

Examples are tokenized in chunks: SentencePiece spreads a list of texts over threads of its own, without Python's lock,
and the rest is done with arrays.
"""

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import numpy as np

from gemma_tune.data.chat_template import ChatTemplate, TextSpan
from gemma_tune.data.chunks import in_chunks, one_ahead
from gemma_tune.data.example import Example, Tokenizer
from gemma_tune.data.fit_length import JoinedTokens, TokenizedChunk, fit_to_length
from gemma_tune.data.storage.array_files import offsets_of
from gemma_tune.data.storage.token_store import TokenStore
from gemma_tune.errors import DataError

MIN_PARALLEL_EXAMPLES = 5000  # For fewer, a second SentencePiece processor takes longer to create than it saves.

_NUM_CHARACTERS = operator.attrgetter("num_characters")

Encode = Callable[[list[str]], list[list[int]]]


class Tokenized(NamedTuple):
    """Tokenized examples in memory.

    Attributes:
        examples: Tokens of the kept examples.
        kept, lengths: Values as in `TokenizedChunk`.
        num_cut_up, num_truncated, num_overlong_dropped, num_without_target: Numbers of examples, of which
            `TokenizedChunk` has the indices.
        num_tokens_lost: Number of tokens that were cut off or dropped.
    """

    examples: TokenStore
    kept: np.ndarray
    lengths: np.ndarray
    num_cut_up: int
    num_truncated: int
    num_overlong_dropped: int
    num_without_target: int
    num_tokens_lost: int


def tokenize_examples(
    examples: Sequence[Example], template: ChatTemplate, tokenizer: Tokenizer, max_length: int, overlong: str
) -> Tokenized:
    """Tokenizes examples and keeps them in memory. Arguments and errors as in `tokenize_chunks`."""
    parts = list(tokenize_chunks(examples, template, tokenizer, max_length, overlong))
    if not parts:
        return Tokenized(TokenStore.of([]), np.empty(0, np.int64), np.empty(0, np.int64), 0, 0, 0, 0, 0)
    ids, targets, num_tokens, num_targets, kept, lengths = (
        np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[:6]
    )
    return Tokenized(
        TokenStore(ids, targets, offsets_of(num_tokens), num_targets),
        kept,
        lengths,
        sum(len(part.cut_up) for part in parts),
        sum(len(part.truncated) for part in parts),
        sum(len(part.overlong) for part in parts),
        sum(len(part.without_target) for part in parts),
        sum(part.num_tokens_lost for part in parts),
    )


def tokenize_chunks(
    examples: Sequence[Example], template: ChatTemplate, tokenizer: Tokenizer, max_length: int, overlong: str
) -> Iterator[TokenizedChunk]:
    """Tokenizes examples, makes them fit into max_length positions, and yields them in chunks.

    While the caller uses a chunk, the next one is being tokenized.

    Args:
        examples: Examples to tokenize.
        template: Chat template of the model's family.
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of positions of an example.
        overlong: Treatment of longer examples: `chunk`, `truncate`, `drop` or `error`.

    Raises:
        DataError: An example is too long and `overlong` is `error`; says which one, and its length.
    """
    encode = encoder(tokenizer, len(examples))
    start = 0

    def submit(pool: ThreadPoolExecutor) -> Iterator[tuple[list[Example], list[list[TextSpan]], Future]]:
        for chunk in in_chunks(examples, _NUM_CHARACTERS):
            spans = [template.spans(example.turns) for example in chunk]
            texts = [span.text for span in chain.from_iterable(spans) if span.text != template.eos]
            yield chunk, spans, pool.submit(encode, texts)

    with ThreadPoolExecutor(1) as pool:
        for chunk, spans, future in one_ahead(submit(pool)):
            tokens = _trimmed(_joined(spans, future.result(), template, tokenizer))
            if overlong == "error":
                _refuse_overlong(chunk, tokens.lengths, max_length)
            is_document = np.array([example.turns[0].role == "text" for example in chunk])
            fitted = fit_to_length(tokens, is_document, max_length, overlong)
            names = ("kept", "cut_up", "truncated", "overlong", "without_target")
            yield fitted._replace(first=start, **{name: getattr(fitted, name) + start for name in names})
            start += len(chunk)


def encoder(tokenizer: Tokenizer, num_examples: int) -> Encode:
    """Returns a function that tokenizes a list of texts: one by one for few examples, otherwise on all cores."""
    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_examples < MIN_PARALLEL_EXAMPLES or num_threads == 1:
        return lambda texts: [tokenizer.encode(text) for text in texts]
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=tokenizer.proto)
    return lambda texts: processor.encode(texts, num_threads=num_threads)


def _joined(
    spans: Sequence[Sequence[TextSpan]], encoded: Iterable[list[int]], template: ChatTemplate, tokenizer: Tokenizer
) -> JoinedTokens:
    """Joins `<bos>` and the tokens of the spans of each example.

    Each span is tokenized by itself. This gives the tokens of the whole text, because spans meet at a control token or
    at a line feed, which Gemma's vocabularies never merge with other characters.
    """
    next_encoded = iter(encoded)
    parts: list[list[int]] = []
    is_target: list[bool] = []
    for example in spans:
        parts.append([tokenizer.bos_id])
        is_target.append(False)
        for span in example:
            # Encoding the text "<eos>" would spell it out.
            parts.append([tokenizer.eos_id] if span.text == template.eos else next(next_encoded))
            is_target.append(span.is_target)
    part_lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    first_parts = offsets_of(np.array([1 + len(example) for example in spans]))[:-1]
    lengths = np.add.reduceat(part_lengths, first_parts)
    ids = np.fromiter(chain.from_iterable(parts), np.int32, int(part_lengths.sum()))
    return JoinedTokens(ids, np.repeat(np.array(is_target, bool), part_lengths), offsets_of(lengths)[:-1], lengths)


def _trimmed(tokens: JoinedTokens) -> JoinedTokens:
    """Drops the tokens after the last one to learn: they have no influence on what is learnt."""
    positions = tokens.positions()
    last = np.maximum.reduceat(np.where(tokens.is_target, positions + 1, 0), tokens.starts)
    lengths = np.where(last > 0, last, tokens.lengths)
    inside = positions < tokens.spread(lengths)
    return JoinedTokens(tokens.ids[inside], tokens.is_target[inside], offsets_of(lengths)[:-1], lengths)


def _refuse_overlong(examples: Sequence[Example], lengths: np.ndarray, max_length: int) -> None:
    for index in np.flatnonzero(lengths > max_length + 1)[:1]:
        raise DataError(
            f"{examples[index].origin}: the example has {lengths[index]} tokens, too many for "
            f"data.max_length={max_length}. Raise data.max_length to {lengths[index] - 1}, or set data.overlong to "
            "chunk, truncate or drop."
        )
