"""Writes a checkpoint's tensors into one or several safetensors files.

Tensors are made and written one by one, so that no copy of all of them is held.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gemma_tune.export.hf.tensors import Tensor
from gemma_tune.runtime.atomic_files import write_json
from gemma_tune.runtime.safetensors_file import contiguous_bytes, safetensors_header

INDEX_FILE = "model.safetensors.index.json"
_METADATA = {"format": "pt"}  # transformers requires it.


def write_shards(
    folder: Path, tensors: Sequence[Tensor], dtype: str, max_shard_bytes: int, advance: Callable[[int], None]
) -> None:
    """Writes tensors into one file, or into several with an index.

    Args:
        folder: Folder of the files.
        tensors: Tensors in the order in which they are written.
        dtype: `float32`, `bfloat16` or `float16`.
        max_shard_bytes: Most bytes of tensors in a file, unless a single tensor is larger.
        advance: Called with the number of tensors written since the last call.
    """
    kind = np.dtype(dtype)
    shards = _split(tensors, kind, max_shard_bytes)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, kind, advance)
    if len(shards) > 1:
        total_bytes = sum(_num_bytes(tensor, kind) for tensor in tensors)
        file_of_tensor = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": file_of_tensor}
        write_json(folder / INDEX_FILE, index)


def _split(tensors: Sequence[Tensor], dtype: np.dtype, max_shard_bytes: int) -> list[list[Tensor]]:
    """Returns the tensors of each file."""
    shards: list[list[Tensor]] = [[]]
    shard_bytes = 0
    for tensor in tensors:
        num_bytes = _num_bytes(tensor, dtype)
        if shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(tensor)
        shard_bytes += num_bytes
    return shards


def _write(path: Path, tensors: Sequence[Tensor], dtype: np.dtype, advance: Callable[[int], None]) -> None:
    with open(path, "wb") as file:
        file.write(safetensors_header(((tensor.name, tensor.shape, dtype) for tensor in tensors), _METADATA))
        for tensor in tensors:
            for chunk in tensor.chunks(dtype):
                file.write(contiguous_bytes(chunk))
            advance(1)


def _num_bytes(tensor: Tensor, dtype: np.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize
