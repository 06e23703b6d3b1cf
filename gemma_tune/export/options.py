"""What can be chosen of an export, with its defaults."""

import dataclasses

from gemma_tune.errors import ConfigError
from gemma_tune.models.memory import parse_bytes

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is written.

    Attributes:
        dtype: Of the weights of `hf`.
        max_shard_size: No file of `hf` gets larger, unless one tensor alone is: `5GB`, `500MB`.
        base_name: How the base is named, for those who read what was written.
    """

    dtype: str = "float32"
    max_shard_size: str = "5GB"
    base_name: str = ""

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}.")
        try:
            parse_bytes(self.max_shard_size)
        except ValueError as error:
            raise ConfigError(f"max_shard_size: {error}") from error

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` as a number."""
        return int(parse_bytes(self.max_shard_size))
