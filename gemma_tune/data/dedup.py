"""Recognizes duplicates by their hashes, in little more memory than the hashes take, and near duplicates by MinHash.

Near duplicates are texts that share most of their wording. Two texts are compared by their sets of three consecutive
words. MinHash estimates the Jaccard similarity of two sets (Broder 1997), and locality-sensitive hashing finds the
candidates (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3). Both are done by the package rensa.
"""

import hashlib
from typing import Any

import numpy as np

from gemma_tune.errors import ConfigError

_NUM_HASHES = 128
_WORDS_IN_SHINGLE = 3
_LEAST_CHANCE = 0.95  # Probability that a pair that is just similar enough is compared at all.
_SEED = 1


def hash_text(text: str) -> int:
    """Returns a 64-bit BLAKE2b hash of a text.

    Among a million different texts, two have the same hash with a probability of 1 in 37 million (n²/2⁶⁵). Then one
    example is lost.
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest(), "big")


class DedupIndex:
    """A set of uint64 hashes in sorted arrays, of 8 bytes a hash. A Python set takes about a hundred.

    Each array is at least twice as long as the next, so there are few arrays, and each hash is moved only a few times.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Adds [n] uint64 hashes and returns [n] bool: whether each is new."""
        values, first = np.unique(hashes, return_index=True)
        is_known = np.zeros(len(values), bool)
        for array in self._arrays:
            place = np.minimum(np.searchsorted(array, values), len(array) - 1)
            is_known |= array[place] == values
        is_new = np.zeros(len(hashes), bool)
        is_new[first[~is_known]] = True
        self._insert(values[~is_known])
        return is_new

    def _insert(self, values: np.ndarray) -> None:
        while self._arrays and len(self._arrays[-1]) < 2 * len(values):
            values = np.sort(np.concatenate([self._arrays.pop(), values]))
        if len(values):
            self._arrays.append(values)


class NearDuplicates:
    """An index of texts that finds those similar to a new one. It takes about 4 kB a text.

    Args:
        threshold: Jaccard similarity of the sets of three words from which two texts are near duplicates, above 0 and
            at most 1.

    Raises:
        ConfigError: The package rensa is missing.
    """

    def __init__(self, threshold: float):
        try:
            import rensa
        except ImportError as error:
            raise ConfigError(
                "data.near_dedup_threshold needs the package rensa: pip install 'gemma-tune[dedup]'."
            ) from error
        self._rensa, self._threshold = rensa, threshold
        self._lsh = rensa.RMinHashLSH(threshold, _NUM_HASHES, num_bands(threshold))
        self._entries: list[tuple[str, Any]] = []

    def find_or_add(self, text: str, name: str) -> str | None:
        """Returns the name of an earlier text that is similar; adds the text and returns None if there is none.

        Args:
            text: Text whose words are separated by white space.
            name: Name to return when a later text is similar to this one.
        """
        signature = self._rensa.RMinHash(num_perm=_NUM_HASHES, seed=_SEED)
        signature.update(shingles(text))
        for place in sorted(self._lsh.query(signature)):
            other, found = self._entries[place]
            if signature.jaccard(found) >= self._threshold:
                return other
        self._lsh.insert(len(self._entries), signature)
        self._entries.append((name, signature))
        return None


def shingles(text: str) -> list[str]:
    """Returns all runs of three words of a text; of a shorter text, the text itself."""
    words = text.split()
    count = max(1, len(words) - _WORDS_IN_SHINGLE + 1)
    return [" ".join(words[start : start + _WORDS_IN_SHINGLE]) for start in range(count)]


def num_bands(threshold: float) -> int:
    """Returns the number of bands of locality-sensitive hashing.

    Of the numbers that divide the signature, it is the smallest with which a pair of just the similarity `threshold` is
    a candidate in 95 of 100 cases: s = threshold, b bands of r hashes, 1 - (1 - s^r)^b.
    """
    choices = [bands for bands in (2, 4, 8, 16, 32, 64) if 1 - (1 - threshold ** (_NUM_HASHES // bands)) ** bands
               >= _LEAST_CHANCE]  # fmt: skip
    return choices[0] if choices else _NUM_HASHES
