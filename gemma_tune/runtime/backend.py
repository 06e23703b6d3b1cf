"""Imports JAX, and Keras and KerasHub on it, without TensorFlow. Every other module takes them from here.

keras-hub imports TensorFlow where it is installed, which doubles the start-up time (5 s more) and the memory, for
preprocessing layers that gemma_tune doesn't use. While keras_hub is being imported, TensorFlow is hidden from it; the
user may import TensorFlow before or afterwards. Grain (half a second, 55 MB) is imported when it is needed.

Importing this module changes one setting of the process: JAX keeps compiled programs on disk (see
`enable_compilation_cache`). In a process that is gemma_tune's alone (`process_memory.dedicate_process`), programs on a
CPU also run in the thread that calls them.
"""

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from gemma_tune.errors import ConfigError
from gemma_tune.runtime.imports import hide_packages
from gemma_tune.runtime.process_memory import is_dedicated_process, run_cpu_programs_inline

_MIN_COMPILE_SECONDS = 0.5  # Programs that compile faster aren't kept.
_MIN_COMPILE_SETTING = "jax_persistent_cache_min_compile_time_secs"


def _check_keras_backend(name: str) -> None:
    if name != "jax":
        is_set = os.environ.get("KERAS_BACKEND") == name
        advice = "Set the environment variable KERAS_BACKEND=jax" if is_set else "Import gemma_tune before keras"
        raise ConfigError(
            f"gemma_tune needs Keras on the JAX backend, but Keras runs on {name!r}. {advice}, and start Python again."
        )


def _give_matplotlib_a_folder() -> None:
    """Names a temporary folder for Matplotlib, which KerasHub imports, where it would warn about a read-only home."""
    try:
        os.makedirs(os.path.expanduser("~/.config"), exist_ok=True)
    except OSError:
        os.environ.setdefault("MPLCONFIGDIR", os.path.join(tempfile.gettempdir(), f"matplotlib-{os.getuid()}"))


_give_matplotlib_a_folder()
if "keras" not in sys.modules:  # Checked first, since Keras would import the other backend's package.
    _check_keras_backend(os.environ.get("KERAS_BACKEND") or "jax")

with hide_packages("tensorflow", "tensorflow_text", "grain"):
    import keras
    import keras_hub
    from keras_hub.src.utils import pipeline_model

_check_keras_backend(keras.config.backend())
pipeline_model.grain = keras.src.utils.module_utils.grain  # Imported when `fit` or `generate` first uses it on text.


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Keeps Keras from importing TensorFlow within the block, as it does to save a model: five seconds, and messages.

    Afterwards Keras looks for TensorFlow again when it needs it.
    """
    found = keras.src.utils.module_utils.tensorflow
    before = found._available
    with hide_packages("tensorflow"):
        try:
            yield
        finally:
            found._available = before


def is_single_cpu() -> bool:
    """Returns whether programs run on a CPU that counts as one device.

    Code that is written for XLA's compiler for CPUs can't be partitioned over a mesh of devices.
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def cache_dir() -> Path:
    """Returns the folder for compiled programs, prepared data and the demo model; `GEMMA_TUNE_CACHE` moves it."""
    base = os.environ.get("GEMMA_TUNE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gemma_tune"
    )
    return Path(base).expanduser()


def cache_problem() -> str:
    """Returns why nothing can be kept in `cache_dir()`, which is made if it doesn't exist; '' if it can be written."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"The cache folder {folder} can't be written ({error.strerror or error})."
    return ""


def enable_compilation_cache() -> None:
    """Makes JAX keep compiled programs in `cache_dir()`, so that a second run of the same shapes starts at once.

    Where that can't be written, as in a container without a home, nothing is kept, and one line on stderr says so.
    It holds for all programs of the process. JAX's own settings win: with a `JAX_COMPILATION_CACHE_DIR` nothing changes
    here, `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` decides which programs are kept, and
    `JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    if problem := cache_problem():
        print(
            f"{problem} Compiled programs and prepared data are not kept. Set GEMMA_TUNE_CACHE to another folder.",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / f"xla-{_machine_hash()}"))
    jax_default = 1.0  # Another value was set by the user's program, and a variable by the user.
    if getattr(jax.config, _MIN_COMPILE_SETTING) == jax_default and _MIN_COMPILE_SETTING.upper() not in os.environ:
        jax.config.update(_MIN_COMPILE_SETTING, _MIN_COMPILE_SECONDS)


def _machine_hash() -> str:
    """Returns a name for the CPU's instruction sets.

    A home folder may be shared by machines with different CPUs, and a program for one of them can crash another.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:8]


enable_compilation_cache()
if is_dedicated_process():
    run_cpu_programs_inline()

__all__ = [
    "cache_dir",
    "cache_problem",
    "enable_compilation_cache",
    "is_single_cpu",
    "jax",
    "keras",
    "keras_hub",
    "without_tensorflow",
]
