"""What accelerators can do, as their makers publish it, and what they are rented for.

Rates: Cloud TPU's system architecture pages (v4, v5e, v5p, v6e), and NVIDIA's data sheets of T4, L4, A100, H100 and
H200, without sparsity. Prices: Google Cloud's list of on-demand prices in US regions, of which there are several and
which change: `--price` says the right one.
"""

from typing import NamedTuple

from gemma_tune.errors import ConfigError, did_you_mean

THIS_CPU = "cpu"


class Hardware(NamedTuple):
    """One chip.

    Attributes:
        flops_16: Operations a second with bfloat16 (T4: float16) products. flops_32: The same in float32, as JAX
            multiplies it by default: on TPU and in TensorFloat32 on GPUs that have it.
        memory_bytes, memory_bandwidth: And what it reads a second.
        link_bandwidth: Bytes a second that a chip sends to its neighbours.
        dollars_per_hour: Of one chip, with its share of the host.
        share: Of `flops` that training is assumed to reach; calibrate it.
    """

    name: str
    flops_16: float
    flops_32: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    dollars_per_hour: float
    share: float


_TPU_SHARE, _GPU_SHARE = 0.45, 0.4  # What well-tuned training of such models reports; MaxText's README, for TPU.
_GIB, _TERA, _GIGA = 2.0**30, 1e12, 1e9

HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("v4", 275 * _TERA, 275 * _TERA, 32 * _GIB, 1228 * _GIGA, 300 * _GIGA, 3.22, _TPU_SHARE),
        Hardware("v5e", 197 * _TERA, 197 * _TERA, 16 * _GIB, 819 * _GIGA, 200 * _GIGA, 1.20, _TPU_SHARE),
        Hardware("v5p", 459 * _TERA, 459 * _TERA, 95 * _GIB, 2765 * _GIGA, 600 * _GIGA, 4.20, _TPU_SHARE),
        Hardware("v6e", 918 * _TERA, 918 * _TERA, 32 * _GIB, 1638 * _GIGA, 448 * _GIGA, 2.70, _TPU_SHARE),
        Hardware("t4", 65 * _TERA, 8.1 * _TERA, 16 * _GIGA, 320 * _GIGA, 16 * _GIGA, 0.54, _GPU_SHARE),
        Hardware("l4", 121 * _TERA, 60 * _TERA, 24 * _GIGA, 300 * _GIGA, 32 * _GIGA, 0.71, _GPU_SHARE),
        Hardware("a100", 312 * _TERA, 156 * _TERA, 40 * _GIGA, 1555 * _GIGA, 300 * _GIGA, 3.67, _GPU_SHARE),
        Hardware("a100-80gb", 312 * _TERA, 156 * _TERA, 80 * _GIGA, 2039 * _GIGA, 300 * _GIGA, 5.07, _GPU_SHARE),
        Hardware("h100", 989 * _TERA, 494 * _TERA, 80 * _GIGA, 3350 * _GIGA, 450 * _GIGA, 11.06, _GPU_SHARE),
        Hardware("h200", 989 * _TERA, 494 * _TERA, 141 * _GIGA, 4800 * _GIGA, 450 * _GIGA, 10.60, _GPU_SHARE),
    )
}
_USABLE = 0.92  # Of a chip's memory: the rest is the runtime's, its programs', and what can't be put together again.


def find_hardware(name: str) -> Hardware:
    """Returns a chip by its name; `cpu` is this machine, measured.

    Raises:
        ConfigError: It isn't known; suggests the nearest.
    """
    if name.lower() == THIS_CPU:
        return this_cpu()
    if name.lower() not in HARDWARE:
        known = [*HARDWARE, THIS_CPU]
        raise ConfigError(f"--hardware={name}: known are {', '.join(known)}.{did_you_mean(name, known)}")
    return HARDWARE[name.lower()]


def usable_bytes(hardware: Hardware) -> float:
    """Returns the memory that a step may take on a chip."""
    return _USABLE * hardware.memory_bytes


def this_cpu() -> Hardware:
    """Returns this machine as one chip: its products are timed, for about a second."""
    import psutil

    rates = _product_rate("float32"), _product_rate("bfloat16")
    bandwidth = _copy_rate()
    return Hardware(
        THIS_CPU, rates[1], rates[0], float(psutil.virtual_memory().total), bandwidth, bandwidth, 0.0, _CPU_SHARE
    )


_CPU_SHARE = 0.6  # benchmarks/RESULTS.md: 0.56 to 0.76.


def _product_rate(dtype: str) -> float:
    """Returns operations a second of [1024, 640]·[640, 2048], the median of a few: a small Gemma's product."""
    import jax.numpy as jnp

    from gemma_tune.runtime.backend import jax

    left, right = jnp.ones((1024, 640), dtype), jnp.ones((640, 2048), dtype)
    multiply = jax.jit(lambda left, right: jnp.dot(left, right, preferred_element_type=jnp.float32))
    return 2.0 * 1024 * 640 * 2048 / _median_seconds(lambda: multiply(left, right).block_until_ready())


def _copy_rate() -> float:
    """Returns bytes a second that are read and written."""
    import numpy as np

    source = np.ones(1 << 25, np.float32)
    target = np.empty_like(source)
    return 2.0 * source.nbytes / _median_seconds(lambda: np.copyto(target, source))


def _median_seconds(call, repeats: int = 15) -> float:
    import statistics
    import time

    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
