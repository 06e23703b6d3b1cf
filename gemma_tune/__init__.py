"""Fine-tunes Gemma with Keras 3 on JAX.

    import gemma_tune

    config = gemma_tune.Config(data=gemma_tune.DataConfig(source="support.jsonl"))
    model = gemma_tune.train(config)
    print(gemma_tune.generate(model, "How do I reset my phone?"))

All names are imported at first use, so that `import gemma_tune` takes next to no time. If Keras hasn't been imported
and the environment variable KERAS_BACKEND isn't set, it is set to `jax`. A backend that the user has set stays, and
loading a model then raises a ConfigError.
"""

import os
import sys

from gemma_tune.lazy_names import lazy_names
from gemma_tune.version import __version__

if "keras" not in sys.modules and not os.environ.get("KERAS_BACKEND"):
    os.environ["KERAS_BACKEND"] = "jax"  # Keras reads it once, when it is imported.

_PUBLIC = {
    "Config": "gemma_tune.config",
    "ModelConfig": "gemma_tune.config",
    "DataConfig": "gemma_tune.config",
    "LoraConfig": "gemma_tune.config",
    "OptimizerConfig": "gemma_tune.config",
    "TrainingConfig": "gemma_tune.config",
    "GenerationConfig": "gemma_tune.config",
    "Example": "gemma_tune.data",
    "Turn": "gemma_tune.data",
    "load_examples": "gemma_tune.data",
    "load_model": "gemma_tune.models",
    "load_adapter": "gemma_tune.models",
    "save_adapter": "gemma_tune.models",
    "train": "gemma_tune.pipeline",
    "evaluate": "gemma_tune.pipeline",
    "compare": "gemma_tune.pipeline",
    "tune": "gemma_tune.tuning",
    "export_model": "gemma_tune.export",
    "generate": "gemma_tune.serving",
    "stream": "gemma_tune.serving",
    "GemmaTuneError": "gemma_tune.errors",
    "ConfigError": "gemma_tune.errors",
    "DataError": "gemma_tune.errors",
    "ModelError": "gemma_tune.errors",
    "TrainingError": "gemma_tune.errors",
}

__all__ = ["__version__", *_PUBLIC]


__getattr__ = lazy_names("gemma_tune", _PUBLIC)


def __dir__():
    return sorted(__all__)
