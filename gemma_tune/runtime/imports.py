"""Imports of libraries without heavy packages that they take along where these happen to be installed."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hide_packages(*names: str) -> Iterator[None]:
    """Within it, importing one of these packages raises ImportError, unless it was imported before.

    Afterwards the user may import them as ever.
    """
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
