"""Takes a stream in chunks of bounded size, with little work between them."""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

EXAMPLES_PER_CHUNK = 2000  # Megabytes, and enough for operations on arrays to be faster than loops.
_CHARACTERS_PER_CHUNK = 4_000_000
_T = TypeVar("_T")


def in_chunks(items: Iterable[_T], size_of: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Yields lists of `EXAMPLES_PER_CHUNK` items; of fewer where they are large, as books are, and at the end.

    Args:
        items: The items.
        size_of: Function that returns the number of characters of an item.
    """
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        size += size_of(item)
        if len(chunk) >= EXAMPLES_PER_CHUNK or size >= _CHARACTERS_PER_CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Yields each item after the next one has been fetched."""
    iterator = iter(items)
    for previous in islice(iterator, 1):
        for item in iterator:
            yield previous
            previous = item
        yield previous


@contextlib.contextmanager
def garbage_collector_paused() -> Iterator[None]:
    """Pauses Python's search for reference cycles.

    Each chunk creates and frees tens of thousands of tuples. Searching them for cycles, of which there are none, takes
    a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
