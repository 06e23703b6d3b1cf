"""Keras and KerasHub on JAX, imported without TensorFlow. Every other module takes them from here.

keras-hub imports TensorFlow where it is installed, which doubles the start-up time (5 s more) and the memory, for
preprocessing layers that gemma_tune doesn't use. While keras_hub is being imported TensorFlow is hidden from it; the
user may import TensorFlow before or afterwards. Grain (half a second, 55 MB) waits until it is needed.
"""

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

from gemma_tune.errors import ConfigError
from gemma_tune.runtime.imports import hide_packages

# Programs on CPU then run in the thread that calls them, and take their memory where `keep_freed_memory` has a say. The
# loop waits for each step anyhow.
jax.config.update("jax_cpu_enable_async_dispatch", False)
_WORTH_KEEPING_SECONDS = 0.5


with hide_packages("tensorflow", "tensorflow_text", "grain"):
    import keras
    import keras_hub
    from keras_hub.src.utils import pipeline_model

pipeline_model.grain = keras.src.utils.module_utils.grain  # Imported once it is used, by `fit` and `generate` on text.

if keras.config.backend() != "jax":
    raise ConfigError(
        f"gemma_tune needs Keras on the JAX backend, but Keras runs on {keras.config.backend()!r}. Import gemma_tune "
        "before "
        "keras, or set the environment variable KERAS_BACKEND=jax and start Python again."
    )


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Within it Keras doesn't import TensorFlow, as it does to save a model: five seconds, and messages in C++.

    Afterwards Keras looks for it again where it needs it.
    """
    found = keras.src.utils.module_utils.tensorflow
    before = found._available
    with hide_packages("tensorflow"):
        try:
            yield
        finally:
            found._available = before


def is_single_cpu() -> bool:
    """Whether programs are for a CPU that counts as one device. What is written out for XLA's compiler there, no mesh
    of devices could cut.
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def cache_dir() -> Path:
    """Folder for what can be made again: compiled programs and tokenizers. `GEMMA_TUNE_CACHE` moves it."""
    base = os.environ.get("GEMMA_TUNE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gemma_tune"
    )
    return Path(base)


def _keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs on disk, so that a second run of the same shape starts at once.

    JAX's own variables win.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    # A home folder may be shared by machines whose CPUs know different instructions; programs of one can crash another.
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        flags = platform.processor()
    machine = hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:8]
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / f"xla-{machine}"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_SECONDS)


_keep_compiled_programs()

__all__ = ["cache_dir", "is_single_cpu", "jax", "keras", "keras_hub", "without_tensorflow"]
