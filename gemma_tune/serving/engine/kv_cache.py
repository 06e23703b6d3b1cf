"""Allocates slots of the KV cache, and finds prefixes in it that a new request can reuse.

The cache is one row of token positions. A request gets a slot that is long enough for its prompt and its longest
answer. When the request is done, its slot is kept until the room is needed: another prompt with the same prefix copies
the keys and values instead of computing them. Only whole chunks are copied, each computed by the same program whoever
asks, so that reuse doesn't change a bit of what follows (vLLM shares its cache blocks by the same rule). Under pressure
the least recently used slots are evicted.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


@dataclasses.dataclass(eq=False)
class CacheSlot:
    """Consecutive positions of the cache.

    Attributes:
        start: First position.
        size: Number of positions.
        adapter: Index of the adapter that computes its keys and values.
        tokens: Token ids whose keys and values are in it, from its start on, in whole chunks.
        in_use: Whether a running request has it.
    """

    start: int
    size: int
    adapter: int = 0
    tokens: tuple[int, ...] = ()
    in_use: bool = True


class Allocation(NamedTuple):
    """A new slot, and the prefix to copy into it.

    Attributes:
        slot: The new slot.
        source: Slot to copy the prefix from; None: nothing is reused.
        num_reused: Length of the prefix, in tokens.
    """

    slot: CacheSlot
    source: CacheSlot | None
    num_reused: int


class KVCacheAllocator:
    """All slots of one cache.

    Args:
        num_positions: Size of the cache, in positions.
        chunk_size: Positions in a chunk; slots consist of whole chunks.
    """

    def __init__(self, num_positions: int, chunk_size: int):
        self._num_positions, self._chunk_size = num_positions, chunk_size
        self._slots: list[CacheSlot] = []  # In the order of their positions.
        self._unused: list[CacheSlot] = []  # Least recently used first.

    @property
    def positions_in_use(self) -> int:
        """Number of positions in slots that running requests have."""
        return sum(slot.size for slot in self._slots if slot.in_use)

    def allocate(self, num_tokens: int, prompt: Sequence[int], adapter: int) -> Allocation | None:
        """Returns a new slot, or None when there is no room until a request is done.

        Slots that no request uses are evicted for it, the least recently used first, the source of the prefix last.

        Args:
            num_tokens: Length of the prompt with the longest answer.
            prompt: Token ids whose keys and values are needed.
            adapter: Index of the adapter that computes them.
        """
        source, num_reused = self._longest_prefix(prompt, adapter)
        size = -(-num_tokens // self._chunk_size) * self._chunk_size
        if source in self._unused:
            self._unused.remove(source)
            self._unused.append(source)
        while (start := self._first_gap(size)) is None:
            if not self._unused:
                return None
            self._slots.remove(self._unused.pop(0))
        if source not in self._slots:
            source, num_reused = None, 0
        slot = CacheSlot(start, size, adapter, tuple(prompt[:num_reused]))
        self._slots.append(slot)
        self._slots.sort(key=lambda each: each.start)
        return Allocation(slot, source, num_reused)

    def free(self, slot: CacheSlot) -> None:
        """Takes back the slot of a finished request. Its keys and values stay until the slot is evicted."""
        slot.in_use = False
        if slot.tokens:
            self._unused.append(slot)
        else:
            self._slots.remove(slot)

    def _first_gap(self, size: int) -> int | None:
        """Returns the first position that begins a free stretch of this size."""
        start = 0
        for slot in self._slots:
            if slot.start - start >= size:
                return start
            start = slot.start + slot.size
        return start if self._num_positions - start >= size else None

    def _longest_prefix(self, prompt: Sequence[int], adapter: int) -> tuple[CacheSlot | None, int]:
        """Returns the slot that shares the longest prefix with the prompt, and the prefix's length."""
        best, longest = None, 0
        for slot in self._slots:
            if slot.adapter == adapter:
                length = self._common_prefix(slot.tokens, prompt)
                if length > longest:
                    best, longest = slot, length
        return best, longest

    def _common_prefix(self, tokens: Sequence[int], prompt: Sequence[int]) -> int:
        """Returns the number of equal tokens at the beginning, in whole chunks."""
        limit, size = min(len(tokens), len(prompt)), self._chunk_size
        length = 0
        while length + size <= limit and tuple(tokens[length : length + size]) == tuple(prompt[length : length + size]):
            length += size
        return length
