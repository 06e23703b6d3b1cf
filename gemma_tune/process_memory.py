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


def give_back_memory() -> None:
    """Gives memory that was freed back to the operating system.

    Compiling takes hundreds of megabytes in small pieces, which glibc keeps for later otherwise.
    """
    with contextlib.suppress(OSError, AttributeError):  # Another C library.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
