"""Step 7, deploy: exports models in formats that other programs read, each with a model card.

Names are imported when they are first used, since Keras takes seconds to import.
"""

from gemma_tune.lazy_names import lazy_names

_PUBLIC = {
    "export_model": "gemma_tune.export.model_export",
    "Export": "gemma_tune.export.model_export",
    "ExportOptions": "gemma_tune.export.options",
    "EXPORT_FORMATS": "gemma_tune.export.export_formats",
}

__all__ = list(_PUBLIC)
__getattr__ = lazy_names("gemma_tune.export", _PUBLIC)
