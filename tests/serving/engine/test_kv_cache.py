"""Who holds which part of the cache."""

import numpy as np

from gemma_tune.serving.engine.kv_cache import KVCacheAllocator

CHUNK = 4


def test_regions_never_overlap_and_all_room_comes_back(rng):
    regions, live = KVCacheAllocator(64, CHUNK), []
    for _ in range(2000):
        if live and rng.random() < 0.5:
            region = live.pop(rng.integers(len(live)))
            region.tokens = tuple(rng.integers(0, 2, region.size // CHUNK * CHUNK))
            regions.free(region)
        else:
            found = regions.allocate(int(rng.integers(1, 20)), rng.integers(0, 2, 8).tolist(), int(rng.integers(2)))
            if found is not None:
                live.append(found[0])
        taken = np.zeros(64, int)
        for region in live:
            assert region.size % CHUNK == 0
            taken[region.start : region.start + region.size] += 1
        assert taken.max(initial=0) <= 1 and taken.sum() == regions.positions_in_use
    for region in live:
        regions.free(region)
    assert regions.positions_in_use == 0
    assert regions.allocate(64, [], 0) is not None  # What nobody uses makes room.


def test_the_longest_beginning_is_found_in_whole_chunks_and_of_the_same_adapter():
    regions = KVCacheAllocator(64, CHUNK)
    region, source, common = regions.allocate(12, list(range(9)), 1)
    assert (source, common) == (None, 0)
    region.tokens = tuple(range(8))
    again = regions.allocate(12, [*range(7), 99, 99], 1)  # Of one in use, too.
    assert again[1:] == (region, 4) and again[0].tokens == (0, 1, 2, 3)
    assert regions.allocate(12, list(range(9)), 0)[1:] == (None, 0)
    regions.free(region)
    assert regions.allocate(12, list(range(9)), 1)[1:] == (region, 8)


def test_no_room_until_a_request_is_done_and_the_longest_unused_goes_first():
    regions = KVCacheAllocator(16, CHUNK)
    first, second = (regions.allocate(8, [], 0)[0] for _ in range(2))
    assert regions.allocate(4, [], 0) is None
    for region, tokens in ((second, (1, 1, 1, 1)), (first, (2, 2, 2, 2))):
        region.tokens = tokens
        regions.free(region)
    assert regions.allocate(4, [2, 2, 2, 2], 0)[1:] == (first, 4)  # `second` made room.
    assert regions.allocate(4, [1, 1, 1, 1], 0)[2] == 0


def test_a_source_that_must_make_room_is_no_source():
    regions = KVCacheAllocator(8, CHUNK)
    region, _, _ = regions.allocate(8, [], 0)
    region.tokens = (1, 1, 1, 1)
    regions.free(region)
    assert regions.allocate(8, [1, 1, 1, 1], 0)[1:] == (None, 0)
