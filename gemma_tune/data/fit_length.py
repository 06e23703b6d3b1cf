"""Makes tokenized examples fit into a number of positions: cuts up documents, shortens or drops what is longer.

max_length positions hold max_length + 1 tokens, because the last token is only predicted, never read.
"""

from typing import NamedTuple

import numpy as np


class JoinedTokens(NamedTuple):
    """The tokens of n examples, T together.

    Attributes:
        ids: [T] token ids, example after example; each begins with `<bos>`.
        is_target: [T] bool, true for tokens that the model learns.
        starts: [n] index of the first token of each example.
        lengths: [n] number of tokens of each example.
    """

    ids: np.ndarray
    is_target: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def positions(self) -> np.ndarray:
        """Returns the [T] position of each token in its example."""
        return np.arange(len(self.ids)) - self.spread(self.starts)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Returns [T] values: for each token, the one of [n] values that belongs to its example."""
        return np.repeat(values, np.diff(self.starts, append=len(self.ids)))


class TokenizedChunk(NamedTuple):
    """A chunk of m tokenized examples, of which n examples or pieces of documents are kept, with T tokens.

    Attributes:
        token_ids: [T] int32 token ids, example after example.
        is_target: [T] bool, true for tokens that the model learns.
        num_tokens: [n] number of tokens of each kept example.
        num_targets: [n] number of tokens to learn of each kept example.
        kept: [n] indices of the kept examples; that of a document in pieces is there for each piece.
        lengths: [m] number of tokens of each example, as it was.
        cut_up: Indices of the documents that were cut into pieces.
        truncated: Indices of the shortened examples.
        overlong: Indices of the examples dropped because they are too long.
        without_target: Indices of the examples dropped because nothing is left to learn.
        num_tokens_lost: Number of tokens that were cut off or dropped.
        first: Index of the chunk's first example; the other indices count from the first example of all chunks.
    """

    token_ids: np.ndarray
    is_target: np.ndarray
    num_tokens: np.ndarray
    num_targets: np.ndarray
    kept: np.ndarray
    lengths: np.ndarray
    cut_up: np.ndarray
    truncated: np.ndarray
    overlong: np.ndarray
    without_target: np.ndarray
    num_tokens_lost: int
    first: int = 0


def fit_to_length(tokens: JoinedTokens, is_document: np.ndarray, max_length: int, overlong: str) -> TokenizedChunk:
    """Returns the examples that fit into max_length positions, and what became of the others.

    A shortened conversation ends inside an answer, without the token that ends a turn: the model doesn't learn that the
    answer is complete.

    Args:
        tokens: Tokens of m examples.
        is_document: [m] bool, whether each example is a document.
        max_length: Maximum number of positions of an example.
        overlong: Treatment of longer examples: `chunk`, `truncate` or `drop`.
    """
    whole = tokens.lengths
    example_of, cut_up = np.arange(len(whole)), np.empty(0, np.int64)
    if overlong == "chunk":
        cut_up = np.flatnonzero(is_document & (whole > max_length + 1))
        tokens, example_of = _cut_documents(tokens, cut_up, max_length)
    is_overlong = tokens.lengths > max_length + 1
    lengths = np.minimum(tokens.lengths, max_length + 1)
    inside = tokens.positions() < tokens.spread(lengths)
    num_targets = np.add.reduceat(tokens.is_target & inside, tokens.starts, dtype=np.int64)
    is_dropped = is_overlong & (overlong == "drop")
    # An example without targets is one whose question alone is too long: no answer is left to learn.
    keep = (num_targets > 0) & ~is_dropped
    here = inside & tokens.spread(keep)
    return TokenizedChunk(
        token_ids=tokens.ids[here],
        is_target=tokens.is_target[here],
        num_tokens=lengths[keep],
        num_targets=num_targets[keep],
        kept=example_of[keep],
        lengths=whole,
        cut_up=cut_up,
        truncated=example_of[is_overlong & keep],
        overlong=example_of[is_dropped],
        without_target=example_of[~keep & ~is_dropped],
        num_tokens_lost=int(tokens.lengths.sum() - lengths[keep].sum()),
    )


def piece_borders(length: int, max_length: int) -> list[int]:
    """Returns the positions at which the second and each further piece of a document begins.

    Each piece begins with `<bos>`, which is no part of the document, and is as long as possible. The last one gets an
    eighth of that at least, so that no piece teaches a document of a word or two.

    Args:
        length: Number of the document's tokens, with its first `<bos>` and its `<eos>`.
        max_length: Maximum number of positions of a piece.
    """
    borders = list(range(1 + max_length, length, max_length))
    least = max(2, max_length // 8)
    if borders and length - borders[-1] < least:
        borders[-1] = length - least
    return borders


def _cut_documents(tokens: JoinedTokens, cut_up: np.ndarray, max_length: int) -> tuple[JoinedTokens, np.ndarray]:
    """Returns the examples with some documents cut into pieces, and the index of the example that each comes from."""
    if not len(cut_up):
        return tokens, np.arange(len(tokens.starts))
    borders = [tokens.starts[i] + np.array(piece_borders(int(tokens.lengths[i]), max_length)) for i in cut_up.tolist()]
    cuts = np.concatenate(borders)
    starts = np.sort(np.concatenate([tokens.starts, cuts]))
    example_of = np.searchsorted(tokens.starts, starts, side="right") - 1
    starts = starts + np.searchsorted(cuts, starts)  # Each cut before a piece has inserted one <bos>.
    ids = np.insert(tokens.ids, cuts, tokens.ids[tokens.starts[0]])
    lengths = np.diff(starts, append=len(ids))
    return JoinedTokens(ids, np.insert(tokens.is_target, cuts, False), starts, lengths), example_of
