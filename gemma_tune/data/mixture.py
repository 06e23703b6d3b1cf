"""Mixtures: how often the examples of each of several sources occur in an epoch.

Without weights, each example occurs once. Weights and a temperature follow the mixing rates of T5 (arXiv:1910.10683,
section 3.5.2): rates are proportional to w^(1/T), and a limit keeps small sources from being repeated too often.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gemma_tune.errors import DataError

_WEIGHTED = re.compile(r"(.+):(\d+\.?\d*|\.\d+)(x?)", re.DOTALL)
_SCHEMES = ("sample", "tfds", "hf")  # What stands before a colon and is no name of a file.


class MixturePart(NamedTuple):
    """One of the sources that a `data.source` names.

    Attributes:
        source: Name of the source.
        weight: Its weight; None without one.
        is_repeats: Whether the weight is a number of repeats (`3x`), not a share.
    """

    source: str
    weight: float | None = None
    is_repeats: bool = False


def parse_mixture(source: str) -> list[MixturePart]:
    """Returns the sources that `source` names, with their weights.

    Args:
        source: Names with commas between. `a.jsonl:0.7,b.parquet:0.3` gives shares of an epoch,
            `a.jsonl:1x,b.parquet:3x` how often each example occurs in an epoch.

    Raises:
        DataError: Only some have a weight, shares and repeats are mixed, a weight is 0, or a source has two of them.
    """
    parts = [MixturePart(source)] if _exists(source) else [_part(name.strip()) for name in source.split(",")]
    parts = list(dict.fromkeys(parts))
    weighted = [part for part in parts if part.weight is not None]
    without = [part.source for part in parts if part.weight is None]
    if weighted and without:
        raise DataError(
            f"{without[0]} has no weight, but {weighted[0].source} has. Give each source a weight, such as "
            f"{without[0]}:1, or none of them."
        )
    if len({part.is_repeats for part in parts}) > 1:
        raise DataError(
            f"{source}: give each source a share of an epoch, such as :0.3, or each a number of repeats, such as :3x."
        )
    for part in parts:
        if part.weight == 0:
            raise DataError(f"{part.source} has the weight 0. Weights are above 0; leave the source out instead.")
        if sum(part.source == other.source for other in parts) > 1:
            raise DataError(f"{part.source} is named twice, with different weights. Name it once.")
    return parts


def source_labels(sources: Sequence[str]) -> list[str]:
    """Returns a short name for each source, of letters that trackers of metrics allow; each name once."""
    labels: list[str] = []
    for source in sources:
        label = re.sub(r"[^\w.-]+", "_", os.path.basename(source.rstrip("/"))).strip("_") or "data"
        number = 1 + sum(
            label == other or re.fullmatch(rf"{re.escape(label)}-\d+", other) is not None for other in labels
        )
        labels.append(label if number == 1 else f"{label}-{number}")
    return labels


def examples_per_epoch(
    sizes: Sequence[int] | np.ndarray,
    parts: Sequence[MixturePart],
    temperature: float = 1.0,
    max_repeats: float = 0.0,
    max_examples: int = 0,
) -> np.ndarray:
    """Returns how many examples of each source an epoch has, [s] int64.

    An epoch with shares has as many examples as the sources have together. A source that a limit cuts isn't replaced by
    others: the epoch is shorter then.

    Args:
        sizes: [s] number of training examples of each source.
        parts: The s sources.
        temperature: T of the rates w^(1/T). 1: as the weights say; higher: more equal.
        max_repeats: Limit of how often an example occurs in an epoch on average; 0: none.
        max_examples: Limit of the examples of each source in an epoch; 0: none.

    Raises:
        DataError: A source with a weight has no example.
    """
    sizes = np.asarray(sizes, np.int64)
    for part, size in zip(parts, sizes.tolist(), strict=True):
        if part.weight is not None and not size:
            raise DataError(f"{part.source}: no training example is left of it, so it can't have a weight.")
    weights = np.array([1.0 if part.weight is None else part.weight for part in parts])
    if parts[0].weight is None or parts[0].is_repeats:
        weights = weights * sizes
        total = weights.sum()
    else:
        total = sizes.sum()
    rates = np.where(sizes > 0, weights, 0.0) ** (1 / temperature)
    counts = _rounded(rates / rates.sum() * total, round(total))
    limits = np.floor(max_repeats * sizes).astype(np.int64) if max_repeats else counts
    limits = np.minimum(limits, max_examples) if max_examples else limits
    return np.maximum(np.minimum(counts, limits), sizes > 0)


class EpochSampler:
    """Draws the examples of each epoch from several sources, by the seed and the epoch alone.

    Each source is a stream of shuffled passes over its examples, from which an epoch takes the next ones. So no example
    occurs twice before all others of its source have occurred, also over several epochs.

    Args:
        source_of: [n] number of the source of each example.
        counts: [s] number of examples of each source in an epoch.
        seed: Random seed.
    """

    def __init__(self, source_of: np.ndarray, counts: np.ndarray, seed: int):
        self._members = [np.flatnonzero(source_of == number) for number in range(len(counts))]
        self._counts, self._seed = counts, seed

    def indices(self, epoch: int) -> np.ndarray:
        """Returns the indices of an epoch's examples, counted from 0, in no particular order."""
        return np.concatenate([self._drawn(number, epoch) for number in range(len(self._counts))])

    def _drawn(self, number: int, epoch: int) -> np.ndarray:
        members, count = self._members[number], int(self._counts[number])
        first, pieces = epoch * count, [np.empty(0, np.int64)]
        while count:
            cycle, start = divmod(first, len(members))
            order = np.random.default_rng([self._seed, number, cycle]).permutation(len(members))
            piece = members[order[start : start + count]]
            pieces.append(piece)
            first, count = first + len(piece), count - len(piece)
        return np.concatenate(pieces)


def _part(name: str) -> MixturePart:
    found = _WEIGHTED.fullmatch(name)
    if not found or _exists(name) or found[1].lower() in _SCHEMES:
        return MixturePart(name)
    return MixturePart(found[1], float(found[2]), bool(found[3]))


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))


def _rounded(shares: np.ndarray, total: int) -> np.ndarray:
    """Rounds shares to whole numbers whose sum is `total`, the largest remainders up."""
    counts = np.floor(shares).astype(np.int64)
    up = np.argsort(-(shares - counts), kind="stable")[: max(0, total - int(counts.sum()))]
    counts[up] += 1
    return counts
