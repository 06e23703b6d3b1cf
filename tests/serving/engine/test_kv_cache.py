"""The allocator of the KV cache: slots, reused prefixes, eviction."""

import numpy as np

from gemma_tune.serving.engine.kv_cache import KVCacheAllocator

CHUNK = 4


def test_slots_never_overlap_and_all_room_comes_back(rng):
    allocator, live = KVCacheAllocator(64, CHUNK), []
    for _ in range(2000):
        if live and rng.random() < 0.5:
            slot = live.pop(rng.integers(len(live)))
            slot.tokens = tuple(rng.integers(0, 2, slot.size // CHUNK * CHUNK))
            allocator.free(slot)
        else:
            prompt = rng.integers(0, 2, 8).tolist()
            found = allocator.allocate(int(rng.integers(1, 20)), prompt, int(rng.integers(2)))
            if found is not None:
                live.append(found.slot)
        taken = np.zeros(64, int)
        for slot in live:
            assert slot.size % CHUNK == 0
            taken[slot.start : slot.start + slot.size] += 1
        assert taken.max(initial=0) <= 1 and taken.sum() == allocator.positions_in_use
    for slot in live:
        allocator.free(slot)
    assert allocator.positions_in_use == 0
    assert allocator.allocate(64, [], 0) is not None  # Unused slots are evicted.


def test_the_longest_prefix_is_reused_in_whole_chunks_and_of_the_same_adapter():
    allocator = KVCacheAllocator(64, CHUNK)
    slot, source, num_reused = allocator.allocate(12, list(range(9)), 1)
    assert (source, num_reused) == (None, 0)
    slot.tokens = tuple(range(8))
    again = allocator.allocate(12, [*range(7), 99, 99], 1)  # Of a slot in use, too.
    assert again[1:] == (slot, 4) and again.slot.tokens == (0, 1, 2, 3)
    assert allocator.allocate(12, list(range(9)), 0)[1:] == (None, 0)
    allocator.free(slot)
    assert allocator.allocate(12, list(range(9)), 1)[1:] == (slot, 8)


def test_no_room_until_a_request_is_done_and_the_least_recently_used_slot_is_evicted():
    allocator = KVCacheAllocator(16, CHUNK)
    first, second = (allocator.allocate(8, [], 0).slot for _ in range(2))
    assert allocator.allocate(4, [], 0) is None
    for slot, tokens in ((second, (1, 1, 1, 1)), (first, (2, 2, 2, 2))):
        slot.tokens = tokens
        allocator.free(slot)
    assert allocator.allocate(4, [2, 2, 2, 2], 0)[1:] == (first, 4)  # `second` was evicted.
    assert allocator.allocate(4, [1, 1, 1, 1], 0).num_reused == 0


def test_a_source_that_is_evicted_is_no_source():
    allocator = KVCacheAllocator(8, CHUNK)
    slot, _, _ = allocator.allocate(8, [], 0)
    slot.tokens = (1, 1, 1, 1)
    allocator.free(slot)
    assert allocator.allocate(8, [1, 1, 1, 1], 0)[1:] == (None, 0)
