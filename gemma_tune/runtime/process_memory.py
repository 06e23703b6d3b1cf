"""Measures the memory of this process, and tells malloc and JAX how to use it."""

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # Of glibc's malloc.h.
_is_dedicated = False


def peak_memory_bytes() -> int:
    """Returns the most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage also counts the memory of the program that started this one.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def peak_memory_gb() -> float:
    """Returns the most memory that this process has held, in 10^9 bytes."""
    return peak_memory_bytes() / 1e9


def dedicate_process() -> None:
    """Declares that this process is for gemma_tune alone, as the command line's is.

    Only then are settings changed that hold for the whole process: JAX runs programs on a CPU in the thread that calls
    them, and `keep_freed_memory` takes effect. Training on a CPU then takes less memory (0.3 GB for Gemma 3 270M) and
    less time. JAX reads its setting once, when its first array is made, so call this before that.

    `gemma_tune.train` and the rest of the Python API never call it: a notebook's process stays as it is.
    """
    global _is_dedicated
    _is_dedicated = True
    if "jax" in sys.modules:
        run_cpu_programs_inline()


def is_dedicated_process() -> bool:
    """Returns whether `dedicate_process` was called."""
    return _is_dedicated


def run_cpu_programs_inline() -> None:
    """Makes JAX run programs on a CPU in the calling thread, where `keep_freed_memory` works; for `dedicate_process`.

    The training loop waits for each step anyway.
    """
    import jax  # Here, since the command line's --help doesn't wait for it.

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def release_freed_memory() -> None:
    """Returns freed memory to the operating system.

    Compiling takes hundreds of megabytes in small pieces, which glibc would keep for later.
    """
    _call_glibc("malloc_trim", 0)


def keep_freed_memory() -> None:
    """Makes malloc keep what is freed from now on for later use; only in a process that is gemma_tune's alone.

    XLA allocates a program's temporary memory on a CPU anew for each call. glibc gets large blocks from the operating
    system and returns them at once, so that in a step of 1,024 tokens 1.2 GB of fresh pages are mapped and cleared, a
    twentieth of its time. It works for the main thread; other threads have heaps of their own, of 64 MB at most.
    `release_freed_memory` still returns what was freed before.
    """
    if _is_dedicated:
        _call_glibc("mallopt", _MMAP_MAX, 0)
        _call_glibc("mallopt", _TRIM_THRESHOLD, 2**31 - 1)


def _call_glibc(name: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Another C library.
        getattr(ctypes.CDLL("libc.so.6"), name)(*arguments)
