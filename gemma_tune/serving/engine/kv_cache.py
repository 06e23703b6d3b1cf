"""Who holds which positions of the key/value cache, and which of them a new request can take over.

The cache is one row of positions. A request gets a region of it that is long enough for its prompt and its longest
answer. When it is done, its region stays until the room is needed: another prompt that begins with the same tokens
copies their keys and values instead of computing them. Only whole chunks are copied, each computed by the same program
whoever asks, so that reuse doesn't change a bit of what follows (vLLM shares blocks of its cache by the same rule).
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(eq=False)
class CacheSlot:
    """A stretch of the cache.

    Attributes:
        start, size: In positions.
        adapter: Index of the adapter that computed it.
        tokens: Those whose keys and values are in it, from its start on; whole chunks.
        in_use: A request is being answered in it.
    """

    start: int
    size: int
    adapter: int = 0
    tokens: tuple[int, ...] = ()
    in_use: bool = True


class KVCacheAllocator:
    """All regions of a cache of `num_positions`."""

    def __init__(self, num_positions: int, chunk: int):
        self._num_positions, self._chunk = num_positions, chunk
        self._regions: list[CacheSlot] = []  # By start.
        self._unused: list[CacheSlot] = []  # The one that was given back first comes first.

    @property
    def positions_in_use(self) -> int:
        """Of regions in which requests are being answered."""
        return sum(region.size for region in self._regions if region.in_use)

    def size_for(self, num_tokens: int) -> int:
        """Returns the size of a region for so many tokens."""
        return -(-num_tokens // self._chunk) * self._chunk

    def allocate(
        self, num_tokens: int, prompt: Sequence[int], adapter: int
    ) -> tuple[CacheSlot, CacheSlot | None, int] | None:
        """Returns a region, the one to copy the beginning of the prompt from, and how many tokens of it; None when
        there is no room until a request is done.

        KVCacheAllocator that no request uses make room, the longest unused first, the one to copy from last.

        Args:
            num_tokens: Prompt and longest answer.
            prompt: Token ids whose keys and values are needed.
            adapter: Which computes them.
        """
        source, common = self._longest_beginning(prompt, adapter)
        size = self.size_for(num_tokens)
        if source in self._unused:
            self._unused.remove(source)
            self._unused.append(source)
        while (start := self._gap(size)) is None:
            if not self._unused:
                return None
            self._remove(self._unused[0])
        if source not in self._regions:
            source, common = None, 0
        region = CacheSlot(start, size, adapter, tuple(prompt[:common]))
        self._regions.append(region)
        self._regions.sort(key=lambda each: each.start)
        return region, source, common

    def free(self, region: CacheSlot) -> None:
        """The request is done. What it computed stays while there is room."""
        region.in_use = False
        if region.tokens:
            self._unused.append(region)
        else:
            self._regions.remove(region)

    def _remove(self, region: CacheSlot) -> None:
        self._unused.remove(region)
        self._regions.remove(region)

    def _gap(self, size: int) -> int | None:
        """Returns where the first free stretch of this size begins."""
        start = 0
        for region in self._regions:
            if region.start - start >= size:
                return start
            start = region.start + region.size
        return start if self._num_positions - start >= size else None

    def _longest_beginning(self, prompt: Sequence[int], adapter: int) -> tuple[CacheSlot | None, int]:
        best, longest = None, 0
        for region in self._regions:
            if region.adapter == adapter:
                common = self._common(region.tokens, prompt)
                if common > longest:
                    best, longest = region, common
        return best, longest

    def _common(self, tokens: Sequence[int], prompt: Sequence[int]) -> int:
        most, chunk = min(len(tokens), len(prompt)), self._chunk
        length = 0
        while length + chunk <= most and tuple(tokens[length : length + chunk]) == tuple(
            prompt[length : length + chunk]
        ):
            length += chunk
        return length
