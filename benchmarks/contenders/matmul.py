"""Says which device JAX has, and how fast it multiplies matrices.

python -m benchmarks.contenders.matmul
"""

import jax

from benchmarks.contenders.worker import tell
from benchmarks.machine import matmul_rate

# Square, and as in the feed-forward layers of Gemma 3 4B.
_GPU_SHAPES = ((8192, 8192, 8192), (8192, 2560, 10_240))


def main() -> None:
    """Measures bfloat16 on a GPU, and float32 elsewhere."""
    device = jax.devices()[0]
    is_gpu = device.platform == "gpu"
    rate = matmul_rate(_GPU_SHAPES, "bfloat16", 2e13) if is_gpu else matmul_rate()
    tell(gpu=device.device_kind if is_gpu else None, matmul_flops_per_second=rate)


if __name__ == "__main__":
    main()
