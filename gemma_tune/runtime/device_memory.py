"""The memory of the first device, as JAX counts it."""


def device_limit_bytes() -> int:
    """Returns how many bytes JAX may take on the first device, or 0 if there is no limit, as on a CPU."""
    import jax

    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return int((stats or {}).get("bytes_limit", 0))


def available_device_bytes() -> float:
    """Returns how much memory a run may take: the limit of the first device, or on a CPU what is free now."""
    import psutil

    return float(device_limit_bytes() or psutil.virtual_memory().available)
