"""The published rates and rental prices of accelerators.

Rates are from Cloud TPU's system architecture pages (v4, v5e, v5p, v6e) and NVIDIA's data sheets of T4, L4, A100, H100
and H200, without sparsity. Prices are Google Cloud's on-demand prices in US regions. They differ by region and change;
`--price` sets another one.
"""

from typing import NamedTuple

from gemma_tune.errors import ConfigError, did_you_mean

THIS_CPU = "cpu"


class Hardware(NamedTuple):
    """One chip.

    Attributes:
        name: Name, as `--hardware` takes it.
        flops_16: Floating-point operations per second in bfloat16 (T4: float16).
        flops_32: The same in float32, as JAX multiplies it by default: TPUs in bfloat16, GPUs in TensorFloat32 where
            they have it.
        memory_bytes: Bytes of device memory.
        memory_bandwidth: Bytes per second that the chip reads from its memory.
        link_bandwidth: Bytes per second that the chip sends to other chips.
        dollars_per_hour: Price of one chip, with its share of the host.
        mfu: Model FLOPs utilization: the share of the published rate that training is assumed to reach, from 0 to 1.
    """

    name: str
    flops_16: float
    flops_32: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    dollars_per_hour: float
    mfu: float


_TPU_MFU, _GPU_MFU = 0.45, 0.4  # As reported for well-tuned training of such models; for TPU in MaxText's README.
_GIB, _TERA, _GIGA = 2.0**30, 1e12, 1e9

HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("v4", 275 * _TERA, 275 * _TERA, 32 * _GIB, 1228 * _GIGA, 300 * _GIGA, 3.22, _TPU_MFU),
        Hardware("v5e", 197 * _TERA, 197 * _TERA, 16 * _GIB, 819 * _GIGA, 200 * _GIGA, 1.20, _TPU_MFU),
        Hardware("v5p", 459 * _TERA, 459 * _TERA, 95 * _GIB, 2765 * _GIGA, 600 * _GIGA, 4.20, _TPU_MFU),
        Hardware("v6e", 918 * _TERA, 918 * _TERA, 32 * _GIB, 1638 * _GIGA, 448 * _GIGA, 2.70, _TPU_MFU),
        Hardware("t4", 65 * _TERA, 8.1 * _TERA, 16 * _GIGA, 320 * _GIGA, 16 * _GIGA, 0.54, _GPU_MFU),
        Hardware("l4", 121 * _TERA, 60 * _TERA, 24 * _GIGA, 300 * _GIGA, 32 * _GIGA, 0.71, _GPU_MFU),
        Hardware("a100", 312 * _TERA, 156 * _TERA, 40 * _GIGA, 1555 * _GIGA, 300 * _GIGA, 3.67, _GPU_MFU),
        Hardware("a100-80gb", 312 * _TERA, 156 * _TERA, 80 * _GIGA, 2039 * _GIGA, 300 * _GIGA, 5.07, _GPU_MFU),
        Hardware("h100", 989 * _TERA, 494 * _TERA, 80 * _GIGA, 3350 * _GIGA, 450 * _GIGA, 11.06, _GPU_MFU),
        Hardware("h200", 989 * _TERA, 494 * _TERA, 141 * _GIGA, 4800 * _GIGA, 450 * _GIGA, 10.60, _GPU_MFU),
    )
}
_USABLE = 0.92  # Share of a chip's memory. The rest goes to the runtime, to programs and to fragmentation.


def find_hardware(name: str) -> Hardware:
    """Returns a chip by its name. For `cpu`, the rates of this machine are measured.

    Raises:
        ConfigError: The name is unknown. The message suggests the nearest.
    """
    if name.lower() == THIS_CPU:
        return this_cpu()
    if name.lower() not in HARDWARE:
        known = [*HARDWARE, THIS_CPU]
        raise ConfigError(f"--hardware={name} is unknown.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return HARDWARE[name.lower()]


def usable_bytes(hardware: Hardware) -> float:
    """Returns how much of a chip's memory a training step can use."""
    return _USABLE * hardware.memory_bytes


def this_cpu() -> Hardware:
    """Returns this machine as one chip, with rates that are measured in about a second."""
    import psutil

    rates = _product_rate("float32"), _product_rate("bfloat16")
    bandwidth = _copy_rate()
    return Hardware(
        THIS_CPU, rates[1], rates[0], float(psutil.virtual_memory().total), bandwidth, bandwidth, 0.0, _CPU_MFU
    )


_CPU_MFU = 0.6  # benchmarks/RESULTS.md: 0.56 to 0.76.


def _product_rate(dtype: str) -> float:
    """Returns the median FLOPs per second of a matrix product of a small Gemma's size, [1024, 640]·[640, 2048]."""
    import jax.numpy as jnp

    from gemma_tune.runtime.backend import jax

    left, right = jnp.ones((1024, 640), dtype), jnp.ones((640, 2048), dtype)
    multiply = jax.jit(lambda left, right: jnp.dot(left, right, preferred_element_type=jnp.float32))
    return 2.0 * 1024 * 640 * 2048 / _median_seconds(lambda: multiply(left, right).block_until_ready())


def _copy_rate() -> float:
    """Returns how many bytes per second are read and written."""
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
