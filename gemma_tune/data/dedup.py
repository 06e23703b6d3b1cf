"""A set of hashes in little more than their own memory."""

import hashlib

import numpy as np


def hash_text(text: str) -> int:
    """Returns 8 bytes of a text's BLAKE2b hash.

    Among a million different texts the chance that any two share theirs is 1 in 37 million (n²/2⁶⁵), and what comes of
    it is one example too few.
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest(), "big")


class DedupIndex:
    """Remembers uint64 hashes in sorted arrays, 8 bytes each; a Python set takes some hundred.

    Each array is at least twice as long as the next, so there are few of them, and each hash is moved few times.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Adds [n] uint64 hashes; returns [n] bool: whether each is seen for the first time."""
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
