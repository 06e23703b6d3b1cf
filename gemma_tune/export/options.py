"""Defines the options of an export, and what a writer reports about what it wrote."""

import dataclasses
import types
from collections.abc import Mapping
from typing import NamedTuple

from gemma_tune.errors import ConfigError
from gemma_tune.runtime.byte_sizes import parse_bytes

EXPORT_MARKER = "export.json"  # A file of every export: --overwrite replaces no folder without it.
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Options of an export. Each format uses some of them.

    Attributes:
        scheme: Number format of `gguf` (a key of gguf.tensor_types.GGUF_SCHEMES; empty: f16) or of `litert` (one of
            litert.model.WEIGHT_FORMATS; empty: float32).
        cache_length: Most tokens of a conversation in `litert`; 0: that of litert.model.DEFAULT_LENGTHS.
        dtype: Dtype of the weights in `hf`.
        max_shard_size: Most bytes of a file of weights in `hf`, such as `5GB`, unless a single tensor is larger.
        base_name: Name of the base model, for the readers of the export; empty: as it was given for training.
        language: Languages of the data, for the model card: codes such as `en` or `en,de`.
        datasets: Names of the data sets on Hugging Face, for the model card, separated by commas.
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
        """The codes in `language`."""
        return _split(self.language)

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The names in `datasets`."""
        return _split(self.datasets)

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return int(parse_bytes(self.max_shard_size))


DEFAULT_OPTIONS = ExportOptions()


class WrittenExport(NamedTuple):
    """What a writer reports about the files that it wrote.

    Attributes:
        notes: Sentences for the user and the model card.
        usage: Key of the usage examples in `card.usage`: the format's name, or that of a variant.
        placeholders: Further words in capitals in those examples, and what replaces them.
    """

    notes: list[str]
    usage: str
    placeholders: Mapping[str, str] = types.MappingProxyType({})


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
