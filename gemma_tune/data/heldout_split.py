"""Chooses the examples to hold out by a hash of their question."""

import hashlib

import numpy as np


def question_hash(question_key: str, seed: int) -> int:
    """Returns a pseudo-random 64-bit number that depends on the question and the seed alone."""
    digest = hashlib.sha256(f"{seed}\x00{question_key}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def heldout_by_question(question_hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Chooses examples to hold out, so that equal questions are on one side.

    A question is held out when its hash, as a share of the largest possible one, is below `fraction`. So the split of
    the questions stays the same when others are added or removed, in whatever order. If that selects no question, the
    one with the smallest hash is held out.

    Args:
        question_hashes: [n] uint64 hashes from `question_hash`.
        fraction: Share of the questions to hold out, below 1; 0: none.

    Returns:
        [n] bool, true for held-out examples.
    """
    places = question_hashes.astype(np.float64) / 2.0**64
    if not fraction or not len(places) or places.min() == places.max():
        return np.zeros(len(places), bool)  # One question can't be on both sides.
    return places <= max(fraction, places.min())
