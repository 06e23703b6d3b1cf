"""Splits a model's KV cache into one array of keys and one of values for each layer, and joins them again.

KerasHub has such arrays for Gemma 3, and a single array [B, layers, 2, C, K, H] for the other families.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class CacheParts(NamedTuple):
    """The arrays of a model's KV cache.

    Attributes:
        shapes: Name of each array, such as `kv_cache_k_0`, and its shape [1, C, K, H].
        structure: Tree structure of KerasHub's cache; None for a single array.
    """

    shapes: dict[str, tuple[int, ...]]
    structure: Any

    def join(self, named: Mapping[str, jax.Array]) -> Any:
        """Returns KerasHub's cache, made of arrays by name."""
        arrays = [named[name] for name in self.shapes]
        if self.structure is not None:
            return jax.tree.unflatten(self.structure, arrays)
        pairs = [jnp.stack(arrays[i : i + 2], axis=1) for i in range(0, len(arrays), 2)]
        return jnp.stack(pairs, axis=1)

    def split(self, cache: Any) -> dict[str, jax.Array]:
        """Returns the arrays of KerasHub's cache by name."""
        if self.structure is not None:
            return dict(zip(self.shapes, jax.tree.leaves(cache), strict=True))
        return {name: cache[:, index // 2, index % 2] for index, name in enumerate(self.shapes)}


def cache_parts(model: Any, cache_length: int) -> CacheParts:
    """Returns the arrays of a CausalLM's KV cache for one row of `cache_length` tokens."""
    build = model._build_cache
    required = [p for p in inspect.signature(build).parameters.values() if p.default is inspect.Parameter.empty]
    token_ids = jax.ShapeDtypeStruct((1, cache_length), jnp.int32)
    spec = jax.eval_shape(lambda ids: build(ids, *[None] * (len(required) - 1))[1], token_ids)
    leaves, structure = jax.tree.flatten(spec)
    if len(leaves) == 1:
        _, num_layers, _, *shape = leaves[0].shape
        return CacheParts(_named([(1, *shape)] * 2 * num_layers), None)
    return CacheParts(_named([leaf.shape for leaf in leaves]), structure)


def _named(shapes: list[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"kv_cache_{'kv'[index % 2]}_{index // 2}": shape for index, shape in enumerate(shapes)}
