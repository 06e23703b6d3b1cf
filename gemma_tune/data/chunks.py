"""Takes a stream in chunks of bounded size, with little work between them."""

import contextlib
import gc
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

EXAMPLES_PER_CHUNK = 2000  # Megabytes, and enough for operations on arrays to be faster than loops.
_T = TypeVar("_T")


def in_chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    """Yields lists of `EXAMPLES_PER_CHUNK` items; the last one may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, EXAMPLES_PER_CHUNK)):
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
