"""The machine and the versions that figures were measured with, and how fast it multiplies matrices."""

import importlib.metadata
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("keras", "keras-hub", "jax", "jaxlib", "optax", "transformers", "peft", "torch", "numpy", "scipy")


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


def matmul_rate(repeats: int = 5) -> float:
    """Returns floating-point operations a second of float32 matrix products in XLA, at the shapes of the feed-forward
    layers and of a block of the head, whichever is faster.
    """
    import jax
    import jax.numpy as jnp

    best = 0.0
    for rows, inner, columns in ((512, 640, 2048), (8192, 640, 512), (2048, 2048, 2048)):
        a, b = jnp.ones((rows, inner)), jnp.ones((inner, columns))
        product = jax.jit(lambda a, b: a @ b)
        product(a, b).block_until_ready()
        count = max(1, int(2e10 / (2 * rows * inner * columns)))
        rates = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(count):
                result = product(a, b)
            result.block_until_ready()
            rates.append(2.0 * rows * inner * columns * count / (time.perf_counter() - start))
        best = max(best, statistics.median(rates))
    return best
