"""The memory of this process, as the operating system counts it."""

import contextlib
import ctypes
import resource
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Returns the most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage counts what the program held that started this one.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def peak_memory_gb() -> float:
    """Returns the same in 10^9 bytes."""
    return peak_memory_bytes() / 1e9


# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def release_freed_memory() -> None:
    """Gives memory that was freed back to the operating system.

    Compiling takes hundreds of megabytes in small pieces, which glibc keeps for later otherwise.
    """
    _call_glibc("malloc_trim", 0)


def keep_freed_memory() -> None:
    """Keeps what is freed from now on for what is taken next; `release_freed_memory` gives back what was kept until then.

    XLA on CPU takes a program's temporary memory anew for each call. glibc asks the operating system for large pieces
    and hands them back at once, so that in a step of 1,024 tokens 1.2 GB of fresh pages are mapped and cleared, a
    twentieth of its time. Works for the main thread; others have places of their own, of 64 MB at most.
    """
    _call_glibc("mallopt", _MMAP_MAX, 0)
    _call_glibc("mallopt", _TRIM_THRESHOLD, 2**31 - 1)


def _call_glibc(name: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Another C library.
        getattr(ctypes.CDLL("libc.so.6"), name)(*arguments)
