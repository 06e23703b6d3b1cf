"""What can be chosen of an export, with its defaults."""

import dataclasses
import types
from collections.abc import Mapping
from typing import NamedTuple

from gemma_tune.errors import ConfigError
from gemma_tune.models.training_memory import parse_bytes

EXPORT_MARKER = "export.json"  # A file of every export: --overwrite replaces no folder without it.
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How a model is written.

    Attributes:
        scheme: Number format of `gguf` (a key of gguf_types.SCHEMES) or `litert` (one of litert.WEIGHTS). Empty: f16,
            float32.
        cache_length: Tokens that a conversation may have in `litert`; 0: litert.DEFAULTS.
        dtype: Of the weights of `hf`.
        max_shard_size: No file of `hf` gets larger, unless one tensor alone is: `5GB`, `500MB`.
        base_name: How the base is named, for those who read what was written.
        language: Of the data, for the model card: codes such as `en` or `en,de`.
        datasets: Their names on Hugging Face, for the model card, with commas between.
    """

    scheme: str = ""
    cache_length: int = 0
    dtype: str = "float32"
    max_shard_size: str = "5GB"
    base_name: str = ""
    language: str = ""
    datasets: str = ""

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}.")
        try:
            parse_bytes(self.max_shard_size)
        except ValueError as error:
            raise ConfigError(f"max_shard_size: {error}") from error

    @property
    def languages(self) -> tuple[str, ...]:
        """`language` as a list."""
        return _listed(self.language)

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """`datasets` as a list."""
        return _listed(self.datasets)

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` as a number."""
        return int(parse_bytes(self.max_shard_size))


DEFAULT_OPTIONS = ExportOptions()


class WrittenExport(NamedTuple):
    """What a writer says of what it wrote.

    notes: Sentences. kind: How it is to be used, as `usage.usage_examples` takes it, and words that it replaces there.
    """

    notes: list[str]
    kind: str
    words: Mapping[str, str] = types.MappingProxyType({})


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
