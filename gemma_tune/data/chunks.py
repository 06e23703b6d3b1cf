"""A stream in pieces of bounded size, and without needless work between them."""

import contextlib
import gc
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

CHUNK = 2000  # Examples in memory at a time: megabytes, and enough for arrays to be quicker than loops.
_T = TypeVar("_T")


def in_chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Yields lists of `size` items; the last one may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Yields each item when the next one has been asked for."""
    iterator = iter(items)
    for previous in islice(iterator, 1):
        for item in iterator:
            yield previous
            previous = item
        yield previous


@contextlib.contextmanager
def garbage_collector_paused() -> Iterator[None]:
    """While open, Python doesn't look for reference cycles.

    Each chunk makes ten thousands of tuples and frees them; looking for cycles among them, and there are none, takes a
    third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
