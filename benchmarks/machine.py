"""The machine and the versions that figures were measured with, and how fast it multiplies matrices."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tune.runtime.process_memory import peak_memory_bytes

_PACKAGES = ("keras", "keras-hub", "jax", "jaxlib", "optax", "transformers", "peft", "torch", "numpy", "scipy")
_CPU_SHAPES = ((512, 640, 2048), (8192, 640, 512), (2048, 2048, 2048))
_SHARE_OF_FREE = 0.8


def describe() -> dict[str, Any]:
    """Returns machine, Python and package versions."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def matmul_rate(
    shapes: Sequence[tuple[int, int, int]] = _CPU_SHAPES,
    dtype: str = "float32",
    num_operations: float = 2e10,
    repeats: int = 5,
) -> float:
    """Returns floating-point operations a second of matrix products in XLA, at whichever shape is fastest.

    Args:
        shapes: (rows, inner, columns); by default those of the feed-forward layers and of a block of the head.
        dtype: Of the factors. They are random: on GPUs, products of constants draw less power and run faster.
        num_operations: Products in a row are timed together, until they are as many operations.
        repeats: The median of as many such times counts.
    """
    import jax

    best = 0.0
    for rows, inner, columns in shapes:
        keys = jax.random.split(jax.random.key(0))
        a, b = (jax.random.normal(*each, dtype) for each in zip(keys, ((rows, inner), (inner, columns)), strict=True))
        product = jax.jit(lambda a, b: a @ b)
        product(a, b).block_until_ready()
        count = max(1, int(num_operations / (2 * rows * inner * columns)))
        rates = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(count):
                result = product(a, b)
            result.block_until_ready()
            rates.append(2.0 * rows * inner * columns * count / (time.perf_counter() - start))
        best = max(best, statistics.median(rates))
    return best


def free_bytes() -> float:
    """Returns how much memory a measurement may take: most of what is free now."""
    import psutil

    return _SHARE_OF_FREE * psutil.virtual_memory().available


def peak_device_bytes() -> int:
    """Returns the most memory that JAX has held on its device, or, on CPU, that the process has held."""
    import jax

    statistics_of_device = jax.devices()[0].memory_stats()
    return statistics_of_device["peak_bytes_in_use"] if statistics_of_device else peak_memory_bytes()
