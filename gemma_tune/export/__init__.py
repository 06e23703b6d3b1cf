"""Step 7, deploy: exports models in formats that other programs read, each with a model card.

Names are imported when they are first used, since Keras takes seconds to import.
"""

import importlib

_PUBLIC = {
    "export_model": "model_export",
    "Export": "model_export",
    "ExportOptions": "options",
    "EXPORT_FORMATS": "export_formats",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gemma_tune.export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gemma_tune.export.{_PUBLIC[name]}"), name)
