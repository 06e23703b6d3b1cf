"""Recognizes duplicates by their hashes, in little more memory than the hashes take."""

import hashlib

import numpy as np


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
