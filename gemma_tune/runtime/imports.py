"""Hides heavy packages from libraries that import them wherever they are installed."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hide_packages(*names: str) -> Iterator[None]:
    """Makes imports of some packages raise ImportError within the block, unless they were imported before.

    Afterwards they can be imported as usual.
    """
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
