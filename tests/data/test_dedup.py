"""Near duplicates are found from the similarity on that was asked for, by MinHash."""

import sys

import numpy as np
import pytest

from gemma_tune.data import Example, Turn
from gemma_tune.data.cleaning import Cleaner
from gemma_tune.data.dedup import NearDuplicates, num_bands, shingles
from gemma_tune.errors import ConfigError

VOCABULARY = [f"word{number}" for number in range(4000)]


def pair_with_similarity(rng, similarity, size=400):
    """Two texts whose sets of three words have just that Jaccard similarity: they share a beginning of that length."""
    shared = round(2 * size * similarity / (1 + similarity))
    first, second = (list(rng.choice(VOCABULARY, size + 2)) for _ in range(2))
    second[: shared + 2] = first[: shared + 2]
    sets = [set(shingles(" ".join(text))) for text in (first, second)]
    assert abs(len(sets[0] & sets[1]) / len(sets[0] | sets[1]) - similarity) < 0.01
    return " ".join(first), " ".join(second)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_pairs_are_found_from_the_threshold_on(threshold, rng):
    found = dict.fromkeys((threshold - 0.25, threshold + 0.15), 0)
    for similarity in found:
        for _ in range(40):
            first, second = pair_with_similarity(rng, similarity)
            index = NearDuplicates(threshold)
            assert index.find_or_add(first, "first") is None
            found[similarity] += index.find_or_add(second, "second") == "first"
    # The estimate from 128 hashes has a standard deviation of at most 0.044: both are more than three away.
    assert list(found.values()) == [0, 40]


def test_the_chance_to_be_compared_is_95_percent_or_the_most_that_there_is():
    for threshold in np.linspace(0.1, 1, 19):
        bands = num_bands(threshold)
        assert 128 % bands == 0
        assert bands == 128 or 1 - (1 - threshold ** (128 / bands)) ** bands >= 0.95


def test_shingles():
    assert shingles("a b c d") == ["a b c", "b c d"]
    assert shingles("a b") == ["a b"] and shingles("") == [""]


def test_the_cleaner_drops_and_counts_them_and_says_what_they_repeat(rng):
    text = " ".join(rng.choice(VOCABULARY, 80))
    examples = [
        Example((Turn("user", "Tell me."), Turn("model", text)), "a:1"),
        Example((Turn("user", "Tell me"), Turn("model", text + " indeed")), "a:2"),
        Example((Turn("user", "Tell me."), Turn("model", " ".join(rng.choice(VOCABULARY, 80)))), "a:3"),
    ]
    cleaner = Cleaner((), near_duplicates=NearDuplicates(0.8))
    assert [each.example.origin for each in cleaner.clean(examples)] == ["a:1", "a:3"]
    assert cleaner.counts["near_duplicates"] == 1
    assert [(each.origin, each.note) for each in cleaner.samples["near_duplicates"]] == [("a:2", "like a:1")]
    assert len(Cleaner(()).clean(examples)) == 3  # Control: without the index they stay.


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"needs the package rensa: pip install 'gemma-tune\[dedup\]'"):
        NearDuplicates(0.8)
